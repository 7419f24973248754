"""Files of models: read and never run, whatever they hold, and rebuilt to the last digit."""

from __future__ import annotations

import os
import sys
import zipfile
from copy import deepcopy
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
import torch
from helpers import zoo
from helpers.frames import ROOT, ethanol
from helpers.running import here
from mace.modules import ScaleShiftMACE

from e3nn.nn import Gate  # isort: skip  (mace first: e3nn's constants)

from mace_lora import AdapterConfig, inject, load_foundation, merge
from mace_lora.errors import FoundationModelError
from mace_lora.model.fingerprint import fingerprint
from mace_lora.testing import outputs, randomise_, worst
from mace_lora.upstream import gated
from mace_lora.upstream import names as upstream
from mace_lora.upstream.reading import read

# Not part of the package: tests that need it are left out without it
REAL = ROOT.parent / "shared/models"


class Program:
    """What unpickles as the result of a call: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path):
    def save(model: object) -> Path:
        torch.save(model, tmp_path / "saved.model")
        return tmp_path / "saved.model"

    return save


# ------------------------------------------------------------------------------ right


@pytest.mark.parametrize("name", sorted(zoo.available()))
def test_every_kind_is_rebuilt_as_it_was(build, frames, saved, name):
    path = saved(build(name))
    there, found = torch.load(path, weights_only=False), load_foundation(path)
    assert type(found) is type(there)
    assert worst(outputs(there, frames), outputs(found, frames)) <= 1e-12
    old, new = dict(there.named_parameters()), dict(found.named_parameters())
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert fingerprint(there) == fingerprint(found)


def test_a_model_that_was_built_in_single_precision_keeps_its_constants(frames, saved):
    """Coupling coefficients lie in e3nn's compiled code; a double made of a float keeps theirs."""
    kind, arguments = zoo.ZOO["residual"]
    torch.manual_seed(0)
    path = saved(kind(**{**zoo._COMMON, **arguments}).double())
    there, found = torch.load(path, weights_only=False), load_foundation(path)
    assert worst(outputs(there, frames), outputs(found, frames)) <= 1e-12


def test_float32_stays_float32_and_becomes_what_it_would_become(build, frames, saved):
    path = saved(build("residual").float())
    assert next(load_foundation(path).parameters()).dtype == torch.float32
    there, found = (
        torch.load(path, weights_only=False).double(),
        load_foundation(path, dtype=torch.float64),
    )
    assert worst(outputs(there, frames), outputs(found, frames)) <= 1e-12


def test_gates_of_mmea_are_read_too(build, frames, saved):
    model = build("residual")
    inject(model, AdapterConfig.create("mmea", rank=3))
    randomise_(model)
    model = merge(model, keep_gates=True)
    gated.mark(model)
    expected = outputs(model, frames)
    found = load_foundation(saved(model))
    assert type(found).__name__ == "GatedScaleShiftMACE"
    assert worst(expected, outputs(found, frames)) <= 1e-12


@pytest.mark.parametrize("name", ["residual", "high_order"])
def test_cuequivariance_format_becomes_e3nn_s(build, frames, saved, name):
    model = build(name)
    path = saved(upstream.original("to_cueq")(model, device="cpu"))
    found = load_foundation(path)
    assert "cuequivariance" not in str({type(m).__module__ for m in found.modules()})
    assert worst(outputs(model, frames), outputs(found, frames)) <= 1e-10


def test_the_format_of_torch_before_1_6(model, frames, tmp_path):
    path = tmp_path / "old.model"
    torch.save(model, path, _use_new_zipfile_serialization=False)
    assert worst(outputs(model, frames), outputs(load_foundation(path), frames)) <= 1e-12


def test_random_numbers_go_on_as_if_nothing_had_been_built(model, saved):
    path = saved(model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_foundation(path)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parameters_and_trained_frequencies_stay_what_they_are(model, saved):
    basis = model.radial_embedding.bessel_fn
    weights = basis.bessel_weights
    del basis.bessel_weights
    basis.bessel_weights = torch.nn.Parameter(1.01 * weights)
    model.node_embedding.linear.weight.requires_grad_(False)
    found = load_foundation(saved(model))
    assert torch.equal(found.radial_embedding.bessel_fn.bessel_weights, 1.01 * weights)
    assert fingerprint(found) == fingerprint(model)
    assert not found.node_embedding.linear.weight.requires_grad


# ------------------------------------------------------------------------------ of every year


def of_2022(model: torch.nn.Module) -> torch.nn.Module:
    """The model as mace saved one in 2022: without what came later, with other types."""
    numbers, cutoff = model.atomic_numbers.tolist(), float(model.r_max)
    for name in ("atomic_numbers", "r_max", "num_interactions"):
        del model._buffers[name]
    model.atomic_numbers, model.r_max = numbers, cutoff
    for name in ("heads", "use_reduced_cg", "use_so3", "use_agnostic_product", "lammps_mliap"):
        del model.__dict__[name]
    for name in ("apply_cutoff", "edge_irreps", "use_edge_irreps_first", "use_last_readout_only"):
        del model.__dict__[name]
    del model.radial_embedding.apply_cutoff
    model.radial_embedding.cutoff_fn.p = model.radial_embedding.cutoff_fn.p.double()
    energies = model.atomic_energies_fn
    energies.atomic_energies = energies.atomic_energies.reshape(-1)
    for name in ("scale", "shift"):
        setattr(model.scale_shift, name, getattr(model.scale_shift, name).reshape(()))
    for block in model.interactions:
        block.avg_num_neighbors = np.float64(block.avg_num_neighbors)
        for name in ("radial_MLP", "edge_irreps", "cueq_config", "oeq_config"):
            del block.__dict__[name]
    for product in model.products:
        del product.__dict__["use_agnostic_product"], product.__dict__["cueq_config"]
        for part in product.symmetric_contractions.contractions:
            for name in [key for key in part._buffers if key.endswith("_zeroed")]:
                del part._buffers[name]
    del model.readouts[1].__dict__["num_heads"]
    return model


def test_a_model_of_2022(base, frames, saved):
    expected = outputs(base, frames)
    path = saved(of_2022(base))
    found = load_foundation(path)
    assert worst(expected, outputs(found, frames)) <= 1e-12
    assert found.heads == ["Default"]
    assert found.r_max.item() == 4.0


@pytest.mark.slow
def test_a_model_of_2022_is_fine_tuned_like_one_of_today(
    base, frames, saved, tmp_path, train_flags
):
    flags = [*train_flags, "--lora=True", "--max_num_epochs=1", "--default_dtype=float64"]
    merged = []
    for name, change in (("today", lambda model: model), ("of 2022", of_2022)):
        path = saved(change(deepcopy(base)))
        assert here(tmp_path / name, *flags, f"--foundation_model={path}") == ""
        merged.append(outputs(load_foundation(tmp_path / name / "run.model"), frames))
    assert worst(*merged) <= 1e-10


def test_the_nonlinearity_of_e3nn_that_mace_had_until_2025(build, frames, saved):
    model = build("nonlinear")
    expected = outputs(model, frames)
    for block in model.interactions:
        ours = block.equivariant_nonlin
        block.equivariant_nonlin = Gate(
            *(ours.irreps_scalars, [torch.nn.functional.silu] * len(ours.irreps_scalars)),
            *(ours.irreps_gates, [torch.nn.functional.sigmoid] * len(ours.irreps_gates)),
            ours.irreps_gated,
        )
    assert worst(expected, outputs(model, frames)) <= 1e-12
    assert worst(expected, outputs(load_foundation(saved(model)), frames)) <= 1e-12


@pytest.mark.skipif(not (REAL / "build.py").exists(), reason="the numbers of a real model of 2022")
def test_a_real_model_of_2022(tmp_path):
    made = tmp_path / "spice.model"
    run([sys.executable, str(REAL / "build.py"), str(made)], check=True, capture_output=True)
    frames = ethanol("train", 3)
    there, found = torch.load(made, weights_only=False), load_foundation(made)
    assert worst(outputs(there, frames), outputs(found, frames)) <= 1e-12


# ------------------------------------------------------------------------------ never run


def test_a_program_is_not_run(tmp_path):
    made = tmp_path / "made"
    path = tmp_path / "program.model"
    torch.save(Program(made), path)
    with pytest.raises(FoundationModelError, match="not a MACE model: a mkdir without"):
        load_foundation(path)
    assert not made.exists()
    torch.load(path, weights_only=False)  # the file is one that does something
    assert made.exists()


def test_a_program_inside_a_model_is_not_run_but_named(model, tmp_path, saved):
    made = tmp_path / "made"
    model.interactions[0].note = Program(made)
    path = saved(model)
    with pytest.raises(FoundationModelError, match=r"interactions\.0\.note.*Nothing in the file"):
        load_foundation(path)
    assert not made.exists()


def test_classes_are_not_looked_for(tmp_path):
    path = tmp_path / "foreign.model"
    with zipfile.ZipFile(path, "w") as stored:
        stored.writestr(
            "archive/data.pkl",
            b"\x80\x02cnowhere.to.be.found\nThing\n)\x81}X\x01\x00\x00\x00aK\x07sb.",
        )
    thing = read(path)
    assert (thing.module, thing.name, thing.state) == ("nowhere.to.be.found", "Thing", {"a": 7})


def test_trust_runs_the_file(model, frames, tmp_path, saved):
    model.interactions[0].note = Program(tmp_path / "made")
    path = saved(model)
    found = load_foundation(path, trust=True)
    assert (tmp_path / "made").exists()
    assert worst(outputs(model, frames), outputs(found, frames)) <= 1e-12


# ------------------------------------------------------------------------------ or refused


def _other_class(model):
    class ScaleShiftMACE2(ScaleShiftMACE):
        pass

    ScaleShiftMACE2.__qualname__ = "ScaleShiftMACE2"
    globals()["ScaleShiftMACE2"] = ScaleShiftMACE2
    model.__class__ = ScaleShiftMACE2


def _other_block(model):
    class OurBlock(type(model.interactions[1])):
        pass

    OurBlock.__qualname__ = "OurBlock"
    globals()["OurBlock"] = OurBlock
    model.interactions[1].__class__ = OurBlock


def _unknown_setting(model):
    model.readouts[0].temperature = 0.5


def _other_setting(model):
    model.interactions[1].avg_num_neighbors = 7.0


def _more_parameters(model):
    model.node_embedding.offset = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


def _fewer_parameters(model):
    del model.products[0].linear.weight


def _half_precision(model):
    model.half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_class, "its class .*ScaleShiftMACE2 is none of mace-torch's"),
        (_other_block, "its interaction block OurBlock is none of mace-torch's"),
        (_unknown_setting, r"readouts\.0\.temperature = 0\.5 is not known"),
        (
            _other_setting,
            r"interactions\.1\.avg_num_neighbors is 7\.0; mace-torch builds it with 6",
        ),
        (_more_parameters, r"it has node_embedding\.offset, which mace-torch's model lacks"),
        (_fewer_parameters, r"the file has no products\.0\.linear\.weight"),
        (_half_precision, "float16"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(model, saved, change, message):
    change(model)
    with pytest.raises(FoundationModelError, match=message) as error:
        load_foundation(saved(model))
    assert "saved.model" in str(error.value)
    assert "--trust" in str(error.value)


def test_hooks_are_refused(model, saved):
    model.readouts[0].register_forward_hook(torch.nn.functional.softplus)
    with pytest.raises(FoundationModelError, match=r"readouts\.0 has hooks"):
        load_foundation(saved(model))


@pytest.mark.parametrize(
    ("part", "reason"),
    [(0.0, "it is empty"), (0.1, "copied in full"), (0.5, "copied in full"), (0.99, "in full")],
)
def test_half_a_file_is_refused(model, saved, part, reason):
    path = saved(model)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(FoundationModelError, match=f"can't be read as a model .*{reason}"):
        load_foundation(path)
