"""What several processes of one run (torchrun) share. With one process, all of it does nothing."""

import os
import sys

import torch

# Set by torchrun; without it there is one process, and no process group.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the group, each process with its own GPU if there are some; only the first prints."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if WORLD > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def share(rows):
    """This process's part of a list."""
    return [*rows][RANK::WORLD]


def total(*tensors):
    """Sum each tensor over all processes, in place."""
    for x in tensors if WORLD > 1 else ():
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
