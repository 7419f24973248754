"""Adapters outlive a change of the basis in which mace-torch has weights of contractions."""

from __future__ import annotations

from copy import deepcopy

import ase.io
import pytest
import torch
from helpers import zoo
from helpers.running import here

from e3nn import o3  # isort: skip

from mace_lora import (
    AdapterConfig,
    add_adapter,
    change_basis,
    inject,
    load_adapter,
    load_foundation,
    merge,
    save_adapter,
    set_adapter,
)
from mace_lora.errors import ArtefactError, FoundationModelError
from mace_lora.model.bases import bases_of, common, transition
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import adapter_parameters
from mace_lora.testing import outputs, randomise_, worst
from mace_lora.upstream.precision import default_dtype

HIGHEST = "products.0.symmetric_contractions.contractions.0.weights_max"
CONFIGS = {
    "lora": AdapterConfig.create("lora", targets=("all",), rank=6),
    "capped": AdapterConfig.create("lora", targets=("contraction",), rank=64),
    "elora": AdapterConfig.create("elora"),
    "mmea": AdapterConfig.create("mmea"),
    "full": AdapterConfig.create("full"),
    "saved": AdapterConfig.create("lora", modules_to_save=("contractions",)),
    "gains": AdapterConfig.create("dora", rank=0, targets=("all",)),
    "elsewhere": AdapterConfig.create("dora"),
}


def tuned(base: torch.nn.Module, config: AdapterConfig, folder) -> torch.nn.Module:
    """`base` with an adapter, which is in `folder` as well."""
    model = deepcopy(base)
    inject(model, config)
    randomise_(model, std=0.2)
    save_adapter(model, folder)
    return model


@pytest.fixture(scope="module")
def both() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model in the reduced basis, and the same one in the full basis."""
    kind, arguments = zoo.ZOO["high_order"]
    sizes = {"hidden_irreps": o3.Irreps("4x0e + 4x1o"), "max_ell": 1}
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        reduced = kind(**{**zoo._COMMON, **arguments, **sizes})
    return reduced, change_basis(reduced, reduced=False)


@pytest.fixture(params=[0, 1], ids=["from reduced", "from full"])
def pair(request, both) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and the same one in the other basis."""
    return both[request.param], both[1 - request.param]


def test_the_bases_span_the_same_products(both):
    """Of 4 and 6 paths of the full basis 2 are independent, those of the reduced one."""
    one, other = map(bases_of, both)
    first = "products.0.symmetric_contractions.contractions"
    names = [f"{first}.{i}.weights_max" for i in range(2)]
    assert [(one[n].shape[-1], other[n].shape[-1]) for n in names] == [(2, 4), (2, 6)]
    assert one.keys() == other.keys()
    for name in one:
        pair = common(one[name], other[name])
        for there, now in (pair, pair[::-1]):
            missing = now.flatten(0, 1) @ transition(there, now) - there.flatten(0, 1)
            assert missing.abs().max() <= 1e-12 * there.abs().max()
        assert torch.linalg.matrix_rank(other[name].flatten(0, 1)) == one[name].shape[-1]


def test_a_model_predicts_the_same_in_both(both, frames):
    made, full = both
    back = change_basis(full, reduced=True)
    assert (made.use_reduced_cg, full.use_reduced_cg, back.use_reduced_cg) == (True, False, True)
    assert fingerprint(made) != fingerprint(full)
    assert worst(outputs(made, frames), outputs(full, frames)) <= 1e-11
    assert worst(outputs(made, frames), outputs(back, frames)) <= 1e-11
    for name, weight in made.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_fits_the_same_model_in_the_other_basis(pair, frames, tmp_path, config):
    base, other = pair
    expected = outputs(tuned(base, config, tmp_path / "adapter"), frames)
    assert worst(outputs(base, frames), expected) > 1e-4
    found = load_adapter(other, tmp_path / "adapter")
    assert worst(expected, outputs(found, frames)) <= 1e-10
    if config.method != "mmea":
        assert worst(expected, outputs(merge(found), frames)) <= 1e-10


def test_an_adapter_goes_on_where_it_was_saved_in_the_other_basis(pair, frames, tmp_path):
    """There and back again, and by name beside others."""
    base, other = pair
    expected = outputs(tuned(base, CONFIGS["lora"], tmp_path / "one"), frames)
    save_adapter(load_adapter(other, tmp_path / "one"), tmp_path / "other")
    assert worst(expected, outputs(load_adapter(base, tmp_path / "other"), frames)) <= 1e-10
    model = load_adapter(base, tmp_path / "one")
    add_adapter(model, "other", tmp_path / "other")
    set_adapter(model, "other")
    assert worst(expected, outputs(model, frames)) <= 1e-10


def test_in_its_own_basis_an_adapter_keeps_every_bit(both, tmp_path):
    model = tuned(both[0], CONFIGS["full"], tmp_path / "adapter")
    found = adapter_parameters(load_adapter(both[0], tmp_path / "adapter"))
    for name, factor in adapter_parameters(model).items():
        assert torch.equal(found[name], factor), name


def test_another_model_in_the_other_basis_is_refused(both, tmp_path):
    tuned(both[0], CONFIGS["lora"], tmp_path / "adapter")
    other = deepcopy(both[1])
    with torch.no_grad():
        contraction(other).weights_max.mul_(1.001)
    with pytest.raises(ArtefactError, match="belongs to another base model"):
        load_adapter(other, tmp_path / "adapter")


def test_directions_of_dora_are_refused(both, tmp_path):
    config = AdapterConfig.create("dora", targets=("contraction",))
    tuned(both[0], config, tmp_path / "adapter")
    with pytest.raises(ArtefactError, match="also depends on the base weights"):
        load_adapter(both[1], tmp_path / "adapter")


def contraction(model: torch.nn.Module) -> torch.nn.Module:
    """The first one, to scalars."""
    return model.products[0].symmetric_contractions.contractions[0]


def test_products_that_the_other_basis_lacks(both, tmp_path):
    """A model without them exists in both bases; an update of them does not."""
    full, fewer = deepcopy(both[1]), deepcopy(both[1])
    coupling = contraction(full).U_matrix_3
    independent = transition(*common(bases_of(full)[HIGHEST], bases_of(both[0])[HIGHEST]))
    kept = independent[0] / independent[0].norm()  # the first of two products, by path
    contraction(fewer).U_matrix_3 = torch.einsum("...p,p->...", coupling, kept).unsqueeze(-1) * kept
    with torch.no_grad():
        for model in (full, fewer):
            weights = contraction(model).weights_max
            weights.copy_(torch.einsum("p,q,eqc->epc", kept, kept, weights))
    tuned(full, CONFIGS["full"], tmp_path / "adapter")
    with pytest.raises(ArtefactError, match=r"weights_max can't be had .* misses \d\.\de-0\d of"):
        load_adapter(fewer, tmp_path / "adapter")


def test_a_model_with_products_of_its_own(both):
    foreign = deepcopy(both[1])
    contraction(foreign).U_matrix_3 += torch.rand_like(contraction(foreign).U_matrix_3)
    with pytest.raises(FoundationModelError, match=r"order 3, can't be had .* miss \d\.\de-0\d"):
        change_basis(foreign, reduced=True)


@pytest.mark.slow
def test_a_run_and_what_continues_it(build, tmp_path, train_flags):
    """The adapter of a run, on the whole foundation model in the other basis, and as a start."""
    reduced = build("foundation")
    torch.save(reduced, tmp_path / "reduced.model")
    torch.save(change_basis(reduced, reduced=False), tmp_path / "full.model")
    flags = [*train_flags, "--lora=True", "--lora_targets", "all", "--E0s=foundation"]
    flags += ["--default_dtype=float64", "--max_num_epochs=1", "--protect=False"]
    base = f"--foundation_model={tmp_path / 'full.model'}"
    assert here(tmp_path / "one", *flags, base) == ""
    frames = ase.io.read(train_flags[3].partition("=")[2], index=":2")
    expected = outputs(load_foundation(tmp_path / "one" / "run.model"), frames)
    found = load_adapter(tmp_path / "reduced.model", tmp_path / "one" / "run_adapter")
    assert worst(expected, outputs(found, frames)) <= 1e-10
    other = f"--foundation_model={tmp_path / 'reduced.model'}"
    start = f"--adapter_start={tmp_path / 'one' / 'run_adapter'}"
    assert here(tmp_path / "two", *flags, other, start, "--lr=1e-9", "--solve_e0s=False") == ""
    again = outputs(load_foundation(tmp_path / "two" / "run.model"), frames)
    assert worst(expected, again) <= 1e-5
