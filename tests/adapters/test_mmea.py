"""MMEA where it departs from the published code, and what becomes of its gates in files."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from e3nn.util import jit
from helpers.frames import DATA
from helpers.running import run_command
from mace.calculators import MACECalculator

from e3nn import o3  # isort: skip

from mace_lora import AdapterConfig, inject, load_adapter, merge
from mace_lora.errors import ConfigError
from mace_lora.model.injection import adapters
from mace_lora.testing import outputs, randomise_, worst
from mace_lora.upstream import gated
from mace_lora.upstream.precision import default_dtype
from mace_lora.upstream.predicting import frames_to_batch


def layer(irreps_in: str, irreps_out: str, **options) -> torch.nn.ModuleDict:
    """A linear layer with gates of random numbers."""
    torch.manual_seed(1)
    with default_dtype(torch.float64):
        model = torch.nn.ModuleDict({"layer": o3.Linear(irreps_in, irreps_out)})
    inject(model, AdapterConfig.create("mmea", rank=4, **options))
    randomise_(model)
    return model


def violation(model: torch.nn.ModuleDict) -> dict[str, float]:
    """How far the layer is from commuting with a rotation and with inversion."""
    linear, errors = model["layer"], {}
    x = torch.randn(5, linear.irreps_in.dim, dtype=torch.float64)
    with default_dtype(torch.float64):
        rotation = o3.rand_matrix()
        for name, matrix in (("rotation", rotation), ("inversion", -torch.eye(3))):
            d_in, d_out = (i.D_from_matrix(matrix) for i in (linear.irreps_in, linear.irreps_out))
            turned = linear(x @ d_in.T)
            errors[name] = (turned - linear(x) @ d_out.T).abs().max().item()
    return errors


@pytest.mark.parametrize("gate", ["exp", "res"])
def test_pseudo_scalars_keep_parity(gate):
    """The published code adds to them what inversion does not turn."""
    irreps = "4x0e + 4x0o + 3x1o"
    assert max(violation(layer(irreps, irreps, gate=gate)).values()) < 1e-12
    published = violation(layer(irreps, irreps, gate=gate, reference=True))
    assert published["rotation"] < 1e-12
    assert published["inversion"] > 1e-2


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out", "scales"),
    [
        ("4x0e + 2x1o + 2x1o", "4x0e + 3x1o", 3),  # one per output copy, not per path
        ("4x0e + 3x0e + 2x1o", "5x0e + 2x1o", 2),
        ("2x1o + 4x0e", "3x1o + 4x0e + 2x0e", 3),  # scalars need not come first
        ("4x0e + 2x1o", "2x1o", 2),  # no scalars out
        ("4x0e", "4x0e + 2x1o", None),  # no path to the vectors: nothing to scale
    ],
)
def test_shapes_that_the_published_code_refuses_or_wastes(irreps_in, irreps_out, scales):
    model = layer(irreps_in, irreps_out)
    ((_, gate),) = adapters(model)
    if scales is None:
        assert gate.scale_weight is None
    else:
        assert gate.scale_weight.shape == (scales, 4)
    assert max(violation(model).values()) < 1e-12
    x = torch.randn(2, 3, model["layer"].irreps_in.dim, dtype=torch.float64)
    batched = model["layer"](x)
    assert torch.allclose(batched[1, 2], model["layer"](x[1, 2]))
    batched.square().sum().backward()
    for name, parameter in gate.named_parameters():
        per_row = parameter.grad.abs().reshape(len(parameter), -1).sum(dim=1)
        assert (per_row > 0).all(), f"a row of {name} matters to nothing"


def test_exp_gates_cannot_overflow():
    for dtype in (torch.float32, torch.float64):
        model = layer("4x0e + 2x1o", "4x0e + 2x1o").to(dtype)
        x = 1e6 * torch.randn(5, 10, dtype=dtype)
        assert torch.isfinite(model["layer"](x)).all()
        published = layer("4x0e + 2x1o", "4x0e + 2x1o", reference=True).to(dtype)
        assert not torch.isfinite(published["layer"](x)).all()


def start_of_shifts(**options) -> torch.Tensor:
    torch.manual_seed(1)
    with default_dtype(torch.float64):
        model = torch.nn.ModuleDict({"layer": o3.Linear("64x0e", "64x0e")})
    inject(model, AdapterConfig.create("mmea", **options))
    ((_, gate),) = adapters(model)
    return gate.shift_weight.detach()


def test_starts():
    assert start_of_shifts().abs().max() == 0
    assert start_of_shifts(init="zero").abs().max() == 0
    assert start_of_shifts(init="normal").std() == pytest.approx(0.001, rel=0.1)
    assert start_of_shifts(std=0.02).std() == pytest.approx(0.02, rel=0.1)
    for options in ({"init": "uniform"}, {"reference": True}):
        values = start_of_shifts(**options)
        assert 0.9 * 16**-0.5 < values.abs().max() <= 16**-0.5
    assert start_of_shifts(reference=True, init="zero").abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--mmea_rank=0"),
        ({"lora_rank": -1}, "--mmea_lora_rank=-1"),
        ({"lora_alpha": 0.0}, "--mmea_lora_alpha=0.0"),
        ({"gate": "expp"}, "Did you mean 'exp'"),
        ({"init": "zer"}, "Did you mean 'zero'"),
        ({"std": -1.0}, "--mmea_std=-1.0"),
        ({"std": float("nan")}, "--mmea_std=nan"),
        ({"std": 0.1, "init": "zero"}, "contradicts --mmea_init=zero"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig.create("mmea", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchscript(model, frames, dtype):
    inject(model, AdapterConfig.create("mmea"))
    randomise_(model)
    model.to(dtype)
    before = outputs(model, frames)
    kept = merge(deepcopy(model), keep_gates=True)
    compiled = jit.compile(deepcopy(kept))
    batch = frames_to_batch(frames, model)
    found = compiled(batch.to_dict(), training=False)
    compared = {k: found[k] for k in before}
    assert worst(before, compared) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data, foundation):
    folder = tmp_path_factory.mktemp("mmea")
    done = run_command(
        "--name=run",
        f"--foundation_model={foundation}",
        *(f"--{part}_file={small_data[part]}" for part in ("train", "valid", "test")),
        "--adapter=mmea",
        "--max_num_epochs=2",
        "--batch_size=5",
        "--lr=0.02",
        "--seed=1",
        cwd=folder,
    )
    return folder, done.stdout


def test_the_log(run):
    _, log = run
    assert "MMEA_RANK:  16" in log
    assert "run.model: with gates: loading it needs mace_lora" in log


def test_the_saved_model_holds_the_gates(run, foundation, frames):
    folder, _ = run
    saved = torch.load(folder / "run.model", weights_only=False)
    assert type(saved) is gated.GatedScaleShiftMACE
    adapted = load_adapter(foundation, folder / "run_adapter")
    assert worst(outputs(adapted, frames), outputs(saved, frames)) <= 1e-10
    frame = frames[0]
    frame.calc = MACECalculator(str(folder / "run.model"), device="cpu", default_dtype="float64")
    energy = outputs(saved, frames[:1])["energy"].item()
    assert frame.get_potential_energy() == pytest.approx(energy, abs=1e-8)


def test_upstreams_converter_refuses_gates_instead_of_dropping_them(run):
    from mace.cli.convert_e3nn_cueq import run as convert

    pytest.importorskip("cuequivariance_torch")
    with pytest.raises((KeyError, TypeError)):
        convert(torch.load(run[0] / "run.model", weights_only=False), device="cpu")


def test_without_mace_lora_the_model_never_loads_and_the_compiled_one_does(run):
    folder, _ = run
    code = f"""
import sys, warnings; sys.modules["mace_lora"] = None; warnings.filterwarnings("ignore")
import ase.io, torch
from mace.calculators import MACECalculator
try:
    torch.load("run.model", weights_only=False)
    raise SystemExit("the model was loaded without its gates")
except ImportError as error:
    assert "mace_lora" in str(error), error
atoms = ase.io.read({str(DATA / "ethanol_test.xyz")!r}, index=0)
atoms.calc = MACECalculator("run_compiled.model", device="cpu", default_dtype="float64")
print(repr(float(atoms.get_potential_energy())))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    import ase.io

    frame = ase.io.read(DATA / "ethanol_test.xyz", index=0)
    saved = torch.load(folder / "run.model", weights_only=False)
    expected = outputs(saved, [frame])["energy"].item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-8)
