"""Speed and memory against peft: LoRA of the same total rank, its mixed batches, and X-LoRA.

    pip install peft
    python -m benchmarks.bench_peft        # the best device here; writes results/speed-DEVICE.md

One process for each system, and they are measured in turns (A B B A ..), so that what else the
machine does meets all of them alike. Each figure is a median over all turns after warm-up, and each
ratio is the median of the ratios of the turns. There are several launches, since two processes with
the same code may differ by some percent. The base is a Llama of random weights: right for speed and
memory, and no more.
Generation is greedy, with a KV cache. "Best possible" is the ratio of an adapter that costs
nothing: of the bare base. "Own cost" is what the adapter adds to the bare base, over what theirs
adds: medians over the turns of ours - base and of theirs - base.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from mose import MoSE, MoSEConfig
from figures.report import aligned

ROOT = Path(__file__).resolve().parent.parent

SHAPES = {  # device: the base, its dtype, and a training batch (B, T)
    "cpu": (dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, vocab_size=8192,
                 num_attention_heads=8, num_key_value_heads=8), torch.float32, (4, 128)),
    "cuda": (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                  num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                  tie_word_embeddings=True), torch.bfloat16, (4, 1024)),
}
EXPERTS, RANK = MoSEConfig.num_experts, MoSEConfig.rank
TOKENS, PROMPT = 32, 64  # TOKENS are generated after PROMPT tokens
TARGETS = ("q_proj", "v_proj")
SYSTEMS = ("MoSEs, 1st task", "MoSEs, 100th task", "peft LoRA", "peft LoRA x 8", "peft X-LoRA")


def lora(model, rank, names):
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[*TARGETS],
                             task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted


def x_lora(model, hidden):
    """X-LoRA over as many adapters as we have experts, of the same rank; it reads them from disk"""
    import peft
    names = [f"a{i}" for i in range(EXPERTS)]
    with tempfile.TemporaryDirectory() as folder:
        lora(model, RANK, names).save_pretrained(folder)
        base = type(model)(model.config).to(model.device, model.dtype)
        base.config.use_cache = False  # X-LoRA refuses a KV cache
        paths = {str(i): f"{folder}/{name}" for i, name in enumerate(names)}
        return peft.get_peft_model(base, peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=hidden, adapters=paths, use_trainable_adapters=True))


class System:
    """One adapted model. Every method does one thing once and returns the seconds it took."""

    def __init__(self, name, device):
        shape, dtype, (self.batch, self.length) = SHAPES[device]
        torch.manual_seed(0)
        self.device, self.mose = device, None
        self.floor = self.peak() if device == "cpu" else 0
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(max_position_embeddings=4096, **shape)).to(device, dtype)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        self.vocabulary, self.model = shape["vocab_size"], model
        if name.startswith("MoSEs"):
            self.mose = MoSE(model, MoSEConfig(TARGETS))
            tasks = 99 if "100th" in name else 0
            for i in range(tasks):
                self.mose.begin_task(f"{i}")
                self.mose.observe(self.ids(8, PROMPT))
                self.mose.end_task()
            self.mose.begin_task("open")
            self.mose.observe(self.ids(8, PROMPT))
            parameters = self.mose.trainable_parameters()
        elif name == "peft X-LoRA":
            self.model = x_lora(model, shape["hidden_size"])
        else:
            self.names = [f"t{i}" for i in range(8 if name.endswith("8") else 1)]
            self.model = lora(model, EXPERTS * RANK, self.names)
        if not self.mose:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def ids(self, batch, length):
        return torch.randint(self.vocabulary, (batch, length), device=self.device)

    def clock(self, work):
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self):
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def train(self, parts=1):
        """A step of the optimizer, in so many micro-batches."""
        ids = self.ids(self.batch, self.length)
        self.model.train()

        def work():
            for part in ids.chunk(parts):
                self.model(input_ids=part, labels=part).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.clock(work)

    def train_bare(self):
        """What no adapter can save: the bare base forward, and backward down to its first layer."""
        ids = self.ids(self.batch, self.length)
        start = self.model.get_input_embeddings()(ids).requires_grad_()
        self.model.train()
        with self.mose.task(None):
            return self.clock(
                lambda: self.model(inputs_embeds=start, labels=ids).loss.backward())

    def memory(self):
        """Bytes, not seconds: the peak of training, above the process before it had a model."""
        return self.peak() - self.floor

    def finish(self):
        """Training is over: from now on this system decodes."""
        self.optimizer = None
        self.model.eval()
        if self.mose:
            self.mose.end_task()
        return 0.0

    @torch.no_grad()
    def decode(self, batch, **options):
        ids = self.ids(batch, PROMPT)
        mask = torch.ones_like(ids)
        return self.clock(lambda: self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, **options))

    def decode_bare(self, batch):
        with self.mose.task(None):
            return self.decode(batch)

    def mixed(self):
        """8 examples of 8 different tasks in one batch."""
        if not self.mose:
            return self.decode(8, adapter_names=self.names)
        with self.mose.task([f"{i}" for i in range(8)]):
            return self.decode(8)

    def mixed_bare(self):
        return self.decode_bare(8)

    def switch(self):
        name = "2" if self.mose.active == "open" else "open"
        return self.clock(lambda: self.mose.set_task(name))

    @torch.no_grad()
    def forward(self):
        ids = self.ids(self.batch, self.length)
        return self.clock(lambda: self.model(input_ids=ids, use_cache=False))

    def forward_bare(self):
        with self.mose.task(None):
            return self.forward()

    def infer(self):
        ids = self.ids(self.batch, self.length)
        return self.clock(lambda: self.mose.infer_task(ids))

    def bytes(self):
        """Bytes, not seconds: what the last task added to the file."""
        return sum(self.mose.capacity()["open"]["bytes"].values())


def serve(name, device, pipe):
    """A process of its own: does what the pipe asks for until it gets None."""
    transformers.logging.set_verbosity_error()
    system = System(name, device)
    while (request := pipe.recv()) is not None:
        pipe.send(getattr(system, request[0])(*request[1:]))


FIRST, LAST, ONE, EIGHT, X = SYSTEMS
BARE = "bare base"  # the first process, with its adapter off
ONCE = ("memory", "finish", "bytes")  # every other request is repeated
PLAN = {  # what: by whom, request
    "training step, s": ((FIRST, LAST, BARE, ONE, X), "train"),
    "peak memory, bytes": ((FIRST, ONE), "memory"),
    "finish": (SYSTEMS, "finish"),
    "decode batch 1, s": ((FIRST, LAST, BARE, ONE, X), "decode", 1),
    "decode batch 8, s": ((FIRST, LAST, BARE, ONE), "decode", 8),
    "decode 8 tasks, s": ((LAST, BARE, EIGHT), "mixed"),
    "switch, s": ((LAST,), "switch"),
    "forward, s": ((LAST,), "forward_bare"),
    "infer_task, s": ((LAST,), "infer"),
    "added by a task, bytes": ((FIRST, LAST), "bytes"),
}


def launch(device, rounds, warm, bar):
    """{what: {system: values}}, each system in a new process; requests are taken in turns."""
    spawn, pipes, result = multiprocessing.get_context("spawn"), {}, {}
    for name in SYSTEMS:
        pipes[name], other = spawn.Pipe()
        spawn.Process(target=serve, args=(name, device, other), daemon=True).start()
        other.close()  # so that the end of a process is the end of its pipe, and no endless wait
    for what, (names, *request) in PLAN.items():
        skip, count = (0, 1) if request[0] in ONCE else (warm, warm + rounds)
        values = result[what] = {name: [] for name in names}
        for i in range(count):
            for name in names[:: 1 if i % 2 else -1]:  # A B B A: nobody is always the first
                pipe = pipes[FIRST if name == BARE else name]
                pipe.send([f"{request[0]}_bare", *request[1:]] if name == BARE else request)
                values[name].append(pipe.recv())
        result[what] = {name: v[skip:] for name, v in values.items()}
        bar.update()
    for pipe in pipes.values():
        pipe.send(None)
    return result


def rows(result, device):
    """The table, from {what: {system: values}}."""
    gpu = device == "cuda"
    train, memory = result["training step, s"], result["peak memory, bytes"]
    one, eight = result["decode batch 1, s"], result["decode batch 8, s"]
    mixed, size = result["decode 8 tasks, s"], result["added by a task, bytes"]
    switch, infer, forward = (result[f"{k}, s"][LAST] for k in ("switch", "infer_task", "forward"))
    token = [value / TOKENS for value in one[LAST]]
    median, table = statistics.median, []

    def row(what, ours, theirs, target, bare=None, unit="ms", speed=False):
        best, own, ratios = "", "", [b / a if speed else a / b for a, b in zip(ours, theirs)]
        if bare:
            best = f"{median([b / c if speed else c / b for b, c in zip(theirs, bare)]):.3f}"
            ours_adds, theirs_adds = (median([x - c for x, c in zip(v, bare)])
                                      for v in (ours, theirs))
            own = f"{ours_adds / theirs_adds:.2f}"
        met = median(ratios) >= target if speed else median(ratios) <= target
        factor, digits = {"ms": (1e3, 1), "MiB": (2**-20, 1), "bytes": (1, 0)}[unit]
        a, b = (f"{median(v) * factor:,.{digits}f} {unit}" for v in (ours, theirs))
        table.append((what, a, b, f"{median(ratios):.3f}", f"{'>=' if speed else '<='} {target}",
                      "yes" if met else "NO", best, own))

    row("training step", train[FIRST], train[ONE], 1.05, train[BARE])
    row("peak memory of training", memory[FIRST], memory[ONE], 1.05, unit="MiB")
    row("decode, batch 1 (speed)", one[FIRST], one[ONE], 0.98, one[BARE], speed=True)
    row("decode, batch 8 (speed)", eight[FIRST], eight[ONE], 0.98, eight[BARE],
        speed=True)
    row("decode, 8 tasks (speed)", mixed[LAST], mixed[EIGHT], 3 if gpu else 2,
        mixed[BARE], speed=True)
    row("task switch / decode step", switch, token, 1)
    row("X-LoRA: training step", train[FIRST], train[X], 0.5, train[BARE])
    row("X-LoRA: decode (speed)", one[FIRST], one[X], 4, one[BARE], speed=True)
    row("100th / 1st: training step", train[LAST], train[FIRST], 1.05)
    row("100th / 1st: decode (speed)", one[LAST], one[FIRST], 0.95, speed=True)
    row("100th / 1st: bytes added", size[LAST], size[FIRST], 1, unit="bytes")
    row("infer_task / forward pass", infer, forward, 0.02)
    return [("", "ours", "theirs", "ratio", "target", "met", "best possible",
             "own cost"), *table]


def machine(device):
    """The device in words, and its threads."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    return f"{name}, {torch.get_num_threads()} threads"


def markdown(table):
    """Rows of text, the first one the head, as the lines of a Markdown table."""
    head, *body = [f"| {' | '.join(row)} |" for row in table]
    return [head, "|---" * len(table[0]) + "|", *body]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SHAPES, default=best)
    parser.add_argument("--launches", type=int, default=5, help="of all processes anew")
    parser.add_argument("--rounds", type=int, default=7, help="that count, for each launch")
    parser.add_argument("--warm", type=int, default=2, help="rounds before, that do not count")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    with tqdm(total=args.launches * len(PLAN), desc="measure", ncols=100) as bar:
        runs = [launch(args.device, args.rounds, args.warm, bar) for _ in range(args.launches)]
    result = {what: {name: [v for run in runs for v in run[what][name]] for name in plan[0]}
              for what, plan in PLAN.items()}
    table = rows(result, args.device)
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")}
    shape, dtype, batch = SHAPES[args.device]
    lines = [f"# Speed and memory against peft: {args.device}\n",
             f"`python -m benchmarks.bench_peft --device {args.device} --launches {args.launches} "
             f"--rounds {args.rounds}`: "
             f"{machine(args.device)}, seed 0, {versions}, medians of {args.launches} "
             f"launches x {args.rounds} rounds, in turns. Random Llama {shape}, {dtype}, "
             f"training batch {batch}; {EXPERTS} experts of rank {RANK} on {', '.join(TARGETS)} "
             f"against rank {EXPERTS * RANK}; {TOKENS} tokens are generated after {PROMPT}, and "
             "the time of a decode is that of all. Best possible: an adapter that costs nothing.\n",
             *markdown(table)]
    (args.out / f"speed-{args.device}.md").write_text("\n".join(lines) + "\n")
    record = {"device": machine(args.device), "versions": versions, "table": table,
              "values": result}
    (args.out / f"speed-{args.device}.json").write_text(json.dumps(record) + "\n")
    print("\n".join(aligned(table)))


if __name__ == "__main__":
    main()
