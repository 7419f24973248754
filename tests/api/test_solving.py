"""Adapters combined on frames of their own."""

from __future__ import annotations

import pytest
import torch
from helpers.adapter_folders import make_adapter
from helpers.frames import ethanol, molecules

from mace_lora import combine_adapters, load_adapter, merge
from mace_lora.api import solving
from mace_lora.errors import ConfigError
from mace_lora.model.layers import find_sites
from mace_lora.testing import outputs, worst
from mace_lora.upstream import predicting


@pytest.fixture
def folders(base, tmp_path):
    return [make_adapter(base, tmp_path / f"adapter_{i}", seed=i, std=0.1) for i in range(2)]


def test_one_adapter_twice_is_that_adapter(base, frames, folders):
    twin = make_adapter(base, folders[0].with_name("twin"), seed=0, std=0.1)
    both = combine_adapters(
        base, {folders[0]: 0.5, twin: 2.0}, {folders[0]: ethanol("train", 3), twin: molecules()}
    )
    wanted = merge(load_adapter(base, folders[0]))
    assert worst(outputs(both, frames), outputs(wanted, frames)) < 1e-6


def test_moments_are_those_of_the_inputs(base, frames):
    """Of each irrep: W^T G W is what a layer gives, summed over copies and components."""
    found = solving.moments(base, [predicting.frames_to_batch(frames, base)])
    seen = {}
    sites = {site.name: site for site in find_sites(base)[0]}
    hooks = [
        site.module.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, o))
        for name, site in sites.items()
        if site.layout.kind == "linear"
    ]
    outputs(base, frames)
    for hook in hooks:
        hook.remove()
    checked = 0
    for name, output in seen.items():
        layout, weight = sites[name].layout, sites[name].weight.detach()
        matrices = layout.groups_of_blocks(layout.split(weight))
        total = sum(torch.trace(w.T @ g @ w) for w, g in zip(matrices, found[name], strict=True))
        given = output.detach().square().sum() / len(output)
        # the layer divides by the square root of the number of copies that an output reads
        ratio = (given / total).item()
        rows = {group.rows for group in layout.groups}
        if len(rows) == 1:
            assert ratio == pytest.approx(1 / rows.pop(), rel=1e-6)
            checked += 1
    assert checked > 2


def test_a_solved_weight_is_the_nearest_one():
    """No small change of it lowers the distance to what the adapters give on their inputs."""
    torch.manual_seed(0)
    layout = next(s.layout for s in find_sites(_model())[0] if s.layout.kind == "dense")
    rows, cols = layout.groups[0].rows, layout.groups[0].cols
    updates = [layout.join([torch.randn(rows, cols, dtype=torch.float64)]) for _ in range(2)]
    inputs = [torch.randn(50, rows, dtype=torch.float64) * torch.rand(rows) for _ in range(2)]
    moments = [[x.T @ x] for x in inputs]
    weights = (0.3, 0.7)

    def distance(update: torch.Tensor) -> float:
        given = layout.split(update)[0]
        parts = [
            w * torch.trace((given - u).T @ solving._shrunk(g[0]) @ (given - u))
            for w, u, g in zip(weights, (layout.split(u)[0] for u in updates), moments, strict=True)
        ]
        return float(sum(parts))

    best = solving.solved(updates, moments, weights, layout)
    least = distance(best)
    assert least < distance(0.3 * updates[0] + 0.7 * updates[1])
    for _ in range(20):
        assert least < distance(best + 0.01 * torch.randn_like(best)) + 1e-9


def _model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False, dtype=torch.float64))


def test_mistakes_are_named(base, folders):
    one, two = folders
    with pytest.raises(ConfigError, match=r"none for .*adapter_1"):
        combine_adapters(base, {one: 1.0, two: 1.0}, {one: ethanol("train", 2)})
    with pytest.raises(ConfigError, match="above 0"):
        combine_adapters(base, {one: -1.0}, {one: ethanol("train", 2)})
