"""From what a file holds of a model to the arguments that its class is built with.

Every attribute is looked up with the value that it had before it existed, so that models of all
years are read in one way. Whether contraction weights are in the reduced basis is judged by the
weights (see `bases`): the attribute of that name is True in models whose weights are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import mace  # noqa: F401  must come before e3nn: it prepares e3nn for current torch versions
import numpy as np
import torch
from e3nn import o3
from mace import modules

from mace_lora.errors import FoundationModelError
from mace_lora.upstream.reading import Array, Made

# Architectures of mace-torch's that can be rebuilt
ENERGY = ("MACE", "ScaleShiftMACE", "MACELES", "PolarMACE")
DIPOLES = ("AtomicDipolesMACE", "AtomicDielectricMACE", "EnergyDipolesMACE")

_FUNCTIONS = torch.nn.functional
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": torch.abs,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    **{
        name: getattr(_FUNCTIONS, name)
        for name in ("silu", "relu", "gelu", "elu", "selu", "mish", "softplus", "leaky_relu")
    },
}
_RADIAL = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_TRANSFORMS = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
_POLAR = (
    "kspace_cutoff_factor",
    "atomic_multipoles_max_l",
    "atomic_multipoles_smearing_width",
    "field_feature_max_l",
    "field_feature_widths",
    "num_recursion_steps",
    "field_si",
    "include_electrostatic_self_interaction",
    "add_local_electron_energy",
    "quadrupole_feature_corrections",
    "return_electrostatic_potentials",
    "field_norm_factor",
)
# Arguments of Les under the names of the attributes that it makes of them
_LES = (
    *("n_layers", "n_hidden", "add_linear_nn", "output_scaling_factor", "sigma", "dl"),
    *("remove_self_interaction", "remove_mean", "epsilon_factor", "use_atomwise"),
    *("use_fixed_atomic_charges", "fixed_atomic_charges_scaling_factor", "use_atomic_alpha"),
    "use_epsilon_r_scaling",
)


class Foreign(FoundationModelError):
    """Something in the file that the installed mace-torch doesn't have."""


def plain(value: object) -> object:
    """A value of a file as numbers, texts, names of classes and tuples of them."""
    if isinstance(value, Array):
        value = torch.from_numpy(np.array(value.value))
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else tuple(value.flatten().tolist())
    if isinstance(value, type) and issubclass(value, Made):
        return value.name
    if isinstance(value, Made):
        if value.name == "Irreps":
            return str(o3.Irreps(irreps(value)).simplify())
        if value.name == "getattr":  # how functions of torch's own are pickled
            return value.arguments[-1]
        if value.name == "AtomicNumberTable":
            return plain(value.state["zs"])
        return plain(value.arguments) if value.arguments else value
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(entry) for entry in value)
    return value


def irreps(value: object) -> str:
    """Irreps of a file as a text such as `16x0e+16x1o`."""
    if not isinstance(value, Made):
        return str(o3.Irreps(value))
    blocks = [(mul, *_entries(ir)) for mul, ir in map(_entries, _entries(value))]
    return "+".join(
        f"{mul}x{degree}{'e' if parity == 1 else 'o'}" for mul, degree, parity in blocks
    )


def _entries(value: object) -> tuple[object, ...]:
    """Those of an object whose class is derived from tuple."""
    if (
        isinstance(value, Made)
        and value.arguments
        and isinstance(value.arguments[0], (tuple, list))
    ):
        return tuple(value.arguments[0])
    raise Foreign("irreps in a form that mace-torch's don't have")


def number(value: object) -> float:
    """A number of a file, whichever kind it is kept as."""
    found = plain(value)
    if not isinstance(found, (int, float)):
        raise Foreign(f"{found!r} in the place of a number")
    return found


def whole_numbers(value: object) -> list[int]:
    """One or several of a file."""
    found = plain(value)
    return [int(number(n)) for n in (found if isinstance(found, tuple) else (found,))]


def arguments(tree: Made, kind: str) -> dict[str, object]:
    """What the class `kind` is built with, to become the model in `tree`.

    Raises:
        Foreign: the model has a part that the installed mace-torch doesn't know.
    """
    common = _common(tree)
    if kind in DIPOLES:
        return {**common, **_dipoles(tree, kind)}
    found = {**common, **_energy(tree)}
    if kind != "MACE":
        found |= {
            f"atomic_inter_{k}": tensor(tree, f"scale_shift.{k}").numpy()
            for k in ("scale", "shift")
        }
    if kind == "MACELES":
        found["les_arguments"] = _les(tree)
    if kind == "PolarMACE":
        found |= _polar(tree)
    return found


def _common(tree: Made) -> dict[str, object]:
    numbers = whole_numbers(needed(tree, "atomic_numbers"))
    blocks = parts(tree, "interactions")
    first, last = blocks[0], blocks[-1]
    embedding = part(tree, "radial_embedding")
    hidden = irreps(needed(first, "hidden_irreps"))
    correlations = [_correlation(product) for product in parts(tree, "products")]
    radial = part(embedding, "bessel_fn").name
    return {
        "r_max": float(number(tree.get("r_max", embedding.get("cutoff_fn.r_max")))),
        "num_bessel": plain(needed(embedding, "out_dim")),
        "num_polynomial_cutoff": int(number(needed(embedding, "cutoff_fn.p"))),
        "max_ell": plain(needed(tree, "spherical_harmonics._lmax")),
        "interaction_cls": _one_of(modules.interaction_classes, last, "interaction block"),
        "interaction_cls_first": _one_of(modules.interaction_classes, first, "interaction block"),
        "num_interactions": len(blocks),
        "num_elements": len(numbers),
        "hidden_irreps": o3.Irreps(hidden),
        "MLP_irreps": _mlp(tree),
        "gate": _gate(tree),
        "avg_num_neighbors": float(number(needed(first, "avg_num_neighbors"))),
        "atomic_numbers": numbers,
        "correlation": correlations[0] if len({*correlations}) == 1 else correlations,
        "radial_type": _RADIAL.get(radial, radial),
        "radial_MLP": _radial_mlp(first),
    }


def _energy(tree: Made) -> dict[str, object]:
    blocks, readouts = parts(tree, "interactions"), parts(tree, "readouts")
    layers = len(blocks)
    specs = plain(tree.get("embedding_specs"))
    transform = tree.get("radial_embedding.distance_transform")
    last = irreps(needed(blocks[-1], "hidden_irreps"))
    hidden = irreps(needed(blocks[0], "hidden_irreps"))
    return {
        "atomic_energies": np.atleast_2d(
            tensor(tree, "atomic_energies_fn.atomic_energies").numpy()
        ),
        "heads": heads(tree),
        "pair_repulsion": tree.get("pair_repulsion_fn") is not None,
        "distance_transform": (
            _TRANSFORMS.get(transform.name) if isinstance(transform, Made) else "None"
        ),
        "apply_cutoff": plain(tree.get("radial_embedding.apply_cutoff", True)),
        "use_so3": _is_so3(tree),
        "use_agnostic_product": bool(tree.get("products.0.use_agnostic_product", False)),
        "use_last_readout_only": layers > 1 and len(readouts) == 1,
        "use_embedding_readout": tree.get("embedding_readout") is not None,
        "embedding_specs": (
            {name: dict(spec) for name, spec in specs.items()} if isinstance(specs, dict) else None
        ),
        "edge_irreps": tree.get("edge_irreps") and o3.Irreps(irreps(tree.get("edge_irreps"))),
        "use_edge_irreps_first": bool(tree.get("use_edge_irreps_first", False)),
        "readout_cls": (
            _one_of(modules.readout_classes, readouts[-1], "readout")
            if layers > 1
            else modules.NonLinearReadoutBlock
        ),
        "keep_last_layer_irreps": layers > 1 and last == hidden and "+" in hidden,
    }


def _dipoles(tree: Made, kind: str) -> dict[str, object]:
    energies = None
    if kind == "EnergyDipolesMACE":
        energies = np.atleast_2d(tensor(tree, "atomic_energies_fn.atomic_energies").numpy())
    return {"atomic_energies": energies}


def _polar(tree: Made) -> dict[str, object]:
    found = {name: plain(tree.get(name)) for name in _POLAR if tree.get(name) is not None}
    norms = plain(tree.get("_field_feature_norms"))
    known = {**vars(modules.field_blocks), **GATES}

    def options(key: str) -> dict[str, object]:
        kept = tree.get(key) or {}
        if not isinstance(kept, dict):
            raise Foreign(f"its {key} is no table")
        made = {name: plain(value) for name, value in kept.items()}
        for name, value in kept.items():
            if isinstance(value, (type, Made)):  # a class, by name
                made[name] = known.get(called := str(made[name])) or _foreign(called, "block")
        return made

    return {
        **found,
        "field_feature_norms": None if norms is None else list(np.atleast_1d(np.asarray(norms))),
        "fixedpoint_update_config": options("_fixedpoint_update_config"),
        "field_readout_config": options("_field_readout_config"),
    }


def _les(tree: Made) -> dict[str, object]:
    les = part(tree, "les")
    found = {name: plain(les.state[name]) for name in _LES if name in les.state}
    if isinstance(hidden := found.get("n_hidden"), tuple):
        found["n_hidden"] = list(hidden)
    for name in ("compute_bec", "bec_output_index"):
        if name in tree.state:
            found[name] = plain(tree.state[name])
    return found


def heads(tree: Made) -> list[str]:
    """The names of the heads; models of one head have had none."""
    named = plain(tree.get("heads"))
    return [str(head) for head in named] if isinstance(named, tuple) and named else ["Default"]


def _is_so3(tree: Made) -> bool:
    return "1e" in irreps(needed(tree, "spherical_harmonics.irreps_out"))


def _mlp(tree: Made) -> o3.Irreps:
    """The irreps of the last readout's hidden layer, for one head."""
    readouts = parts(tree, "readouts")
    hidden = readouts[-1].get("hidden_irreps") if readouts else None
    if hidden is None:  # no such readout: any will do
        return o3.Irreps("16x0e")
    count = len(heads(tree))
    return o3.Irreps([(mul // count, ir) for mul, ir in o3.Irreps(irreps(hidden))])


def _gate(tree: Made) -> Callable[[torch.Tensor], torch.Tensor] | None:
    readouts = parts(tree, "readouts")
    if not readouts:
        return None
    for path in (
        "non_linearity.acts.0.f",
        "equivariant_nonlin._act_scalar",
        "equivariant_nonlin.act_scalars.acts.0.f",
    ):
        function = readouts[-1].get(path)
        if function is not None:
            name = str(plain(function))
            return GATES[name] if name in GATES else _foreign(name, "activation function")
    return None


def _correlation(product: Made) -> int:
    contraction = product.get("symmetric_contractions.contractions.0")
    if not isinstance(contraction, Made):  # of cuequivariance's
        return int(number(needed(product, "symmetric_contractions.contraction_degree")))
    return 1 + len(part(contraction, "weights").tensors("_parameters"))


def _radial_mlp(block: Made) -> list[int]:
    sizes = block.get("radial_MLP")
    if sizes is None:
        return whole_numbers(needed(block, "conv_tp_weights.hs"))[1:-1]
    return whole_numbers(sizes)


def needed(tree: Made, path: str) -> object:
    """What `path` names; it must be there."""
    found = tree.get(path)
    if found is None:
        raise Foreign(f"a {tree.name} without {path}")
    return found


def part(tree: Made, path: str) -> Made:
    """The object that `path` names."""
    found = needed(tree, path)
    if not isinstance(found, Made):
        raise Foreign(f"a {tree.name} whose {path} is {found!r}")
    return found


def parts(tree: Made, name: str) -> list[Made]:
    """The entries of a ModuleList."""
    return list(part(tree, name).children.values())


def tensor(tree: Made, path: str) -> torch.Tensor:
    """The numbers that `path` names, without their history."""
    found = needed(tree, path)
    if not isinstance(found, torch.Tensor):
        raise Foreign(f"a {tree.name} whose {path} is no tensor")
    return found.detach()


def _one_of(known: dict[str, type], made: Made, what: str) -> type:
    return known[made.name] if made.name in known else _foreign(made.name, what)


def _foreign(name: str, what: str) -> NoReturn:
    raise Foreign(f"its {what} {name} is none of mace-torch's")


def own_value(value: object) -> object:
    """An attribute of a module in the form that `plain` gives one of a file."""
    if isinstance(value, o3.Irreps):
        return str(value.simplify())
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else tuple(value.flatten().tolist())
    if isinstance(value, dict):
        return {key: own_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(own_value(entry) for entry in value)
    return getattr(value, "__name__", value)
