"""Full fine-tuning as a method: every parameter of the model is W + D, and D is trained.

With Adam, no weight decay and the same batches, training D from zero moves the weights as training
W itself does. Unlike there, what is saved is the change, and weight decay pulls towards the start.
"""

from __future__ import annotations

from mace_lora.adapters.full_update import FullUpdate


class Full(FullUpdate):
    """W + D for all that mace-torch's own full fine-tuning trains: biases and norms as well.

    It leaves the frequencies of the Bessel basis alone, and so does "default"; "all" has them too.
    """

    default_kinds = ("linear", "dense", "radial", "skip", "contraction", "other")
    kinds = (*default_kinds, "basis")

    def notes(self) -> str:
        return ""  # it holds for every layer
