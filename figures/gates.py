"""What happens inside an adapter: who took which entry of a pool, and the gates of each token."""

import re

import torch

from mose import top_k_gates


def layer_names(adapter):
    """A short name for each layer that has experts: "layer 3, v_proj"."""
    paths = {module: path.removesuffix(".sub_experts")
             for path, module in adapter.model.named_modules()}
    names = []
    for layer in adapter.layers:
        path = paths[layer]
        number = re.search(r"\.(\d+)\.", path)
        last = path.rpartition(".")[2]
        names.append(f"layer {number[1]}, {last}" if number else path)
    return names


def owners(adapter, layer):
    """(N,): for each entry of a layer's pool the task that owns it, from 1 on; 0 if it is free."""
    owner = torch.zeros(len(layer.owner), dtype=torch.uint8)
    for i, lineage in enumerate(adapter.tasks.values(), 1):
        owner[(layer.owner == lineage[0]).cpu()] = i
    return owner


@torch.no_grad()
def gates_of(adapter, task, input_ids, attention_mask=None):
    """The gates (B, T, E) of each layer, for tokens (B, T) under one finished task."""
    found = {}
    number, *_ = adapter.tasks[task]

    def note(layer, inputs, out):
        experts = layer.sub_experts
        router = experts.routers[number].to(inputs[0].device)
        logits = inputs[0].float() @ experts.projection @ router.T  # (B, T, E)
        found[experts] = top_k_gates(logits, adapter.config.top_k)

    targets = [module for module in adapter.model.modules()
               if getattr(module, "sub_experts", None) in adapter.layers]
    hooks = [target.register_forward_hook(note) for target in targets]
    with adapter.task(task):
        adapter.model.base_model(input_ids=input_ids, attention_mask=attention_mask)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in adapter.layers]


def gates_of_prompt(adapter, tokenizer, task, ids):
    """The tokens of a prompt as texts, and the gates (T, E) of each layer under a task."""
    gates = gates_of(adapter, task, torch.tensor([ids], device=adapter.model.device))
    return [tokenizer.decode([i]) for i in ids], [layer[0].cpu() for layer in gates]
