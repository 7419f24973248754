"""What every adapter is: a change of one weight by a few trainable factors, W -> f(W, factors).

A `WeightAdapter` is a parametrisation (`torch.nn.utils.parametrize`) of a tensor of a layer, so the
layer keeps its class, its code and its place, and merging means writing the effective weight down.
Where the mathematics needs the layer's input, an `OutputAdapter` wraps the layer instead. Facts
about a method are data on its class, asked by those who need them; its options are in `options.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch.nn.utils import parametrize

from mace_lora.adapters.layout import Site, WeightLayout
from mace_lora.adapters.options import AdapterOptions
from mace_lora.errors import ConfigError, NotPicklable

O = TypeVar("O", bound=AdapterOptions)


class Adapter(torch.nn.Module, Generic[O]):
    """A change of one weight or of one layer. Its parameters, all of them, are what is trained.

    Methods derive from `WeightAdapter` or from `OutputAdapter`.

    Class facts:
        mergeable: the effective weight does not depend on the input.
        kinds: kinds of layers (`model.layers.KINDS`) that the method adapts; the preset "all".
        default_kinds: those of them that the target preset "default" means.
    """

    mergeable: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "dense", "radial", "skip", "contraction")
    default_kinds: ClassVar[tuple[str, ...]] = ("linear", "dense", "radial")

    def __init__(self, layout: WeightLayout, options: O) -> None:
        super().__init__()
        self.layout = layout
        self.options = options
        self.config: object = None  # the `AdapterConfig` of the whole injection

    @classmethod
    def make(cls, site: Site, options: O) -> AnyAdapter:
        """The adapter for one site. A method that treats layouts differently chooses here."""
        return cls(site.layout, options)

    def lr_factors(self) -> dict[str, float]:
        """Learning rates of parameters, by name, relative to the run's; those not named have it."""
        return {}

    @property
    def draws(self) -> bool:
        """Whether `forward` draws random numbers in training mode."""
        return False

    def notes(self) -> str:
        """What the user should know about this layer, such as a capped rank; or nothing."""
        return ""

    def fit(self, update: torch.Tensor) -> None:
        """Set the factors so that the weight changes by `update`, or as nearly as they can.

        Raises:
            ConfigError: the method has no such best adapter in closed form.
        """
        raise ConfigError(
            f"no best {type(self).__name__} adapter of a given update can be computed; "
            "use lora or elora"
        )

    @classmethod
    def banner(cls, options: O) -> str:
        """A line for the log when a run starts, or nothing."""
        return ""

    def attach(self, site: Site, model: torch.nn.Module) -> None:
        """Become part of the layer at `site` in `model`."""
        raise NotImplementedError


AnyAdapter: TypeAlias = Adapter[Any]


class WeightAdapter(Adapter[O]):
    """A change of a weight, from the weight alone: it merges."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The effective weight, of the shape of `weight`."""
        raise NotImplementedError

    def attach(self, site: Site, model: torch.nn.Module) -> None:
        """Become part of the layer: from now on its weight is the effective one."""
        weight = site.weight
        self.to(device=weight.device, dtype=weight.dtype)
        parametrize.register_parametrization(site.module, site.tensor, self)
        # a class of this one module, which torch has just made; copies go another way
        setattr(type(site.module), "__getstate__", _refuse_to_pickle)  # noqa: B010
        self.eval()  # nothing is drawn but in training steps: torch has taken over the layer's mode


def _refuse_to_pickle(module: torch.nn.Module) -> None:
    raise NotPicklable(
        "a model with adapters can't be pickled, and so not be given to torch.save: save_adapter"
        "(model, folder) saves the adapters, merge(model) makes a plain model that can be, and "
        "model.state_dict() has all tensors"
    )


class OutputAdapter(Adapter[O]):
    """A change of a layer's output that depends on its input, and so has no merged weight."""

    mergeable = False

    def forward(self, features: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The adapted output, of the shape of `output`."""
        raise NotImplementedError

    def attach(self, site: Site, model: torch.nn.Module) -> None:
        """Wrap the layer: `Gated` takes its place in `model`."""
        weight = site.weight
        self.to(device=weight.device, dtype=weight.dtype)
        parent, _, name = site.name.rpartition(".")
        setattr(model.get_submodule(parent), name, Gated(site.module, self))


class Gated(torch.nn.Module):
    """A linear layer whose output an `OutputAdapter` changes. TorchScript can compile it."""

    def __init__(self, ungated: torch.nn.Module, gate: OutputAdapter[Any]) -> None:
        super().__init__()
        self.irreps_in = ungated.irreps_in  # mace-torch reads them off its layers
        self.irreps_out = ungated.irreps_out
        self.ungated = ungated
        self.gate = gate

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features: (..., irreps_in.dim) to (..., irreps_out.dim)."""
        adapted: torch.Tensor = self.gate(features, self.ungated(features))
        return adapted


def plain_name(path: str) -> str:
    """The name that a tensor or an adapter has without the adapters around it.

    `x.ungated.weight`, `x.parametrizations.weight.original` and `x.weight` are all `x.weight`;
    an adapter is called after the tensor or the layer that it changes.
    """
    path = path.replace(".ungated", "")
    layer, _, rest = path.rpartition(".parametrizations.")
    if not layer:
        return path.removesuffix(".gate")
    return f"{layer}.{rest.rpartition('.')[0]}"  # weight.original, weight.0, weights.1.original
