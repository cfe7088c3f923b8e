"""Speed and memory against peft: LoRA of the same total rank, its mixed batches, and X-LoRA.

    pip install peft
    python benchmarks/bench_peft.py        # the best device here; writes results/speed-DEVICE.md

One process for each system, and they are measured in turns (A B A B ..), so that what else the
machine does meets all of them alike. Each figure is a median after warm-up. The base is a Llama of
random weights: right for speed and memory, and no more. Generation is greedy, with a KV cache.
"""

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mose import MoSE, MoSEConfig  # noqa: E402

SHAPES = {  # device: the base, its dtype, and a training batch (B, T)
    "cpu": (dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, vocab_size=8192,
                 num_attention_heads=8, num_key_value_heads=8), torch.float32, (4, 128)),
    "cuda": (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                  num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                  tie_word_embeddings=True), torch.bfloat16, (4, 1024)),
}
EXPERTS, RANK, TOKENS, PROMPT = 4, 16, 32, 64  # TOKENS are generated after PROMPT tokens
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
        self.vocabulary, self.model, self.names = shape["vocab_size"], model, itertools.cycle("ab")
        if name.startswith("MoSEs"):
            self.mose = MoSE(model, MoSEConfig(TARGETS, EXPERTS, RANK))
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

    def train(self):
        ids = self.ids(self.batch, self.length)
        self.model.train()

        def work():
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.clock(work)

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

    def mixed(self):
        """8 examples of 8 different tasks in one batch."""
        if not self.mose:
            return self.decode(8, adapter_names=self.names)
        with self.mose.task([f"{i}" for i in range(8)]):
            return self.decode(8)

    def switch(self):
        name = f"{len(self.mose.tasks) % 7 if self.mose.active == 'open' else 'open'}"
        return self.clock(lambda: self.mose.set_task(name))

    @torch.no_grad()
    def forward(self):
        ids = self.ids(self.batch, self.length)
        with self.mose.disabled():
            return self.clock(lambda: self.model(input_ids=ids, use_cache=False))

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


def measure(pipes, rounds, warm, *request):
    """{system: median} of a request, taken in turns."""
    values = {name: [] for name in pipes}
    for i in range(warm + rounds):
        for name, pipe in pipes.items():
            pipe.send(request)
            values[name].append(pipe.recv())
    return {name: statistics.median(v[warm:]) for name, v in values.items()}


def rows(result, device):
    """The table: what, ours, theirs, ratio, target; for seconds unless the name says otherwise."""
    first, last, one, eight, x = SYSTEMS
    gpu = device == "cuda"
    train, memory = result["training step, s"], result["peak memory, bytes"]

    def ratio(what, a, b, target, up=False):
        a, b = (value / 2**20 if "memory" in what else value for value in (a, b))
        unit = "MiB" if "memory" in what else "bytes" if "bytes" in what else "ms"
        a, b = (value * 1e3 if unit == "ms" else value for value in (a, b))
        share = b / a if up else a / b
        met = share >= target if up else share <= target
        return (what, f"{a:,.1f} {unit}", f"{b:,.1f} {unit}", f"{share:.3f}",
                f"{'>=' if up else '<='} {target}", "yes" if met else "NO")

    table = [ratio("training step", train[first], train[one], 1.05 if gpu else 1.10),
             ratio("peak memory of training", memory[first], memory[one], 1.05 if gpu else 1.10)]
    for batch in (1, 8):
        decode = result[f"decode batch {batch}, s"]
        what = f"decode, batch {batch} (speed)"
        table.append(ratio(what, decode[first], decode[one], 0.95, True))
    mixed, switch = result["decode 8 tasks, s"], result["switch, s"][last]
    table.append(ratio("decode, 8 tasks in a batch (speed)", mixed[last], mixed[eight],
                       3 if gpu else 2, True))
    step = result["decode batch 1, s"][last] / TOKENS
    table.append(ratio("switch of task, against a decode step", switch, step, 1))
    decode = result["decode batch 1, s"]
    table += [ratio("X-LoRA: training step", train[first], train[x], 0.5),
              ratio("X-LoRA: decode (speed)", decode[first], decode[x], 4, True),
              ratio("100th task, 1st: training step", train[last], train[first], 1.05),
              ratio("100th task, 1st: decode (speed)", decode[last], decode[first], 0.95, True)]
    size = result["added by a task, bytes"]
    table.append(ratio("100th task, 1st: bytes added", size[last], size[first], 1))
    table.append(ratio("infer_task, against a forward pass", result["infer_task, s"][last],
                       result["forward, s"][last], 0.02))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SHAPES, default=best)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=3, help="rounds before, that do not count")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    spawn, pipes, jobs = multiprocessing.get_context("spawn"), {}, []
    for name in SYSTEMS:
        pipes[name], other = spawn.Pipe()
        jobs.append(spawn.Process(target=serve, args=(name, args.device, other), daemon=True))
        jobs[-1].start()
        other.close()  # so that the end of a process is the end of its pipe, and no endless wait
    first, last, one, eight, x = SYSTEMS
    plan = {
        "training step, s": ((first, last, one, x), "train"),
        "peak memory, bytes": ((first, last, one, x), "memory"),
        "finish": (SYSTEMS, "finish"),
        "decode batch 1, s": ((first, last, one, x), "decode", 1),
        "decode batch 8, s": ((first, last, one, x), "decode", 8),
        "decode 8 tasks, s": ((last, eight), "mixed"),
        "switch, s": ((last,), "switch"),
        "forward, s": ((last,), "forward"),
        "infer_task, s": ((last,), "infer"),
        "added by a task, bytes": ((first, last), "bytes"),
    }
    result = {}
    for what, (names, *request) in tqdm(plan.items(), "measure", ncols=100):
        once = request[0] in ("memory", "finish", "bytes")
        rounds, warm = (1, 0) if once else (args.rounds, args.warm)
        result[what] = measure({name: pipes[name] for name in names}, rounds, warm, *request)
    for pipe in pipes.values():
        pipe.send(None)
    table = [("", "ours", "theirs", "ratio", "target", "met"), *rows(result, args.device)]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {platform.machine()}"
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")}
    shape, dtype, batch = SHAPES[args.device]
    lines = [f"# Speed and memory against peft: {args.device}\n",
             f"`python benchmarks/bench_peft.py --device {args.device}`: {gpu}, "
             f"{torch.get_num_threads()} threads, seed 0, {versions}, medians of {args.rounds} in "
             f"turns. Random Llama {shape}, {dtype}, training batch {batch}; {EXPERTS} experts of "
             f"rank {RANK} on {', '.join(TARGETS)} against rank {EXPERTS * RANK}; {TOKENS} tokens "
             f"are generated after {PROMPT}, and their time is the time of all.\n"]
    text = [f"| {' | '.join(row)} |" for row in table]
    lines += [text[0], "|---" * len(table[0]) + "|", *text[1:]]
    (args.out / f"speed-{args.device}.md").write_text("\n".join(lines) + "\n")
    record = {"device": gpu, "versions": versions, "rounds": args.rounds, "medians": result,
              "table": table}
    (args.out / f"speed-{args.device}.json").write_text(json.dumps(record, indent=1) + "\n")
    widths = [max(map(len, column)) for column in zip(*table)]
    print("\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths)) for row in table))


if __name__ == "__main__":
    main()
