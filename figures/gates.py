"""What happens inside an adapter: who took which entry of a pool, and the gates of each token."""

import torch

from mose import this_thread


def owners(pool):
    """(N,): for each entry of a pool the number of the task that took it, from 1 on; 0 is free."""
    owner = torch.zeros(len(pool.used), dtype=torch.uint8)
    for i, (mask, _) in enumerate(pool.tasks.values(), 1):
        owner[mask & (owner == 0)] = i
    return owner


def last_gates(adapter):
    """The gates (B, T, E) of each layer in the last forward pass, under one task for all."""
    config = adapter.config
    notes = [layer.now[this_thread()] for layer in adapter.layers]
    return [gates[..., ::config.rank] / config.scale  # noted once for each rank, and scaled
            for (_, gates, _), in notes]


@torch.no_grad()
def gates_of_prompt(adapter, tokenizer, task, ids):
    """The tokens of a prompt as texts, and the gates (T, E) of each layer."""
    with adapter.task(task):
        adapter.model.base_model(torch.tensor([ids], device=adapter.model.device))
    return [tokenizer.decode([i]) for i in ids], [gates[0].cpu() for gates in last_gates(adapter)]
