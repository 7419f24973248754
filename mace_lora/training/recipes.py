"""What suits a fine-tuning, for every flag that the user does not give. Knows no torch.

mace-torch's defaults are those of a training from random numbers: with them forces alone count, and
the energies of a fine-tuned model end worse than they began. The values here are flags of
mace-torch's and of ours; one that the user gives wins. How they were chosen is in README.md of this
folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

OURS, MACE_TORCH = "fine-tuning", "mace-torch"  # values of --defaults

RATE, HIGHEST_RATE = 0.005, 0.05
DECAY = 0.001  # of a change, at a step: the weight decay times the learning rate
STEPS = 2000  # of the optimiser, at least
STEPS_PER_VALIDATION = 50
LEAST_EPOCHS = 20
MOST_FRAMES, MOST_ATOMS = 10, 2000  # of a batch


@dataclass(frozen=True)
class Choice:
    """A flag's value, and why it suits."""

    value: object
    why: str


# Adapters start as no change, so that weight decay pulls a model back to its start
_RATES = {
    "lr": Choice(RATE, "suits all methods with the schedule below"),
    "schedule": Choice("cosine", "the last steps settle"),
}
_DECAY = {
    "optimizer": Choice("adamw", "with the weight decay below"),
    "weight_decay": Choice(
        DECAY / RATE, "pulls towards the foundation model, where the data don't object"
    ),
}
_WEIGHTS = {
    "energy_weight": Choice(300.0, "energies per atom are small numbers beside forces"),
    "forces_weight": Choice(10.0, "energies per atom are small numbers beside forces"),
}
_STEADY = {
    "clip_grad": Choice(1.0, "for all steps to be of one size"),
    "ema": Choice(True, "averaged weights are judged and saved"),
    "ema_decay": Choice(0.999, "averaged weights are judged and saved"),
}
_BESIDE = {
    "protect": Choice(True, "walls between atoms stay where the data say nothing"),
    "solve_e0s": Choice(True, "energies keep their mean while forces are learnt"),
    "plot": Choice(False, "a run draws its own pictures, from predictions that it has"),
}
RECIPE: Mapping[str, Choice] = {**_RATES, **_DECAY, **_WEIGHTS, **_STEADY, **_BESIDE}

# Flags that are chosen once the frames are read
BY_DATA = (
    *("batch_size", "valid_batch_size", "max_num_epochs", "patience", "eval_interval"),
    *("loss", "stress_weight", "error_table"),
)
# Flags with which the ones above would contradict each other
_ASKING = ("swa", "lbfgs", "scheduler", "lr_factor", "scheduler_patience", "pt_train_file")
# All flags of mace-torch's where it matters whether the user gave them
FLAGS = (*RECIPE, *BY_DATA, *_ASKING, "multiheads_finetuning")


def before_data(given: Mapping[str, object], scaling: float = 1.0) -> dict[str, Choice]:
    """The flags that the user did not give, and that don't contradict one given.

    Args:
        given: flags that the user gave.
        scaling: of the updates of the method. A small one is made up for by the learning rate.
    """
    left_out: set[str] = set(given)
    if {"energy_weight", "forces_weight", "stress_weight", "loss"} & given.keys():
        left_out |= _WEIGHTS.keys()  # they mean something beside each other, and to a loss
    if given.get("lbfgs"):
        left_out |= {*_RATES, *_DECAY, *_STEADY, "protect"}
    if given.get("optimizer", "adamw") != "adamw":
        left_out.add("weight_decay")  # of other optimisers it is another thing
    if given.get("swa") or {"scheduler", "lr_factor", "scheduler_patience"} & given.keys():
        left_out.add("schedule")
    if given.get("multiheads_finetuning") or given.get("pt_train_file"):
        # replay sets its own rates, and has its own way to keep what the foundation model knew
        left_out |= {*_RATES, *_DECAY, *_WEIGHTS, *_STEADY, "protect"}
    chosen = {flag: choice for flag, choice in RECIPE.items() if flag not in left_out}
    if "lr" in chosen and scaling < 1:
        why = f"{RATE:g} would suit updates of scale 1, and these are of {scaling:g}"
        chosen["lr"] = Choice(min(RATE / scaling, HIGHEST_RATE), why)
    if "weight_decay" in chosen:
        rate = float(str(chosen["lr"].value if "lr" in chosen else given.get("lr", RATE)))
        decay = min(1.0, float(f"{DECAY / rate:.3g}")) if rate > 0 else 0.0
        chosen["weight_decay"] = Choice(decay, RECIPE["weight_decay"].why)
    return chosen


def left_to_data(given: Mapping[str, object]) -> frozenset[str]:
    """Those of BY_DATA that the data may decide."""
    left_out = set(given)
    if {"energy_weight", "forces_weight", "stress_weight"} & given.keys():
        left_out.add("stress_weight")
    if given.get("multiheads_finetuning") or given.get("pt_train_file"):
        left_out |= {"loss", "stress_weight", "error_table"}
    if given.get("lbfgs"):
        left_out |= set(BY_DATA) - {"loss", "stress_weight", "error_table"}
    if given.get("swa"):
        left_out |= {"max_num_epochs", "eval_interval"}
    return frozenset(BY_DATA) - left_out


def by_data(n_frames: int, n_atoms: int, n_stress: int) -> dict[str, Choice]:
    """What suits these training frames, of BY_DATA.

    Args:
        n_frames: to train on.
        n_atoms: in all of them.
        n_stress: how many of them have a stress.
    """
    size = min(max(n_frames // 10, 1), MOST_FRAMES, max(1, MOST_ATOMS * n_frames // n_atoms))
    found = {
        "batch_size": Choice(size, f"{n_frames} training frames"),
        "valid_batch_size": Choice(2 * size, "twice as many: there are no gradients to keep"),
    }
    if n_stress:
        why = f"{n_stress} training frames have a stress"
        found["loss"] = Choice("stress", why)
        found["stress_weight"] = Choice(10000.0, "a small number beside forces")
        found["error_table"] = Choice("PerAtomRMSEstressvirials", why)
    return found


def by_steps(steps: int) -> dict[str, Choice]:
    """How long to train and how often to look, of BY_DATA.

    Args:
        steps: of one epoch.
    """
    epochs = max(LEAST_EPOCHS, math.ceil(STEPS / steps))
    interval = math.ceil(STEPS_PER_VALIDATION / steps)
    return {
        "max_num_epochs": Choice(epochs, f"{epochs * steps:,} steps"),
        "patience": Choice(epochs, "the schedule ends the run"),
        "eval_interval": Choice(interval, f"a validation every {interval * steps} steps"),
    }
