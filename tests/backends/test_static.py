"""Batches of fixed shapes: padding that changes nothing, traced graphs, compiled graphs."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from helpers.frames import FRAMES, ethanol
from helpers.running import LATEST, here, run_command, short_run
from helpers.steps import adapted, differs, smallest, step

from mace_lora.backends import compiled
from mace_lora.backends.base import CannotServe, Way
from mace_lora.backends.choice import Chosen, Forecast
from mace_lora.backends.compiled import Compiled
from mace_lora.backends.cudagraph import Captured
from mace_lora.backends.fusing import Fused
from mace_lora.backends.padding import Shape, pad, plan, sizes
from mace_lora.backends.static import Recorded, Static
from mace_lora.backends.tracing import trace
from mace_lora.config import AdapterConfig
from mace_lora.model.injection import adapter_parameters, inject
from mace_lora.testing import outputs, randomise_, worst
from mace_lora.upstream.predicting import frames_to_batch


def roomy(batch) -> Shape:
    """A shape with room for a fifth more."""
    edges, atoms, structures = sizes(batch.to_dict())
    return Shape.around(edges * 6 // 5, atoms + 4, structures + 2)


class _Traced(Recorded):
    def __init__(self, inputs, data, flags, training):
        self._graph, _, self.names = trace(inputs, data, flags, training=training)
        self._training = training

    def forward(self, inputs):
        self._inputs = inputs
        n = len(self.names)
        if not self._training:
            return self._graph(*inputs), []
        results = self._graph.graph.find_nodes(op="output")[0].args[0][:n]
        none = [torch.zeros(r.meta["val"].shape, dtype=inputs[0].dtype) for r in results]
        return self._graph(*inputs, *none)[:n], []

    def backward(self, kept, cotangents):
        return self._graph(*self._inputs, *cotangents)[len(self.names) :]


class Traced(Static):
    """The traced graph run operation by operation: what is compiled, without the compiler."""

    name = "traced"

    def record(self, inputs, data, shape, flags, training):
        return _Traced(inputs, data, flags, training)


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_padding_changes_nothing(build, frames):
    model = adapted(build("density_zbl_agnesi"))
    batch = frames_to_batch(frames(), model)
    data = batch.to_dict()
    n_atoms, n_frames = len(batch.positions), batch.num_graphs
    padded = model(pad(data, roomy(batch), float(model.r_max)), compute_stress=True)
    plain = model(dict(data), compute_stress=True)
    for key, n in (("energy", n_frames), ("stress", n_frames), ("forces", n_atoms)):
        assert torch.allclose(padded[key][:n], plain[key], rtol=1e-12, atol=1e-12), key
        assert torch.isfinite(padded[key]).all()
    assert (padded["forces"][n_atoms:] == 0).all()


def test_every_batch_has_a_shape_and_little_is_wasted():
    generator = torch.Generator().manual_seed(0)
    molecules = torch.tensor([[72, 9, 1], [150, 12, 1], [302, 21, 1], [130, 12, 1]])
    drawn = molecules[torch.randint(4, (300, 10), generator=generator)].sum(dim=1).tolist()
    shapes, waste = plan(map(tuple, drawn))
    assert len(shapes) <= 4
    assert waste <= 0.15
    for edges, atoms, structures in drawn:
        assert any(
            edges <= s.edges and atoms < s.atoms and structures < s.structures for s in shapes
        )


def test_batches_of_one_size_need_one_shape():
    shapes, waste = plan([(1500 + i % 7, 105, 5) for i in range(100)])
    assert len(shapes) == 1
    assert waste < 0.05


@pytest.mark.parametrize(("method", "frames"), [("lora", "mixed"), ("mmea", "periodic")])
def test_a_traced_graph_gives_the_gradients_of_eager(method, frames):
    model = adapted(smallest(), method)
    batch = frames_to_batch(FRAMES[frames](), model)
    stress = frames == "periodic"
    way = Traced([roomy(batch)])
    for _ in range(2):  # the same graph, with other weights
        expected, found = (step(w, model, batch, stress) for w in (Way(), way))
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("way", ["fused", "traced"])
def test_building_a_way_draws_no_random_numbers(model, frames, way):
    """Else dropout and whatever is drawn later would depend on --step, and on a restart."""
    model = adapted(model if way == "fused" else smallest())
    batch = frames_to_batch(frames, model)
    before = torch.get_rng_state()
    step(Fused() if way == "fused" else Traced([roomy(batch)]), model, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_no_shape_holds_is_computed_all_the_same(model):
    model = adapted(model)
    large = frames_to_batch(ethanol("train", 3), model)
    way = Traced([Shape(edges=8, atoms=4, structures=2)])
    expected, found = (step(w, model, large) for w in (Way(), way))
    assert differs(expected[1], found[1]) < 1e-10


def test_a_model_that_cannot_be_captured_goes_on(model, frames, caplog):
    """There is no CUDA device for these tensors: one line, and the right numbers."""
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    way = Chosen(Captured([roomy(batch)]), asked_for=True)
    expected = step(Way(), model, batch)
    for _ in range(2):
        found = step(way, model, batch)
        assert differs(expected[1], found[1]) < 1e-10
    lines = [r.message for r in caplog.records if "can't serve" in r.message]
    assert lines == [
        "--step=cudagraph can't serve this run, which goes on in fused: "
        "it captures CUDA kernels, and the model is on cpu"
    ]


def test_models_that_read_more_than_atoms_are_refused(build):
    model = build("residual")
    model.joint_embedding = torch.nn.Identity()
    with pytest.raises(CannotServe, match="reads more than"), Traced([]).active(model):
        pass


def test_auto_compiles_long_runs_alone(model):
    def decides(steps: int, edges: int, cost: float) -> bool:
        return Forecast.of(model, steps, edges, cost).compiling_pays

    assert not decides(steps=1000, edges=1500, cost=120)
    assert decides(steps=1_000_000, edges=1500, cost=120)
    assert decides(steps=20_000, edges=1500, cost=1)
    assert not decides(steps=20_000, edges=10, cost=60)


def test_what_was_worth_compiling_is_so_again(model, tmp_path, monkeypatch):
    """However long it took: the next run of the kind finds it done."""
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path))
    shapes = [Shape(500, 40, 6), Shape(900, 60, 6)]
    before = compiled.expected_seconds(model, shapes)
    assert before == 2 * compiled.UNKNOWN_SECONDS
    key = compiled._key(model, shapes[0])
    compiled._remember(key, 10 * before)
    assert compiled.expected_seconds(model, shapes) == before
    for seconds in (15.0, 400.0):
        compiled._remember(key, seconds)
        assert compiled.expected_seconds(model, shapes) == compiled.UNKNOWN_SECONDS + 15


def test_a_continued_run_computes_as_it_began(
    tmp_path, small_data, foundation, caplog, monkeypatch
):
    caplog.set_level("INFO")
    flags = short_run(small_data, foundation, "--step=auto")
    assert here(tmp_path, *flags, "--max_num_epochs=1") == ""
    assert torch.load(tmp_path / LATEST, weights_only=True)["progress"]["way"] == "fused"
    assert "--step=auto: fused. 2 steps ahead" in caplog.text
    assert "s were expected of a fused one" in caplog.text
    monkeypatch.setattr(Forecast, "compiling_pays", True)  # compiled by another run meanwhile
    assert here(tmp_path, *flags, "--max_num_epochs=2", "--restart_latest") == ""
    assert "--step=auto: fused, as this run has begun" in caplog.text
    assert "Compiling the training step" not in caplog.text


# ------------------------------------------------------------------ inductor: a minute each


@pytest.mark.slow
def test_compiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path))
    model = adapted(smallest())
    batches = [frames_to_batch(FRAMES["mixed"]()[i:], model) for i in range(2)]
    shapes = [roomy(batches[0])]
    way = Compiled(shapes)
    before = torch.get_rng_state()
    for batch in batches:  # of different sizes, by one graph
        expected, found = step(Way(), model, batch), step(way, model, batch)
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10
    assert torch.equal(torch.get_rng_state(), before)
    assert len(json.loads((tmp_path / "compile_seconds.json").read_text())) == 1

    def no_tracing(*_, **__):
        raise RuntimeError("traced again")

    monkeypatch.setattr(compiled, "trace", no_tracing)
    found = step(Compiled(shapes), model, batch)  # as the next run of the same kind
    assert differs(expected[1], found[1]) < 1e-10
    assert "traced again" not in caplog.text

    # another scale of the update makes another model, whatever the graph is filed under
    other = smallest()
    inject(other, AdapterConfig.create("lora", alpha=2.0, targets=("all",)))
    randomise_(other, std=0.1)
    (stored,) = (tmp_path / "graphs").glob("*.pt")
    for forged in (False, True):
        if forged:
            monkeypatch.setattr(compiled.stored, "key_of", lambda *_: stored.stem)
        expected, found = step(Way(), other, batch), step(Compiled(shapes), other, batch)
        assert differs(expected[1], found[1]) < 1e-10
        assert caplog.text.count("traced again") == 1 + forged


@pytest.mark.slow
def test_a_compiled_run_leaves_the_model_of_eager(tmp_path, train_flags, frames, monkeypatch):
    """25 epochs: the losses of 50 steps, and the saved models."""
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path / "cache"))  # nothing is compiled yet
    torch.save(smallest().float(), tmp_path / "small.model")
    flags = [*train_flags, f"--foundation_model={tmp_path / 'small.model'}", "--lora=True"]
    models, logs = [], []
    for way in ("eager", "compile"):
        folder = tmp_path / way
        folder.mkdir()
        done = run_command(*flags, "--max_num_epochs=25", f"--step={way}", cwd=folder)
        lines = (folder / "results" / "run_run-1_train.txt").read_text().splitlines()
        logs.append([row["loss"] for row in map(json.loads, lines)])
        models.append(torch.load(folder / "run.model", weights_only=False))
    assert "Compiled the training step in" in done.stdout
    assert "Compiled the evaluation in" in done.stdout
    assert "can't serve" not in done.stdout
    assert len(logs[0]) > 50
    assert logs[1] == pytest.approx(logs[0], rel=1e-8)
    one, other = map(partial(outputs, frames=frames), models)
    assert worst(one, other) < 1e-8
