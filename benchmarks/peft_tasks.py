"""SHiRA, VeRA and LoRAs with a frozen A, of peft, with the verbs that train_trace.py's loop calls.

A user who wants few bytes for a task could take one of these for each task, instead of a small LoRA.
Their fixed parts (the places of SHiRA's entries, VeRA's two matrices, the A of a LoRA) are drawn
from a seed and are the same for all tasks. So only what was trained has to be stored, and only that
is counted.
"""

import warnings

import torch

from tracebench.baselines import LoRAPerTask

SEED = 0  # of the fixed parts: that of the run


class PeftPerTask(LoRAPerTask):
    """An adapter of peft for each task. tasks: {name: its trained values}."""

    def __init__(self, model, targets, rank, scale):
        """rank, scale: see the subclasses."""
        import peft
        self.model, self.targets, self.config = model, targets, {"rank": rank, "scale": scale}
        self.tasks, self.packed, self.open = {}, {}, None
        self.trainable_before = [p for p in model.parameters() if p.requires_grad]
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
            # (The warnings say that the fixed parts are not saved.)
            torch.manual_seed(SEED)
            self.peft = peft.get_peft_model(model, self.peft_config(peft, targets, rank))
        for name, parameter in self.peft.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        self.parameters = [p for p in self.peft.parameters() if p.requires_grad]
        self.start = self.get_weights()

    def detach(self):
        self.peft.unload()
        for parameter in self.trainable_before:
            parameter.requires_grad_(True)

    def reset(self):
        self.set_weights(self.start)

    def trainable_parameters(self):
        return self.parameters

    def set_task(self, name):
        if name is None:
            self.peft.base_model.disable_adapter_layers()
            return
        self.peft.base_model.enable_adapter_layers()
        if name != self.open:
            self.set_weights(self.tasks[name])


class SHiRA(PeftPerTask):
    """Entries of the weights at random places: as many as a LoRA of this rank has. No scale."""

    def peft_config(self, peft, targets, rank):
        return peft.ShiraConfig(r=rank, target_modules=[*targets], random_seed=SEED)


class VeRA(PeftPerTask):
    """Fixed random matrices of this rank, the same for all layers, and two trained vectors.

    The scale is peft's own.
    """

    def peft_config(self, peft, targets, rank):
        return peft.VeraConfig(r=rank, target_modules=[*targets], save_projection=False,
                               projection_prng_key=SEED)


class FrozenA(PeftPerTask):
    """A LoRA of this rank and scale (alpha / rank) whose A is never trained, as in LoRA-FA (arXiv
    2308.03303). peft draws its A as it does for any LoRA."""

    def peft_config(self, peft, targets, rank):
        return peft.LoraConfig(r=rank, lora_alpha=self.config["scale"] * rank,
                               target_modules=[*targets])
