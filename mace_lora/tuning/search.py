"""Which short runs are made: successive halving over methods and rates, then over frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mace_lora.adapters.registry import options_of
from mace_lora.training import recipes
from mace_lora.tuning.trials import Outcome, train

STEPS = (200, 600)  # of the optimiser, in the first round and in the second
KEPT = 1 / 3  # of the candidates, for the second round
PARTS = (0.25, 0.5)  # of the training frames, for the question whether more would help
# Method, preset, learning rates
GRID: Sequence[tuple[str, str | None, tuple[float, ...]]] = (
    ("full", None, (0.001, 0.002, 0.005, 0.01)),
    ("lora", "max-accuracy", (0.005, 0.01, 0.02)),
    ("lora", "balanced", (0.01, 0.02)),
)


@dataclass(frozen=True)
class Candidate:
    """Flags that are tried, by the name that people see."""

    name: str
    flags: Mapping[str, object]


@dataclass(frozen=True)
class Tried:
    """A candidate, how long it was trained on how many frames, and how well it did."""

    candidate: Candidate
    steps: int
    frames: int
    outcome: Outcome


def candidates() -> list[Candidate]:
    """Those of GRID."""
    found = []
    for method, preset, rates in GRID:
        rank = options_of(method).presets[preset]["rank"] if preset else None
        for rate in rates:
            name = f"{method}{f', {preset} (rank {rank})' if preset else ''}, lr {rate:g}"
            flags: dict[str, object] = {"adapter": method, "lr": rate}
            found.append(Candidate(name, flags | ({f"{method}_preset": preset} if preset else {})))
    return found


@dataclass
class Search:
    """All short runs of one question.

    Args:
        folder: where each run has a folder of its own.
        settings: flags of all runs.
        files: training files by their number of frames; the largest has all.
        n_atoms: of all training frames.
        say: told of each run that is done.
        at_once: how many runs, each in a process of its own.
    """

    folder: Path
    settings: Mapping[str, object]
    files: Mapping[int, Path]
    n_atoms: int
    say: Callable[[Tried], None]
    at_once: int = 1

    def halve(self, tried: Sequence[Candidate]) -> list[Tried]:
        """All candidates for a short while, the best of them for longer; best last."""
        everything = max(self.files)
        first = self._each([partial(self._try, c, STEPS[0], everything) for c in tried])
        best = sorted(first, key=lambda t: t.outcome.score)[: max(1, math.ceil(KEPT * len(first)))]
        second = self._each([partial(self._try, t.candidate, STEPS[1], everything) for t in best])
        return [*first, *sorted(second, key=lambda t: -t.outcome.score)]

    def by_frames(self, candidate: Candidate) -> list[Tried]:
        """A candidate on parts of the training frames and on all, as long as in the second round.

        All are trained for as many steps: what differs is what they have seen.
        """
        return self._each([partial(self._try, candidate, STEPS[1], n) for n in sorted(self.files)])

    def _each(self, runs: Sequence[Callable[[], Tried]]) -> list[Tried]:
        """`at_once` of them beside each other; in their order. The first that fails ends it."""
        with ThreadPoolExecutor(self.at_once) as workers:
            waiting = [workers.submit(run) for run in runs]
            try:
                return [run.result() for run in waiting]
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise

    def _try(self, candidate: Candidate, steps: int, frames: int) -> Tried:
        batch = recipes.by_data(frames, frames * self.n_atoms // max(self.files), 0)["batch_size"]
        size = int(str(self.settings.get("batch_size", batch.value)))
        epochs = math.ceil(steps / max(1, frames // size))
        flags = {
            **self.settings,
            **candidate.flags,
            "train_file": str(self.files[frames].resolve()),
            "batch_size": size,
            "max_num_epochs": epochs,
        }
        name = "-".join(str(v) for v in candidate.flags.values())
        folder = self.folder / f"{name}-{steps}-steps-{frames}-frames"
        outcome = train(folder, flags, self.at_once)
        done = Tried(candidate, steps, frames, outcome)
        self.say(done)
        return done
