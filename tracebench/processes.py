"""What several processes of one run (torchrun) share. With one process, all of it does nothing."""

import os
import sys

import torch

# Set by torchrun; without it there is one process, and no process group.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Whether the base lies in shards. Then all processes make every pass together, each with rows of its
# own: whoever makes fewer of them leaves the others waiting for ever.
SHARDED = False


def start(device):
    """Join the group, each process with its own GPU if there are some; only the first prints. Raises
    ValueError for a device on which several processes can't exchange anything."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if WORLD > 1:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"{WORLD} processes were started, and they can work together on cpu and "
                             f"cuda only, got {device}: add --device cpu, or start one process")
        if device == "cuda":
            own, count = int(os.environ.get("LOCAL_RANK", -1)), torch.cuda.device_count()
            if not 0 <= own < count:
                raise ValueError(f"this process has the number {own} on this machine, where torch sees "
                                 f"{count} GPUs: start it by torchrun --nproc-per-node {count}")
            torch.cuda.set_device(own)
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def shards():
    """Options of from_pretrained(), by which each process loads its own part of each weight only. A
    single process needs none. Sets SHARDED if there are several. Raises ValueError for an old
    transformers."""
    global SHARDED
    if WORLD == 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig
        options = {"distributed_config": DistributedConfig(fsdp_size=WORLD)}
    except (ImportError, TypeError):
        raise ValueError("--shard needs a transformers that shards a base while it loads it: "
                         "pip install \"transformers>=5.24\"") from None
    SHARDED = True
    return options


def own_passes(rows, split, idle):
    """The passes that split() makes of this process's share of some rows. With a sharded base, every
    process gets the same number of passes: where it has fewer of its own, `idle` ones fill up."""
    if not SHARDED:
        return split(rows[RANK::WORLD])
    # Each process makes the plans of all, so it knows the largest number of passes without asking.
    plans = [[*split(rows[rank::WORLD])] for rank in range(WORLD)]
    own, most_passes = plans[RANK], max(map(len, plans))
    return own + [idle] * (most_passes - len(own))


def add_up(*tensors):
    """Replace each tensor by its sum over all processes."""
    if WORLD == 1:
        return
    for x in tensors:
        torch.distributed.all_reduce(x)


def union(part):
    """The union of every process's dict."""
    parts = [part] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


def wait():
    """Until every process is here: nobody reads a file before it is written."""
    if WORLD > 1:
        torch.distributed.barrier()
