"""The command line of train_trace.py: every option with its default, and the presets."""

import dataclasses
import math
from pathlib import Path

import torch
import transformers

from mose import MoSEConfig
from tracebench import processes
from tracebench.data import epochs_of, listed, metrics_of
from tracebench.methods import KINDS, METHODS, OURS, config_of
from tracebench.model import TOKENS_FACTOR_OF_DECODING, TOKENS_FACTOR_WITHOUT_GRADIENTS
from tracebench.runs import ROOT, notes_of
from tracebench.scores import SCORES, TASKS

# A preset is a set of other defaults. The data of `gpu` is a public copy of TRACE-0.5K. It belongs
# to zjwang21 and is not part of this project.
PRESETS = {"": {}, "gpu": {
    "name": "gpu", "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "epochs": "trace", "test": "ends",
    "lora_lr": 3e-3, "tokens": 16384,
    "data": "https://raw.githubusercontent.com/zjwang21/TRACE/"
    "cb1bfea893e6181801b1e663ec659316533c1e21/TRACE-Benchmark/LLM-CL-Benchmark_500"}}


def option(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Args:
    """Every field is an option of the command line, and is noted in the result file."""

    preset: str = option("", "gpu: other defaults, for TRACE-0.5K on a GPU", tuple(PRESETS))
    model: str = option(str(ROOT / "assets/tiny-llm"), "hub id or folder of a causal LM")
    data: str = option(str(ROOT / "assets/trace-mini"), "folder or URL with TASK/{train,test}.json")
    tasks: str = option(",".join(TASKS), "the tasks, in the order of learning")
    metric: str = option("", "metrics of tasks that are not TRACE's, as TASK=METRIC,..: "
                         + ", ".join(SCORES))
    methods: str = option("lora,replay,task_lora,mose", "some of "
                          + ", ".join(METHODS))
    name: str = option("default", "results go to runs/NAME")
    force: bool = option(False, "delete the results of an earlier run of that name")
    seeds: str = option("0", "seeds of what is drawn and of the order of the data; 0,1,2 makes "
                        "the runs NAME-0 to NAME-2")
    epochs: str = option("4", "epochs of each task: a number, a list (5,3,..), trace for TRACE's "
                         "own, or short (2,1,3,2,1,2,2,3)")
    lr: float = option(0.0, "learning rate of mose and mose_fixed (0: 0.22 / root of the base's width)")
    lora_lr: float = option(0.0, "learning rate of all other methods (0: 1e-2 for task_lora, 5e-3 for "
                            "the others)")
    batch: int = option(16, "examples of one step")
    tokens: int = option(1536, "tokens of one training pass at most, with padding: a larger batch "
                         "takes several passes, whose gradients add up (passes of probes may have "
                         f"{TOKENS_FACTOR_WITHOUT_GRADIENTS} times as many, and those of decoding "
                         f"{TOKENS_FACTOR_OF_DECODING} times)")
    max_prompt: int = option(1024, "of a longer prompt, only so many tokens are read, the last ones")
    max_train: int = option(0, "train on a random sample of so many examples a task (0: all); "
                            "keys see all prompts")
    max_test: int = option(0, "score a random sample of so many examples a task (0: all)")
    test: str = option("all", "ends: each task when it is learned, and all at the end; all: every "
                       "seen task after each task (and with lora, replay and moe_lora the next one)",
                       ("all", "ends"))
    split: str = option("test", "what is scored: test, or eval to choose settings", ("test", "eval"))
    targets: str = option("q_proj,v_proj", "linear layers that get experts")
    experts: int = option(MoSEConfig.num_experts, "experts of mose, mose_fixed and moe_lora")
    rank: int = option(MoSEConfig.rank, "rank of each expert of mose and mose_fixed")
    top_k: int = option(MoSEConfig.top_k, "experts that a token is sent to, of mose, "
                        "mose_fixed and moe_lora")
    router_std: float = option(MoSEConfig.router_std, "spread of new routers, of mose, mose_fixed "
                               "and moe_lora")
    density: float = option(MoSEConfig.density, "share of the free entries that a task of mose "
                            "or mose_fixed takes")
    fixed_A: bool = option(MoSEConfig.fixed_A, "the matrices A of mose and mose_fixed are random and "
                           "fixed: only B is learned")
    scale: float = option(MoSEConfig.scale, "factor of the experts' sum, of mose and mose_fixed")
    round_to_bf16: bool = option(MoSEConfig.round_to_bf16, "round what a task of mose or mose_fixed "
                                 "has learned, for a smaller file")
    lora_rank: int = option(8, "rank of a LoRA; the experts of moe_lora share it")
    lora_scale: float = option(4.0, "scale of a LoRA and of moe_lora, alpha / rank")
    replay: float = option(0.05, "share of the examples of each earlier task that replay mixes into "
                           "a task")
    resume: str = option("", "go on with an interrupted run: its folder, and no other option but "
                         "--tokens and --checkpointing")
    device: str = option("auto", "where it runs", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "dtype of the base; auto: bfloat16 on a GPU that has it, else "
                        "float32", ("auto", "bfloat16", "float32"))
    device_map: str = option("", "auto spreads a large base over several GPUs (needs accelerate)")
    shard: bool = option(False, "each process keeps its part of the base only (torchrun, FSDP2)")
    checkpointing: bool = option(False, "recompute activations in backward, to save memory")
    ask: list[str] = dataclasses.field(default_factory=list, metadata={
        "metavar": ("FILE", "PROMPT"), "help": "only answer a prompt, with an adapter of mose"})


# These decide how much memory a run takes, and not what it computes (up to rounding, and up to the
# masks that a base with dropout draws). So a run that ran out of memory may go on with others.
OF_MEMORY = ("tokens", "checkpointing")

# {option: the methods that read it}
READ_BY = {
    **dict.fromkeys(("lr", "rank", "density", "fixed_A", "scale", "round_to_bf16"), OURS),
    **dict.fromkeys(("experts", "top_k", "router_std"), ("moe_lora", *OURS)),
    **dict.fromkeys(("lora_lr", "lora_rank", "lora_scale"),
                    [method for method in KINDS if method not in OURS]),
    "replay": ("replay",),
}

LOWEST = {"batch": 1, "tokens": 1, "max_prompt": 2, "max_train": 0, "max_test": 0,
          "experts": 1, "rank": 1, "top_k": 1, "lora_rank": 1}


def parse(argv=None):
    """Args from the command line. Exits with a message on a wrong one."""
    parser = transformers.HfArgumentParser(
        Args, description="Learn the tasks of TRACE in a row, and test every seen task after each.")
    # The preset is read first, since it sets the defaults of all other options.
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = Args(**vars(parser.parse_args(argv)))
    try:
        if args.resume:
            # Without defaults, only what was typed has a value.
            parser.set_defaults(**dict.fromkeys(vars(args)))
            typed = vars(parser.parse_args(argv))
            return interrupted({name: value for name, value in typed.items() if value is not None})
        check(args)
    except ValueError as error:
        parser.error(str(error))
    if processes.RANK == 0:
        warn_of_unread(args)
    for name in ("model", "data"):  # --resume may be called from another folder
        if Path(getattr(args, name)).exists():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    return args


def check(args):
    """Raises ValueError for a value that is out of range."""
    seeds, methods = listed(args.seeds), listed(args.methods)
    if not all(seed.isdecimal() for seed in seeds) or len({*map(int, seeds)}) < len(seeds):
        raise ValueError(
            f"--seeds: got {args.seeds!r}, expected whole numbers, each once: 0 or 0,1,2")
    if max(map(int, seeds)) >= 10**15:  # torch takes 64 bits, and a thousand seeds are made of each
        raise ValueError(f"--seeds: got {args.seeds}, expected numbers below 10**15")
    if not args.name:
        raise ValueError("--name: got an empty name, expected that of a folder in runs/")
    if not {*methods} <= {*METHODS} or len({*methods}) < len(methods):
        raise ValueError(
            f"--methods: got {args.methods!r}, expected each once, of {', '.join(METHODS)}")
    names = listed(args.tasks)
    metrics_of(args.metric, names)
    epochs_of(args.epochs, names)
    for name, least in LOWEST.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name}: got {getattr(args, name)}, expected at least {least}")
    if args.top_k > args.experts:
        raise ValueError(f"--top_k: got {args.top_k}, expected at most --experts {args.experts}: "
                         f"give --top_k {args.experts} too")
    if {*methods} & {*OURS}:
        config_of(args)
    if not 0 <= args.lr < math.inf:
        raise ValueError(f"--lr: got {args.lr}, expected a rate above 0, or 0 for the default")
    if not 0 <= args.lora_lr < math.inf:
        raise ValueError(f"--lora_lr: got {args.lora_lr}, expected a rate above 0, or 0 for the "
                         "defaults")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch sees no GPU: leave it out, or take cpu (or "
                         "resume on a machine with a GPU)")
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device: got mps, but torch sees no GPU of Apple: leave it out")
    if not 0 < args.lora_scale < math.inf:
        raise ValueError(f"--lora_scale: got {args.lora_scale}, expected a scale above 0")
    if not 0 < args.router_std < math.inf:
        raise ValueError(f"--router_std: got {args.router_std}, expected a deviation above 0")
    if not 0 <= args.replay <= 1:
        raise ValueError(f"--replay: got {args.replay}, expected a share of 0 .. 1")
    if args.shard and args.device_map:
        raise ValueError("--shard and --device_map: expected one of them, since --shard spreads each "
                         "layer over all processes, and --device_map whole layers over one's GPUs")
    if args.device_map and args.device != "auto":
        raise ValueError("--device_map chooses the devices itself: leave --device out")
    if args.device_map and processes.WORLD > 1:
        advice = "" if args.resume else ", or take --shard"
        raise ValueError("--device_map spreads a base over the GPUs of one process, and torchrun has "
                         f"started several: start one{advice}")
    if args.ask and processes.WORLD > 1:
        raise ValueError("--ask answers in one process: start it by python, and without --shard")
    if args.shard and processes.WORLD == 1:
        rest = f"--resume {args.resume}" if args.resume else "--shard .."
        raise ValueError("--shard: there is one process, so nothing to shard over: start it by python "
                         f"-m torch.distributed.run --nproc-per-node 2 train_trace.py {rest}")
    if len(args.ask) not in (0, 2):
        raise ValueError(f"--ask: got {len(args.ask)} values, expected FILE and \"PROMPT\"")


def warn_of_unread(args):
    """Print which options differ from their defaults though no method of this run reads them."""
    defaults = Args(**PRESETS[args.preset])
    for name, methods in READ_BY.items():
        if getattr(args, name) != getattr(defaults, name):
            if not {*methods} & {*listed(args.methods)}:
                print(f"warning: --{name} has no effect here: only {', '.join(methods)} read it")


def interrupted(typed):
    """The Args that are noted for the run of --resume, with those of `typed` that may change.

    typed: {option: value} of what stands on the command line. Raises ValueError if the run can't go
    on.
    """
    file = Path(typed["resume"]) / "args.json"
    others = [name for name in typed if name not in ("resume", *OF_MEMORY)]
    if others:
        raise ValueError("--resume: the run goes on with the options that it began with, and only "
                         "--tokens and --checkpointing may be others: leave out --"
                         + ", --".join(others))
    if not file.exists():
        raise ValueError(
            f"--resume: there is no {file}, so no run to go on with (each of several seeds is a "
            "run of its own: NAME-0, NAME-1, ..)")
    began = notes_of(file.parent).get("options", {})
    if not began:
        raise ValueError(f"--resume: {file} is damaged, or not of train_trace.py: start again")
    other = sorted(began.keys() ^ {field.name for field in dataclasses.fields(Args)})
    if other:
        raise ValueError(f"--resume: {file} was written by another version of train_trace.py, which "
                         f"has other options: {', '.join(other)}. Resume with that one, or start again")
    began = Args(**began | typed)
    check(began)
    return began
