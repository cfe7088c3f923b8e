"""SHiRA and VeRA of peft, one for each task, with the verbs that the loop of train_trace.py calls.

A user who wants few bytes for a task could take these instead of a small LoRA. peft draws their
fixed parts (the places of SHiRA's entries, VeRA's two matrices) from a seed, so that only what was
trained has to be stored, and only that is counted.
"""

import warnings

from tracebench.baselines import LoRAPerTask

SEED = 0  # of the fixed parts: that of the run


class PeftPerTask(LoRAPerTask):
    """An adapter of peft for each task. tasks: {name: its trained values}."""

    def __init__(self, model, targets, rank, scale):
        """rank: see the subclasses. scale: not used; theirs are peft's own."""
        import peft
        self.model, self.targets, self.config = model, targets, {"rank": rank, "scale": scale}
        self.tasks, self.packed, self.open = {}, {}, None
        self.trainable_before = [p for p in model.parameters() if p.requires_grad]
        with warnings.catch_warnings(action="ignore"):  # that the fixed parts are not saved
            self.peft = peft.get_peft_model(model, self.peft_config(peft, targets, rank))
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
    """Entries of the weights at random places: as many as a LoRA of this rank has."""

    def peft_config(self, peft, targets, rank):
        return peft.ShiraConfig(r=rank, target_modules=[*targets], random_seed=SEED)


class VeRA(PeftPerTask):
    """Fixed random matrices of this rank, the same for all layers, and two trained vectors."""

    def peft_config(self, peft, targets, rank):
        return peft.VeraConfig(r=rank, target_modules=[*targets], save_projection=False,
                               projection_prng_key=SEED)
