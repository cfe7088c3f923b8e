"""The methods that train_trace.py compares: what each attaches to the base, what it learns in each
lesson, and what is tested after it."""

import dataclasses
import math
import random

from mose import MoSE, MoSEConfig, find_targets
from tracebench.baselines import FixedRouter, LoRA, LoRAPerTask, MoELoRA
from tracebench.data import listed

# The class of each method that learns. replay and joint are a LoRA that is trained on other data. (A
# new method also needs a name in STYLES of figures/report.py and in METHODS of figures/page.py.)
KINDS = {"lora": LoRA, "replay": LoRA, "joint": LoRA, "task_lora": LoRAPerTask,
         "moe_lora": MoELoRA, "mose": MoSE, "mose_fixed": FixedRouter}
METHODS = ("floor", "base", *KINDS)
OURS = ("mose", "mose_fixed")
# In these methods a task goes on from what the last one left, so the score of a task before it is
# learned is of interest: it gives forward transfer (FWT).
IN_SEQUENCE = ("lora", "replay", "moe_lora")


def attach(method, args, model, file=None):
    """The adapter of a method on `model`: as it lies in a file, or a new one."""
    if file:
        return KINDS[method].load(model, file)
    if method in OURS:
        return KINDS[method](model, config_of(args))
    targets = tuple(listed(args.targets))
    if method == "moe_lora":  # its experts have as many columns together as the one LoRA
        rank, rest = divmod(args.lora_rank, args.experts)
        if rest:
            raise ValueError(f"moe_lora: --experts {args.experts} can't share --lora_rank "
                             f"{args.lora_rank}: expected it to be a multiple of --experts")
        return MoELoRA(model, targets, rank=rank, scale=args.lora_scale, experts=args.experts,
                       top_k=args.top_k, router_std=args.router_std)
    return KINDS[method](model, targets, rank=args.lora_rank, scale=args.lora_scale)


# The default rate of MoSEs is this, divided by the root of the base's width: 1.9e-2 for tiny-llm (128
# wide), 9e-3 for SmolLM2-135M (576) and 3.4e-3 for a base of 4096. On tiny-llm 1e-2 and 2e-2 are
# about equal and 4e-2 is too high. On SmolLM2, 1e-2 is better than 2e-2 on `test`, and 2e-2 on
# `eval`; 4e-3 is too low. That the rate falls with the root is theory about a LoRA whose B starts at 0
# (arXiv 2406.08447). These two bases do not show it.
RATE_TIMES_ROOT_OF_WIDTH = 0.22

# The default rates of LoRAs, on tiny-llm. A LoRA that is trained in sequence needs a lower one: on
# `eval`, replay has 51.0 with 5e-3 and 39.0 with 1e-2 (seed 0).
RATE_OF_TASK_LORA = 1e-2
RATE_OF_OTHER_LORAS = 5e-3


def rate(method, args, model):
    """The learning rate of a method: that of the options, or its default."""
    if method in OURS:
        width = model.config.get_text_config().hidden_size
        return args.lr or RATE_TIMES_ROOT_OF_WIDTH / math.sqrt(width)
    default = RATE_OF_TASK_LORA if method == "task_lora" else RATE_OF_OTHER_LORAS
    return args.lora_lr or default


def config_of(args):
    """The MoSEConfig that the options ask for. Raises ValueError for one that is out of range."""
    return MoSEConfig(
        tuple(listed(args.targets)), num_experts=args.experts, rank=args.rank, top_k=args.top_k,
        density=args.density, fixed_A=args.fixed_A, scale=args.scale, router_std=args.router_std,
        round_to_bf16=args.round_to_bf16)


def check_targets(model, args):
    """Raise ValueError if targets lie outside of the language model, as in the image encoder of a
    multimodal one: the experts there would learn nothing, and be stored with each task."""
    decoder = model.get_decoder()
    if decoder is None:  # transformers 4 does not know it for all models
        return
    inside = {*decoder.modules(), model.get_output_embeddings()}
    targets = find_targets(model, listed(args.targets))
    outside = [path for path, module in model.named_modules()
               if module in targets and module not in inside]
    if outside:
        raise ValueError(f"--targets {args.targets}: {len(outside)} of these layers are outside of the "
                         f"language model, such as {outside[0]}: name those inside by their paths, or "
                         "take a model of text alone")


def check_density(adapter, num_tasks):
    """Raise ValueError if the density of MoSEs leaves no entry of B for the last task."""
    density = adapter.config.density
    largest = max(math.prod(layer.shape_B) for layer in adapter.layers)
    # Each task takes this share of what the tasks before it have left.
    left = largest * (1 - density)**(num_tasks - 1)
    if density * left < 1:
        raise ValueError(f"--density {density}: the tasks before the last of {num_tasks} leave no entry "
                         "for it: expected less")


def lessons(method, args, tasks):
    """What a method learns, one Task after the other: nothing, for those that only are tested."""
    if method not in KINDS:
        return []
    if method == "joint":  # all at once; each example as often as in its own task's epochs
        rows = [row for task in tasks for row in task.train * task.epochs]
        return [dataclasses.replace(tasks[0], name="joint", train=rows, epochs=1)]
    if method != "replay":
        return tasks
    plan, rng = [], random.Random(args.seeds)
    for t, task in enumerate(tasks):
        rows = [*task.train]
        for earlier in tasks[:t]:
            count = math.ceil(round(args.replay * len(earlier.train), 6))  # 0.07 * 100 is 7.000..1
            rows += rng.sample(earlier.train, count)
        plan.append(dataclasses.replace(task, train=rows))
    return plan


def tasks_to_test(method, args, tasks, t):
    """The tasks that are tested after lesson t.

    With --test all these are the tasks that were seen so far. Methods that go on from task to task
    (lora, replay, moe_lora) are then tested on the next one too, for forward transfer. With --test
    ends it is only the new task, and after the last lesson all of them.
    """
    if method == "joint" or t == len(tasks) - 1:
        return tasks
    if args.test == "ends":
        return tasks[t:t + 1]
    return tasks[:t + 2] if method in IN_SEQUENCE else tasks[:t + 1]
