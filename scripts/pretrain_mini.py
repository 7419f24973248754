"""Train the embedded small foundation model "mini" from scratch.

mini is a small ScaleShiftMACE for H, C, N, O, trained on GFN2-xTB energies and forces of several
hundred small molecules. GFN2-xTB is cheap enough to label everything here in minutes, and
qualitatively right about bonding, which is what a fine-tuning to DFT data starts from.

The labels come from tblite and the conformers from RDKit; both are dependencies of these scripts
only, not of the package:  pip install tblite rdkit

Three stages, each rerunnable; a stage that was interrupted continues where it stopped:

    python scripts/pretrain_mini.py frames --work WORK
    python scripts/pretrain_mini.py train  --work WORK --minutes 45
    python scripts/pretrain_mini.py export --work WORK
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

# The labelling processes inherit this: molecules are labelled in parallel, each one is tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import mini_molecules as source  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from ase.data import chemical_symbols  # noqa: E402

from mace_lora.upstream import mini  # noqa: E402

Batch = dict[str, torch.Tensor]


def split_of(name: str) -> str:
    """Whole molecules are held out, chosen by name so that adding others moves none of them."""
    draw = np.random.default_rng(source.seed_of(name) + 1).random()
    return "valid" if draw < 0.05 else "test" if draw < 0.10 else "train"


def command_frames(args: argparse.Namespace) -> None:
    """Sample and label all molecules, then gather their files into WORK/frames.npz."""
    print(f"forces agree with finite differences to {source.check_units():.1e} eV/Angstrom")
    parts = args.work / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    names = source.all_molecules()
    jobs = [(name, parts / f"{source.seed_of(name):010d}.npz") for name in names]
    begin, counts = time.time(), []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for count in pool.imap(source.sample_molecule, jobs, chunksize=4):
            counts.append(count)
            if len(counts) % 50 == 0:
                seconds = time.time() - begin
                print(f"{len(counts)}/{len(jobs)} molecules, {sum(counts)} frames, {seconds:.0f} s")
    loaded = [dict(np.load(target)) for _, target in jobs]
    energies = source.atomic_energies()
    np.savez(
        args.work / "frames.npz",
        numbers=np.concatenate([part["numbers"].ravel() for part in loaded]),
        positions=np.concatenate([part["positions"].reshape(-1, 3) for part in loaded]),
        forces=np.concatenate([part["forces"].reshape(-1, 3) for part in loaded]),
        energy=np.concatenate([part["energy"] for part in loaded]),
        sizes=np.repeat([part["numbers"].shape[1] for part in loaded], counts),
        molecule=np.repeat(np.arange(len(names)), counts),
        names=np.array(names),
        splits=np.array([split_of(name) for name in names]),
        atomic_energies=np.array([energies[z] for z in source.ELEMENTS]),
    )
    print(f"{sum(counts)} frames of {len(names)} molecules, {time.time() - begin:.0f} s")


class Frames:
    """The labelled frames with their neighbour lists, computed once and collated for each step."""

    def __init__(self, path: Path, r_max: float) -> None:
        raw = np.load(path)
        self.names, self.splits = raw["names"], raw["splits"]
        self.molecule, self.energy = raw["molecule"], raw["energy"]
        self.atomic_energies = raw["atomic_energies"]
        ends = np.cumsum(raw["sizes"])[:-1]
        self.numbers = np.split(raw["numbers"], ends)
        positions = [torch.from_numpy(p) for p in np.split(raw["positions"], ends)]
        self.positions = [p.float() for p in positions]
        self.forces = [torch.from_numpy(f).float() for f in np.split(raw["forces"], ends)]
        self.kinds = [torch.from_numpy(np.searchsorted(source.ELEMENTS, n)) for n in self.numbers]
        self.edges = []
        for p in positions:  # isolated molecules: no periodic images, and few enough pairs for all
            near = torch.cdist(p, p) < r_max
            self.edges.append(near.fill_diagonal_(False).nonzero().T.contiguous())
        # The network sees energies relative to the atoms; float32 would lose digits of the totals.
        e0 = dict(zip(source.ELEMENTS, self.atomic_energies, strict=True))
        self.binding = np.array(
            [e - sum(e0[int(z)] for z in n) for e, n in zip(self.energy, self.numbers, strict=True)]
        )

    def indices(self, split: str) -> np.ndarray:
        """Frames of the molecules of one split."""
        return np.flatnonzero(self.splits[self.molecule] == split)

    def collate(self, chosen: np.ndarray) -> Batch:
        """One graph of several frames, in the form the model's `forward` takes, with targets."""
        sizes = torch.tensor([len(self.positions[i]) for i in chosen])
        ptr = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        edges = torch.cat([self.edges[i] + ptr[k] for k, i in enumerate(chosen)], dim=1)
        kinds = torch.cat([self.kinds[i] for i in chosen])
        zeros = torch.zeros(edges.shape[1], 3)
        return {
            "positions": torch.cat([self.positions[i] for i in chosen]),
            "node_attrs": torch.nn.functional.one_hot(kinds, len(source.ELEMENTS)).float(),
            "edge_index": edges,
            "shifts": zeros,
            "unit_shifts": zeros,
            "cell": torch.zeros(3 * len(chosen), 3),
            "batch": torch.repeat_interleave(torch.arange(len(chosen)), sizes),
            "ptr": ptr,
            "head": torch.zeros(len(chosen), dtype=torch.long),
            "sizes": sizes,
            "binding": torch.tensor(self.binding[chosen], dtype=torch.float32),
            "target_forces": torch.cat([self.forces[i] for i in chosen]),
        }


def architecture_for(frames: Frames, train: np.ndarray, args: argparse.Namespace) -> dict:
    """Constructor arguments in plain JSON, as the model card stores them."""
    atoms = sum(len(frames.numbers[i]) for i in train)
    edges = sum(frames.edges[i].shape[1] for i in train)
    return {
        "r_max": args.r_max,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": args.max_ell,
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "interaction_cls_first": "RealAgnosticResidualInteractionBlock",
        "num_interactions": 2,
        "hidden_irreps": args.hidden_irreps,
        "MLP_irreps": "16x0e",
        "avg_num_neighbors": round(edges / atoms, 4),
        "atomic_numbers": list(source.ELEMENTS),
        "correlation": 3,
        "gate": "silu",
        "radial_MLP": [64, 64, 64],
    }


def initial_model(frames: Frames, train: np.ndarray, architecture: dict) -> torch.nn.Module:
    """A fresh float32 model with its energies of atoms, scale and shift taken from the data."""
    torch.manual_seed(0)
    model = mini.construct(architecture, torch.float32)
    atoms = np.array([len(frames.numbers[i]) for i in train])
    forces = torch.cat([frames.forces[i] for i in train])
    with torch.no_grad():
        model.atomic_energies_fn.atomic_energies.copy_(torch.tensor(frames.atomic_energies)[None])
        model.scale_shift.scale.fill_(forces.pow(2).mean().sqrt().item())
        model.scale_shift.shift.fill_(float(np.mean(frames.binding[train] / atoms)))
    return model


def predict(model: torch.nn.Module, batch: Batch, training: bool) -> list[torch.Tensor]:
    """Errors of the interaction energies per atom (eV) and of the forces (eV/Angstrom)."""
    out = model(batch, training=training)
    energy = (out["interaction_energy"] - batch["binding"]) / batch["sizes"]
    return [energy, out["forces"] - batch["target_forces"]]


def evaluate(model: torch.nn.Module, frames: Frames, chosen: np.ndarray) -> dict[str, float]:
    """Mean absolute errors in meV/atom and meV/Angstrom."""
    errors: list[list[torch.Tensor]] = []
    for start in range(0, len(chosen), 64):
        batch = frames.collate(chosen[start : start + 64])
        errors.append([e.detach().abs() for e in predict(model, batch, training=False)])
    energy, forces = (
        1000 * float(torch.cat(column).mean()) for column in zip(*errors, strict=True)
    )
    return {
        "energy_mae_meV_per_atom": round(energy, 2),
        "forces_mae_meV_per_angstrom": round(forces, 2),
    }


def loss_of(energy: torch.Tensor, forces: torch.Tensor) -> torch.Tensor:
    """Huber losses in units of their thresholds: linear for large errors, quadratic for small.

    A squared loss would spend the small network on the hottest frames. The energy enters per atom
    and with weight 2, which makes it about a quarter of the loss at convergence.
    """

    def scaled(x: torch.Tensor, delta: float) -> torch.Tensor:
        return torch.nn.functional.huber_loss(x, torch.zeros_like(x), delta=delta) / delta

    return 2.0 * scaled(energy, 0.01) + scaled(forces, 0.05)


class Trainer:
    """Model, optimiser and running average of the weights, with a resumable checkpoint.

    Each of `world` processes takes its share of every batch, one thread each: the tensors of small
    molecules are too small for threads to help, while whole processes scale with the cores.
    """

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank, self.world = args, rank, args.processes
        self.frames = Frames(args.work / "frames.npz", args.r_max)
        self.train, self.valid = (self.frames.indices(s) for s in ("train", "valid"))
        self.architecture = architecture_for(self.frames, self.train, args)
        self.model = initial_model(self.frames, self.train, self.architecture)
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, amsgrad=True)
        self.step, self.seconds = 0, 0.0
        self.path = args.work / "checkpoint.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = state["average"]
            self.step, self.seconds = state["step"], state["seconds"]
        self.begin = time.time() - self.seconds

    def save(self) -> None:
        """Write the checkpoint, through a temporary file so that it is never half written."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average, "step": self.step, "seconds": self.seconds}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def averaged(self) -> torch.nn.Module:
        """A model with the averaged weights, the one that is judged and exported."""
        model = initial_model(self.frames, self.train, self.architecture)
        model.load_state_dict(self.average, strict=False)  # the average has no buffers
        return model

    def progress(self) -> float:
        """How far the schedule is: by steps, or by time if that runs out first."""
        return max(self.step / self.args.steps, self.seconds / (60 * self.args.minutes))

    def share_gradients(self) -> None:
        """Average gradients, and the clock too, so that all processes keep the same schedule."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        clock = torch.tensor([time.time() - self.begin])
        flat = torch.cat([g.flatten() for g in gradients] + [clock])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        pieces = flat.split([g.numel() for g in gradients] + [1])
        for gradient, piece in zip(gradients, pieces, strict=False):
            gradient.copy_(piece.view_as(gradient))
        self.seconds = float(pieces[-1])

    def update(self, chosen: np.ndarray) -> float:
        """One optimiser step on these frames, of which this process takes its share."""
        warmup = min(1.0, (self.step + 1) / 200)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * warmup * (0.005 + 0.995 * cosine)
        batch = self.frames.collate(chosen[self.rank :: self.world])
        loss = loss_of(*predict(self.model, batch, training=True))
        self.optimizer.zero_grad()
        loss.backward()
        self.share_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.step += 1
        # The average follows fast at first: it must not remember the random start.
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)
        return loss.item()


def train_process(rank: int, args: argparse.Namespace) -> None:
    """Train until the steps or the minutes are used up; the first process keeps the checkpoint."""
    torch.set_num_threads(1)
    if args.processes > 1:
        meeting = f"file://{(args.work / 'meeting').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    trainer = Trainer(args, rank)
    size, count = args.batch, len(trainer.train)
    if rank == 0:
        print(f"{count} frames to train on, {len(trainer.valid)} to validate, step {trainer.step}")
    saved, losses, per_epoch = time.time(), [], count // size
    while trainer.progress() < 1:
        epoch, place = divmod(trainer.step, per_epoch)
        order = np.random.default_rng(epoch).permutation(trainer.train)[place * size :]
        for start in range(0, len(order) - size + 1, size):
            losses.append(trainer.update(order[start : start + size]))
            done = trainer.progress() >= 1
            if rank == 0 and (done or time.time() - saved > 180):
                trainer.save()
                subset = trainer.valid[:: max(1, len(trainer.valid) // 300)]
                print(
                    f"step {trainer.step}, epoch {trainer.step / per_epoch:.2f}, "
                    f"{trainer.seconds:.0f} s, loss {np.mean(losses):.4f}, "
                    f"validation {evaluate(trainer.averaged(), trainer.frames, subset)}"
                )
                saved, losses = time.time(), []
            if done:
                break
    if args.processes > 1:
        dist.destroy_process_group()


def command_train(args: argparse.Namespace) -> None:
    """Start the training processes and wait for them."""
    (args.work / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train_process, (args,), nprocs=args.processes)


def write_holdout(frames: Frames, path: Path, count: int = 60) -> None:
    """A sample of the test frames as extended XYZ, spread evenly over the held-out molecules."""
    test = frames.indices("test")
    chosen = test[np.linspace(0, len(test) - 1, count).astype(int)]
    lines: list[str] = []
    for i in chosen:
        lines += [
            str(len(frames.numbers[i])),
            "Properties=species:S:1:pos:R:3:REF_forces:R:3 "
            f'REF_energy={frames.energy[i]:.6f} config_type=Default pbc="F F F" '
            f'molecule="{frames.names[frames.molecule[i]]}"',
        ]
        rows = torch.cat([frames.positions[i], frames.forces[i]], dim=1).tolist()
        for number, row in zip(frames.numbers[i], rows, strict=True):
            lines.append(chemical_symbols[number] + "".join(f" {x:.6f}" for x in row))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)


def card_for(frames: Frames, errors: dict[str, dict[str, float]]) -> dict:
    """What mini is, for people who choose whether to start from it."""
    count = {s: (frames.splits == s).sum() for s in ("train", "valid", "test")}
    size = {s: len(frames.indices(s)) for s in count}
    dimers = sum("." in name for name in frames.names)
    trained_on = (
        f"{size['train']} frames of {count['train']} neutral closed-shell species of H, C, N and O "
        "with 2 to 26 atoms (hydrocarbons, aromatics and heteroaromatics, and the common oxygen "
        "and nitrogen functional groups; SMILES written by hand and combined, ASE's G2 set, and "
        f"{dimers} small dimers counted over all splits), labelled with GFN2-xTB (tblite). Per "
        "species: snapshots of short Langevin dynamics at 300, 600 and 1100 K, and randomly "
        "displaced and bond-stretched geometries; frames with a force component above "
        f"{source.MAX_FORCE:g} eV/Angstrom were dropped. The energies of atoms (E0s) are GFN2-xTB "
        "energies of isolated atoms in their ground spin states. Held out as whole molecules: "
        f"{count['valid']} species ({size['valid']} frames) for validation and {count['test']} "
        f"species ({size['test']} frames) for test. Never included: the ten rMD17 molecules, "
        "acetylacetone and 3BPA, the enols of malonaldehyde and acetylacetone, and uracil's "
        "hydroxypyrimidine tautomers."
    )
    return {
        "trained_on": trained_on,
        "errors": errors,
        "units": {"energy": "eV", "length": "Angstrom", "forces": "eV/Angstrom"},
        "licence": "MIT",
    }


def command_export(args: argparse.Namespace) -> None:
    """Judge the averaged weights of the last checkpoint and write the package files."""
    trainer = Trainer(args, rank=0)
    model, frames = trainer.averaged(), trainer.frames
    errors = {
        "validation": evaluate(model, frames, trainer.valid),
        "test": evaluate(model, frames, frames.indices("test")),
    }
    print(f"step {trainer.step}: {errors}")
    mini.export(model, trainer.architecture, card_for(frames, errors), args.folder)
    write_holdout(frames, args.folder / "mini_holdout.xyz")


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("frames", "train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder for frames and checkpoint")
    parser.add_argument("--processes", type=int, default=2, help="for labelling and for training")
    parser.add_argument("--minutes", type=float, default=45.0, help="training time, at most")
    parser.add_argument("--steps", type=int, default=1_000_000, help="training steps, at most")
    parser.add_argument("--batch", type=int, default=16, help="frames per step, all processes")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--r-max", type=float, default=5.0)
    parser.add_argument("--max-ell", type=int, default=2)
    parser.add_argument("--hidden-irreps", default="32x0e + 32x1o")
    parser.add_argument("--folder", type=Path, default=ROOT / "mace_lora" / "data")
    args = parser.parse_args()
    {"frames": command_frames, "train": command_train, "export": command_export}[args.stage](args)


if __name__ == "__main__":
    main()
