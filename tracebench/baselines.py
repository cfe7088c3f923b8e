"""What MoSEs is compared with: one LoRA, one LoRA for each task, and a mixture with one router.

Each of these classes has the verbs of MoSE that the loop of train_trace.py calls, so that all
methods go through the same loop. What a baseline has no use for does nothing: a LoRA has no key to
observe, and it never starts from the best of several finished tasks.

    LoRA         y = x W + scale * x A B. The next task goes on from what the last one left.
    LoRAPerTask  the same, but every task has a LoRA of its own.
    MoELoRA      several LoRAs and a router that sends each token to some of them, for all tasks.
    FixedRouter  MoSEs whose routers stay as they were drawn.
"""

import io
import lzma
import math
from pathlib import Path

import torch
from torch import nn

from mose import (
    MoSE, compressed, decompressed, device_of, find_targets, fixed_signs, in_out, top_k_gates)
from tracebench.files import write_bytes

ROUTER_DIM = 16  # numbers that the router of MoELoRA reads of a token, as many as in MoSEs


class LoRALayer(nn.Module):
    """The LoRA of one linear layer, in fp32."""

    def __init__(self, inputs, outputs, rank, scale):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(inputs, rank))
        self.B = nn.Parameter(torch.zeros(rank, outputs))
        self.scale = scale
        self.switched_on = False

    @torch.no_grad()
    def reset(self):
        """Start anew: since B is 0, the layer computes what it did without a LoRA."""
        bound = 1 / math.sqrt(len(self.A))
        self.A.uniform_(-bound, bound)
        self.B.zero_()

    def forward(self, x):  # (B, T, D) -> (B, T, O)
        return self.scale * (x @ self.A @ self.B)

    def add_delta(self, layer, inputs, out):
        """Forward hook of the linear layer: add what the LoRA computes from the same input."""
        if not self.switched_on:
            return out
        # The LoRA stays in fp32, even where the base is in bf16 or autocast is on.
        with torch.autocast(out.device.type, enabled=False):
            return out + self(inputs[0].float()).to(out.dtype)


class MoELayer(LoRALayer):
    """Several LoRAs on one linear layer, side by side in A and B, and the router over them."""

    def __init__(self, inputs, outputs, rank, scale, experts, top_k, router_std):
        super().__init__(inputs, outputs, experts * rank, scale)
        self.rank, self.top_k, self.router_std = rank, top_k, router_std
        self.router = nn.Parameter(torch.zeros(experts, ROUTER_DIM))
        # The router reads a token through a fixed projection, just as the routers of MoSEs do.
        projection = fixed_signs(inputs, ROUTER_DIM) / math.sqrt(inputs)
        self.register_buffer("projection", projection, persistent=False)

    @torch.no_grad()
    def reset(self):
        super().reset()
        self.router.normal_(0, self.router_std)

    def forward(self, x):
        gates = top_k_gates(x @ self.projection @ self.router.mT, self.top_k)  # (B, T, E)
        gates = gates.repeat_interleave(self.rank, dim=-1)  # (B, T, E*R), one for each column of A
        return self.scale * ((x @ self.A * gates) @ self.B)


class LoRA:
    """One LoRA on every target layer, trained on one task after the other.

    tasks: {name: None} of the finished tasks, in the order of learning.
    """

    layer_class = LoRALayer

    def __init__(self, model, targets, **config):
        """Attach to `model` and freeze it. config: what layer_class is made with."""
        self.model, self.targets, self.config = model, targets, config
        self.tasks, self.open = {}, None
        self.trainable_before = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self.layers, self.handles = [], []
        for layer in find_targets(model, targets):
            own = self.layer_class(*in_out(layer), **config)
            self.layers.append(own.to(device_of(layer)))
            self.handles.append(layer.register_forward_hook(self.layers[-1].add_delta))

    def detach(self):
        """Take everything off again."""
        for handle in self.handles:
            handle.remove()
        for parameter in self.trainable_before:
            parameter.requires_grad_(True)

    # ---- the life of a task

    def best_source(self, probe, guess=math.inf):
        """A LoRA has no choice what it starts from."""
        return None, 1.0

    def begin_task(self, name, source=None, need=1.0):
        if not self.tasks:
            self.reset()
        self.open = name
        self.set_task(name)

    def reset(self):
        for layer in self.layers:
            layer.reset()

    def observe(self, input_ids, attention_mask=None):
        """A LoRA makes no key of the prompts, since it can't tell tasks apart."""

    def trainable_parameters(self):
        return [p for layer in self.layers for p in layer.parameters()]

    def end_task(self):
        """Returns how many numbers are new, and the share of all that is in use: always all."""
        new = 0 if self.tasks else sum(p.numel() for p in self.trainable_parameters())
        self.tasks[self.open] = None
        self.open = None
        return {"new": new, "share": 1.0}

    def set_task(self, name):
        """The same weights serve every task; None is the bare base."""
        for layer in self.layers:
            layer.switched_on = name is not None

    # ---- its file

    def get_weights(self):
        """All that is learned, in a list of tensors on the CPU."""
        return [p.detach().cpu().clone() for p in self.trainable_parameters()]

    @torch.no_grad()
    def set_weights(self, weights):
        """The inverse of `get_weights`."""
        for parameter, values in zip(self.trainable_parameters(), weights, strict=True):
            parameter.copy_(values)

    def pack(self, weights):
        """A list of tensors as few bytes, by the code that MoSEs use for the values of a task."""
        return compressed(torch.cat([values.flatten() for values in weights]))

    def unpack(self, packed):
        """The inverse of `pack`."""
        like = self.trainable_parameters()
        numbers = decompressed(packed, torch.float32).split([p.numel() for p in like])
        return [values.view(p.shape) for values, p in zip(numbers, like)]

    def content(self):
        """What the file holds: the weights stand there once, whatever the number of tasks."""
        return {"tasks": [*self.tasks], "weights": self.pack(self.get_weights())}

    def restore(self, tasks, weights):
        """The inverse of `content`."""
        self.tasks = dict.fromkeys(tasks)
        self.set_weights(self.unpack(weights))

    def save(self, path):
        """Write one compressed file of fp32 numbers, as MoSE does, so that sizes compare."""
        buffer = io.BytesIO()
        torch.save({"targets": self.targets, "config": self.config, **self.content()}, buffer)
        write_bytes(Path(path), lzma.compress(buffer.getvalue()))

    @classmethod
    def load(cls, model, path):
        """Attach to `model` what `save` wrote."""
        data = Path(path).read_bytes()
        try:
            content = torch.load(io.BytesIO(lzma.decompress(data)), weights_only=True)
        except Exception as error:  # torch.load raises errors of any kind for what it did not write
            raise ValueError(f"{path}: damaged, or no adapter: {error}. Learn its tasks again, with "
                             "another --name") from error
        adapter = cls(model, content.pop("targets"), **content.pop("config"))
        adapter.restore(**content)
        return adapter


class LoRAPerTask(LoRA):
    """A LoRA of its own for each task, so nothing is forgotten, and nothing is shared.

    tasks: {name: weights of its LoRA} of the finished tasks, in the order of learning.
    packed: {name: the same as few bytes} of those that were in a file.
    """

    def __init__(self, model, targets, **config):
        super().__init__(model, targets, **config)
        self.packed = {}

    def begin_task(self, name, source=None, need=1.0):
        self.reset()
        self.open = name
        self.set_task(name)

    def end_task(self):
        name, self.open = self.open, None
        self.tasks[name] = self.get_weights()
        return {"new": sum(values.numel() for values in self.tasks[name]), "share": 1.0}

    def set_task(self, name):
        if name is not None and name != self.open:
            self.set_weights(self.tasks[name])
        super().set_task(name)

    def content(self):
        for name, weights in self.tasks.items():
            if name not in self.packed:  # packing takes a while, and finished tasks never change
                self.packed[name] = self.pack(weights)
        return {"tasks": self.packed}

    def restore(self, tasks):
        self.packed = tasks
        self.tasks = {name: self.unpack(packed) for name, packed in tasks.items()}


class MoELoRA(LoRA):
    """A mixture of LoRAs with one router for all tasks. Nothing is masked or protected, so each
    task overwrites what the last one left, in the router as well."""

    layer_class = MoELayer


class FixedRouter(MoSE):
    """MoSEs whose routers stay as they were drawn."""

    def trainable_parameters(self):
        routers = {id(layer.router) for layer in self.layers}
        return [p for p in super().trainable_parameters() if id(p) not in routers]
