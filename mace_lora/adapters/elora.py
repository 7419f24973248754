"""ELoRA: a low-rank update for every path of a layer, W -> W + (alpha / r) A B.

Wang et al., "ELoRA: Low-Rank Adaptation for Equivariant GNNs", ICML 2025. Each path (input irrep to
output irrep) of a linear layer or a tensor product has its own A: (mul_in, r) and B: (r, mul_out);
radial networks have one pair per layer, symmetric contractions one per output irrep for the weight
of the highest order. The update is added before the layer's own normalisation.

As in the published implementation, the lower-order contraction weights and the Bessel frequencies
are trained in full. There the frequencies are in no optimiser group and never move; here they do.
"""

from __future__ import annotations

from mace_lora.adapters.base import AnyAdapter
from mace_lora.adapters.full_update import FullUpdate
from mace_lora.adapters.layout import Site
from mace_lora.adapters.low_rank import PathUpdate
from mace_lora.adapters.options import EloraOptions


class Elora(PathUpdate[EloraOptions]):
    """A and B per path of one weight."""

    kinds = ("linear", "dense", "radial", "skip", "contraction", "basis")
    default_kinds = kinds

    @classmethod
    def make(cls, site: Site, options: EloraOptions) -> AnyAdapter:
        """Low rank for the large weights, in full for the small ones."""
        if site.layout.small:
            return FullUpdate(site.layout, options)
        return cls(site.layout, options, options.cap, options.simplify)
