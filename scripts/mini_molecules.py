"""Molecules and labelled geometries on which the small pretrained model "mini" is trained.

The list is broad on purpose: a pretrained model helps a later fine-tuning by having seen many
kinds of H, C, N, O bonding, not by having seen one molecule often. The molecules people fine-tune
on (`EXCLUDED`) never appear, so that an error measured on them after fine-tuning owes nothing to
the pretraining set.

Needs rdkit and tblite (see pretrain_mini.py for how to install them).
"""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path

import numpy as np
from ase.build import molecule as g2_molecule
from ase.collections import g2
from ase.data import covalent_radii
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem
from tblite.interface import Calculator

RDLogger.DisableLog("rdApp.*")

HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # Angstrom
KB = 8.617333262e-5  # eV/K
AMU = 103.642697  # eV per amu (Angstrom/fs)^2
# Unpaired electrons of the ground-state atoms. GFN2-xTB atoms in their right spin state make the
# interaction energy of a molecule its atomisation energy, as the E0s of a DFT data set do.
ATOM_UHF = {1: 1, 6: 2, 7: 3, 8: 2}
ATOM_MASS = {1: 1.008, 6: 12.011, 7: 14.007, 8: 15.999}
ELEMENTS = tuple(ATOM_UHF)
MAX_ATOMS = 26
MAX_FORCE = 15.0  # eV/Angstrom: beyond it a frame is a collision, not chemistry
TEMPERATURES = (300.0, 600.0, 1100.0)  # K, one short trajectory each
SNAPSHOTS = 8  # per trajectory
STRIDE = 8  # fs between snapshots; hydrogen stretches have a period of about 10 fs
DISCARD = 15  # fs, for the velocities to share their energy with the springs
DISPLACED = 12  # randomly displaced frames per molecule
Rng = np.random.Generator
Frame = tuple[np.ndarray, float, np.ndarray]  # positions, energy, forces


# Ethanol, aspirin, azobenzene, uracil, naphthalene, salicylic acid, benzene, paracetamol,
# malonaldehyde and its enol, toluene (rMD17), acetylacetone and its enol, 3BPA; last, the
# hydroxypyrimidine forms of uracil.
EXCLUDED = """
CCO CC(=O)Oc1ccccc1C(=O)O c1ccccc1N=Nc1ccccc1 O=c1cc[nH]c(=O)[nH]1 c1ccc2ccccc2c1 OC(=O)c1ccccc1O
c1ccccc1 CC(=O)Nc1ccc(O)cc1 O=CCC=O O=CC=CO Cc1ccccc1 CC(=O)CC(C)=O CC(=O)C=C(C)O
Nc1ncccc1OCc1ccccc1 Oc1ccnc(O)n1 Oc1cc[nH]c(=O)n1
"""
# Scaffolds and groups are combined pairwise, each bonding through the first atom written.
SCAFFOLDS = """
C CC CCC C(C)C C=C CC=C C#C C1CC1 C1CCC1 C1CCCC1 C1CCOC1 C1CCNC1 c1ccccc1 c1ccncc1 c1cccnc1 c1ccccn1
c1ccoc1 c1ccco1 c1cc[nH]c1 c1cnc[nH]1 c1ccc(C)cc1 Cc1ccccc1 CCO CCN COC C(C)=O
"""
GROUPS = """
O N C=O C(=O)C C(=O)O C(=O)OC C(=O)N OC OC=O OC(=O)C NC NC=O NC(=O)C N(C)C C#N [N+](=O)[O-] C=C C#C
C=N C=NO N=C CO CN NO ON NN N=NC C(=O)NC NC(=O)N OO OC(=O)N C(C)C C=C=O N=C=O
"""
SINGLE = """
O N C [H][H] OO NN NO C=O C=C C#C C#N O=C=O N#N [C-]#[O+] C=N C=C=C C=C=O N=N OC=O NC=O CC CO CN CCC
CCCC CC(C)C CCCCC CC(C)(C)C CCCCCC CC(C)CC CCC(C)C CCCCCCC C1CC1 C1CCC1 C1CCCC1 C1CCCCC1 CC1CC1
C1=CC1 C1=CCC1 C1CC=CC1 C1C=CC=C1 C1CCC=CC1 C1C=CCC=C1 C1=CC=CCC1 C12CC1C2 C1CC2CC2C1 C1CC2CCC1C2
C1=CC2CCC1C2 C1C2CC12 C12C3C1C23 C=C1CC1 C1CC12CC2 CC=C CC=CC C=CC=C C=CC=CC=C CC(C)=C C=C=CC
CC(C)=C(C)C CC#C CC#CC C#CC#C C#CC=C C=CC#N CC=C=C CC(=C)C=C CC(=O)C CCC(C)=O CCC=O CC=O C=CC=O
C#CC=O CC(=O)C=C O=CC=O CC(=O)C=O CC(=O)C(C)=O CC(=O)CCC(C)=O O=CCCC=O O=C1CC1 O=C1CCC1 O=C1CCCC1
O=C1CCCCC1 O=C1C=CCCC1 O=C1C=CC(=O)C=C1 O=C1C=CC=CC1=O O=C1CC(=O)C1 O=C1CCC(=O)C1 O=C1CC(=O)CCC1
OC1=CC(=O)CCC1 OC1=CC(=O)CC1 O=CC(C)=CO CC(O)=CC=O OC=CC(=O)C O=CC=CN NC=CC=O CC(=O)C=CN
CC(N)=CC(C)=O CC(=O)CC=O CC(=O)CC(=O)O CC(=O)CC(=O)OC COC(=O)CC(=O)OC OC(=O)CC(=O)O NC(=O)CC(N)=O
OC=CC(=O)O OC=CC(N)=O CC(=O)C=C(O)C=C O=CC(=CO)C=O OC1=CC=CC=CC1=O NC1=CC=CC=CC1=O O=C1C=CC=CC=C1
Oc1ccccc1C=O Oc1ccccc1C(C)=O COC(=O)c1ccccc1O NC(=O)c1ccccc1O Oc1ccccc1C=N Oc1ccccc1C=NC
Oc1ccccc1C=NO Oc1ccccc1[N+](=O)[O-] Nc1ccccc1C(=O)O Nc1ccccc1C=O Nc1ccccc1[N+](=O)[O-]
OC(=O)c1cccc(O)c1 OC(=O)c1ccc(O)cc1 CC(=O)Oc1ccccc1C=O COc1ccccc1C(=O)O O=COc1ccccc1C(=O)O
OC(=O)c1ccccc1C=O CC(=O)Oc1ccccc1O CC(=O)Oc1ccccc1C CC(=O)Oc1ccc(C)cc1 CC(=O)Oc1cccc(O)c1
OC(=O)C=CC(=O)O O=C1OC(=O)C=C1 O=C1CCC(=O)O1 O=C1OC(=O)c2ccccc21 CC(=O)OC(C)=O O=COC=O CC(=O)OC=O
O=C1CCO1 O=C1CCCO1 O=C1C=CCO1 O=C1CCCCO1 O=c1cccco1 O=c1ccocc1 O=c1ccc2ccccc2o1 O=C1OCCO1 COC(=O)OC
COC=O CC(=O)OCC COC(=O)C(=O)OC OC(=O)C(=O)O O=CC(=O)O CC(=O)C(=O)O CC(O)C(=O)O OCC(=O)O OCC=O
OCC(O)CO OCCO OC(O)=O COCO COCOC C1COCO1 C1COCCO1 C1CO1 CC1CO1 C1CCO1 C1CCOC1 C1CCOCC1 C1=COC=C1
C1=COCC1 C1COC=CO1 CCOCC COC=C C=COC=C COC(C)C CC(C)O CC(C)(C)O CCCO C=CO CC(=C)O C=CCO C#CCO
CC(O)CO CC(O)C(C)O OC1CC1 OC1CCCC1 OC1CCCCC1 COCCO COCCOC COO COOC CCOO CC(=O)OO C1COO1 CC1(C)OO1
C1CCOO1 COON CCN CNC CN(C)C CC(C)N CC(C)(C)N CCNCC C1CN1 CN1CC1 C1CNC1 C1CCNC1 C1CCNCC1 CN1CCCC1
C1CNCCN1 C1COCCN1 C=CN C=CCN C#CCN NCCN NCCO NCC=O NCC(=O)O CC(N)C(=O)O CNCC(=O)O NCC#N N#CCC#N
N#CC=CC#N NCC(N)=O NC(CO)C(=O)O CC(=O)NCC(=O)O CC(=O)NCC(N)=O CNC(=O)CNC=O NC(=O)C1CCCN1
OC(=O)C1CCCN1 CC#N CCC#N C=C(C)C#N CC(C)C#N N#CC#N N#Cc1ccccc1 N#Cc1ccc(C#N)cc1 N#Cc1ccncc1
C[N+]#[C-] CN=C=O NC(N)=O CNC(N)=O CNC(=O)NC NC(=O)NN O=C1NCCN1 NC(=O)NC(N)=O NC(N)=N CC(N)=N NC=N
CN=CN C=NC CC=NC CC(C)=N CC(C)=NC CC=NO CC(C)=NO C=NO ON=CC=NO CC(=NO)C(C)=NO ONC=O CC(=O)NO CON CNO
CNOC CN(C)O C[N+](C)(C)[O-] [O-][n+]1ccccc1 C=[N+](C)[O-] CC=[N+](C)[O-] [O-][n+]1ccncc1
[O-][n+]1ccccc1C C[N+](=O)[O-] CC[N+](=O)[O-] C=C[N+](=O)[O-] CO[N+](=O)[O-] CON=O CN=O CN(C)N=O
C[NH]N=O N[N+](=O)[O-] O=[N+]([O-])c1ccc(O)cc1 O=[N+]([O-])c1ccc(N)cc1
O=[N+]([O-])c1cccc([N+](=O)[O-])c1 O=Nc1ccccc1 ON=O O[N+](=O)[O-] [O-][O+]=O C=[N+]=[N-]
CN=[N+]=[N-] CNN CNNC CN(C)N CC(=O)NN C=NN CC=NN CC(C)=NN C=NN=C CC=NN=CC CN=NC CCN=NC CN=NC=C
CC(C)N=NC C=CN=NC=C CN=Nc1ccccc1 CCN=Nc1ccccc1 C=CN=Nc1ccccc1 c1ccc(N=Nc2ccco2)cc1
c1ccc(N=Nc2ccc[nH]2)cc1 c1ccc(N=Nc2ccccn2)cc1 c1ccc(N=Nc2ccncc2)cc1 c1ccnc(N=Nc2ccccn2)c1
c1cc(N=Nc2ccco2)oc1 N=Nc1ccccc1 c1ccc(C=Nc2ccccc2)cc1 c1ccc(C=Cc2ccccc2)cc1 c1ccc(-c2ccccc2)cc1
c1ccc(-c2ccccn2)nc1 c1ccc(-c2ccco2)cc1 c1ccc(Oc2ccccc2)cc1 c1ccc(Nc2ccccc2)cc1 c1ccc(Cc2ccccc2)cc1
c1ccc(NNc2ccccc2)cc1 O=C(c1ccccc1)c1ccccc1 c1ccc(N=Nc2cnc[nH]2)cc1 CN=Nc1ccc(O)cc1 CN=Nc1ccc(N)cc1
[O-][N+](C)=NC c1ccc(-n2cccc2)cc1 c1ccc(COc2ccco2)cc1 COCc1ccccc1 CCOc1ccccc1 CCc1ccccc1 C=Cc1ccccc1
C#Cc1ccccc1 Cc1ccccc1C Cc1cccc(C)c1 Cc1ccc(C)cc1 Cc1cc(C)cc(C)c1 CC(C)c1ccccc1 CC(C)(C)c1ccccc1
CCCc1ccccc1 C=CCc1ccccc1 CC(=C)c1ccccc1 CC=Cc1ccccc1 c1ccccc1CO c1ccccc1CN Cc1ccccc1O Cc1ccc(O)cc1
Cc1ccc(N)cc1 Cc1ccccc1N Cc1ccc(C=O)cc1 Oc1ccccc1O Oc1cccc(O)c1 Oc1ccc(O)cc1 Nc1ccc(O)cc1 Nc1ccccc1O
Nc1cccc(O)c1 Nc1ccc(N)cc1 Nc1ccccc1N COc1ccc(O)cc1 COc1ccccc1O COc1ccc(N)cc1 COc1ccc(C)cc1
COc1ccc(OC)cc1 O=CNc1ccc(O)cc1 O=CNc1ccccc1 CC(=O)Nc1ccccc1 CC(=O)Nc1ccc(C)cc1 CC(=O)Nc1cccc(O)c1
CC(=O)Nc1ccccc1O CC(=O)Nc1ccccn1 CC(=O)Nc1ccncc1 CCC(=O)Nc1ccccc1 CNC(=O)c1ccccc1 CN(C=O)c1ccccc1
NC(=O)c1ccc(O)cc1 CC(=O)c1ccc(O)cc1 CC(=O)Nc1ccc(N)cc1 CC(=O)NC=CO CC(=O)NC=C CC(=O)Oc1ccc(N)cc1
COC(=O)Nc1ccccc1 NC(=O)Nc1ccccc1 CC(=O)Nc1ccc[nH]1 n1ccccc1 n1ccncc1 n1cccnc1 n1ncccc1 n1cncnc1
n1nccnc1 c1cc[nH]c1 c1cn[nH]c1 c1c[nH]cn1 c1nc[nH]n1 c1cnn[nH]1 c1nnn[nH]1 c1ccoc1 c1cocn1 c1cnoc1
c1nnco1 c1nonc1 Cn1cccc1 Cn1ccnc1 Cc1ccco1 Cc1ccoc1 Cc1ccncc1 Cc1cccnc1 Cc1ccccn1 Cc1cnccn1
Cc1cccc(C)n1 Nc1ccccn1 Nc1cccnc1 Nc1ccncc1 Nc1ncccn1 Nc1ncccc1O COc1cccnc1N Nc1ncccc1OC Nc1ncccc1C
CCOc1cccnc1N COc1cccnc1 Oc1cccnc1 Oc1ccccn1 Oc1ccncc1 Nc1cccnc1N Nc1ncccc1N Cc1cccnc1N Nc1ncccc1OC=C
O=c1cccc[nH]1 O=c1cc[nH]cc1 Cn1ccccc1=O O=c1cccn[nH]1 O=c1cnccn1 O=c1cc[nH]cn1 O=c1nccc[nH]1
Nc1cc[nH]c(=O)n1 Cc1c[nH]c(=O)[nH]c1=O Cn1ccc(=O)[nH]c1=O Nc1ccnc(N)n1 O=C1CCNC(=O)N1
O=C1CC(=O)NC(=O)N1 O=C1CNC(=O)N1 O=C1C=CC(=O)N1 O=C1CCC(=O)N1 O=C1CCN1 O=C1CCCN1 O=C1CCCCN1
CN1CCCC1=O O=C1CNC(=O)CN1 O=c1[nH]cc[nH]1 O=c1cc[nH][nH]1 O=c1[nH]cnc2nc[nH]c12 Oc1ccnc(O)n1
Nc1cc(=O)[nH]c(=O)[nH]1 O=c1[nH]ncc(=O)[nH]1 Oc1cc[nH]c(=O)n1 O=c1nc[nH]c(=O)[nH]1
O=c1ccc(=O)[nH][nH]1 O=C1NC(=O)C(=O)N1 O=C1NC(=O)c2ccccc21 Nc1ncnc2nc[nH]c12 c1ncc2[nH]cnc2n1
c1ccc2[nH]ccc2c1 c1ccc2occc2c1 c1ccc2[nH]cnc2c1 c1ccc2[nH]ncc2c1 c1ccc2ocnc2c1 c1ccc2ncccc2c1
c1ccc2cnccc2c1 c1ccc2nccnc2c1 c1ccc2ncncc2c1 c1cnc2ncccc2c1 c1ccc2cnncc2c1 C1=Cc2ccccc2C1
C1Cc2ccccc2C1 C1CCc2ccccc2C1 C1=Cc2ccccc2CC1 c1ccc2cccc-2cc1 Oc1cccc2ccccc12 Oc1ccc2ccccc2c1
Nc1cccc2ccccc12 Cc1cccc2ccccc12 Cc1ccc2ccccc2c1 O=Cc1cccc2ccccc12 O=C1C=CC(=O)c2ccccc21
c1cc2ccc3cccc4ccc(c1)c2c34 c1ccc2c(c1)ccc1ccccc12 c1ccc2cc3ccccc3cc2c1 C1=Cc2cccc3cccc1c23
c1ccc2c(c1)[nH]c1ccccc12 c1ccc2c(c1)oc1ccccc12 C1=CC=C1 c1ccn2cccc2c1 c1cn2ccccc2n1 C1c2ccccc2C=N1
O=C1C=CNC=C1 O=Cc1ccco1 O=Cc1ccc[nH]1 CC(=O)c1ccco1 OC(=O)c1ccco1 OC(=O)c1cccnc1 NC(=O)c1cccnc1
O=Cc1ccncc1 OCc1ccco1 O=C(O)c1ccccn1 O=CC=Cc1ccco1 O=CC=Cc1ccccc1 OC(=O)C=Cc1ccccc1 OC(=O)Cc1ccccc1
"""
DIMER_PARTS = "O N CO C=O NC=O OC=O CN C#N CC(=O)N C=C CC(C)=O c1ccncc1 c1cc[nH]c1"


def seed_of(name: str) -> int:
    """Depends on the name alone: adding a molecule leaves the others' frames unchanged."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def bonded(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Which pairs of atoms are bonded, as far as covalent radii tell."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[numbers]
    return (distance < 1.25 * (radii[:, None] + radii[None])) & (distance > 0)


def identity(name: str) -> str:
    """Canonical SMILES of the bare graph: explicit hydrogens, single bonds, no charge, no stereo.

    It is the same however the SMILES was written (Kekule or aromatic, E or Z), and can be had from
    a geometry too, where bond orders are unknown.
    """
    if name.startswith("g2:"):
        atoms = g2_molecule(name[3:])
        numbers = atoms.numbers.tolist()
        pairs = np.argwhere(np.triu(bonded(atoms.numbers, atoms.positions))).tolist()
    else:
        full = Chem.AddHs(Chem.MolFromSmiles(name))
        numbers = [a.GetAtomicNum() for a in full.GetAtoms()]
        pairs = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in full.GetBonds()]
    bare = Chem.RWMol()
    for number in numbers:
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        bare.AddAtom(atom)
    for i, j in pairs:
        bare.AddBond(i, j, Chem.BondType.SINGLE)
    return Chem.MolToSmiles(bare)


def combined_smiles() -> list[str]:
    """All scaffold-group pairs, shuffled so that a cap thins every scaffold and group alike."""
    pairs = []
    for scaffold in SCAFFOLDS.split():
        for group in GROUPS.split():
            parts = [Chem.MolFromSmiles("[*:1]" + part) for part in (scaffold, group)]
            pairs.append(Chem.MolToSmiles(Chem.molzip(*parts)))
    return [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))]


def single_molecules(max_combined: int = 250) -> list[str]:
    """Canonical SMILES of all single molecules: hand-written ones first, then combined ones."""
    excluded = {identity(smiles) for smiles in EXCLUDED.split()}
    excluded_names = {Chem.CanonSmiles(smiles) for smiles in EXCLUDED.split()}
    kept: dict[str, None] = {}

    def admit(smiles: str) -> bool:
        mol = Chem.MolFromSmiles(smiles)
        if mol is None or any(a.GetNumRadicalElectrons() for a in mol.GetAtoms()):
            return False
        name = Chem.MolToSmiles(mol)
        if name in kept or name in excluded_names or identity(name) in excluded:
            return False
        if Chem.AddHs(mol).GetNumAtoms() > MAX_ATOMS or Chem.GetFormalCharge(mol) != 0:
            return False
        kept[name] = None
        return True

    for smiles in SINGLE.split():
        admit(smiles)
    for smiles in combined_smiles():
        max_combined -= max_combined > 0 and admit(smiles)
    return list(kept)


def g2_names(known: set[str]) -> list[str]:
    """ASE's G2 molecules of H, C, N, O with closed shells (the model cannot see a spin state)."""
    found = []
    for name in g2.names:
        atoms = g2_molecule(name)
        magnetic = np.abs(atoms.get_initial_magnetic_moments()).sum() or atoms.numbers.sum() % 2
        usable = len(atoms) > 1 and set(atoms.numbers) <= set(ELEMENTS) and not magnetic
        if usable and identity("g2:" + name) not in known:
            found.append("g2:" + name)
    return found


def all_molecules() -> list[str]:
    """Names of all neutral closed-shell species: SMILES, or `g2:` and a name of the G2 set."""
    names = single_molecules()
    parts = DIMER_PARTS.split()
    for k, first in enumerate(parts):
        pairs = [f"{first}.{second}" for second in parts[k:]]
        names += [p for p in pairs if Chem.AddHs(Chem.MolFromSmiles(p)).GetNumAtoms() <= 16]
    return names + g2_names({identity(name) for name in [*names, *EXCLUDED.split()]})


def _embed(smiles: str, count: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    ids = list(AllChem.EmbedMultipleConfs(mol, count, randomSeed=seed))
    if not ids:
        ids = list(AllChem.EmbedMultipleConfs(mol, count, randomSeed=seed, useRandomCoords=True))
    if ids and AllChem.MMFFHasAllMoleculeParams(mol):
        AllChem.MMFFOptimizeMoleculeConfs(mol, maxIters=200)
    numbers = np.array([a.GetAtomicNum() for a in mol.GetAtoms()])
    return numbers, [np.array(mol.GetConformer(i).GetPositions()) for i in ids]


def _random_rotation(rng: Rng) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def _dock(first: np.ndarray, second: np.ndarray, rng: Rng) -> np.ndarray:
    """Put `second` beside `first`, turned at random, the closest contact 1.7 to 3.0 Angstrom."""
    first = (first - first.mean(0)) @ _random_rotation(rng).T
    second = (second - second.mean(0)) @ _random_rotation(rng).T
    contact = rng.uniform(1.7, 3.0)
    for distance in np.arange(1.5, 14.0, 0.05):
        moved = second + distance * np.array([0.0, 0.0, 1.0])
        if np.linalg.norm(first[:, None] - moved[None], axis=-1).min() >= contact:
            break
    return np.concatenate([first, moved])


def starts_of(name: str, count: int, rng: Rng) -> tuple[np.ndarray, list[np.ndarray]]:
    """Atomic numbers and up to `count` starts: G2 geometry, RDKit conformers, or docked pairs."""
    if name.startswith("g2:"):
        atoms = g2_molecule(name[3:])
        return atoms.numbers, [atoms.positions.copy()]
    parts = name.split(".")
    if len(parts) == 1:
        return _embed(name, count, seed_of(name))
    numbers, conformers = zip(*(_embed(part, 1, seed_of(name)) for part in parts), strict=True)
    starts = [_dock(*(c[0] for c in conformers), rng) for _ in range(count) if all(conformers)]
    return np.concatenate(numbers), starts


class Labeller:
    """GFN2-xTB energy (eV) and forces (eV/Angstrom) of one species, reusing the last density."""

    def __init__(self, numbers: np.ndarray, uhf: int = 0) -> None:
        self.numbers, self.uhf = np.asarray(numbers), uhf
        self.calculator = None
        self.result = None

    def __call__(self, positions: np.ndarray, fresh: bool = False) -> tuple[float, np.ndarray]:
        bohr = positions / BOHR
        if self.calculator is None:
            self.calculator = Calculator("GFN2-xTB", self.numbers, bohr, uhf=self.uhf)
            self.calculator.set("verbosity", 0)
            self.calculator.set("accuracy", 0.5)
        else:
            self.calculator.update(bohr)
        # A far-away geometry gains nothing from the old density, and could inherit its bad state.
        self.result = self.calculator.singlepoint(None if fresh else self.result)
        energy = float(self.result.get("energy")) * HARTREE
        return energy, -np.asarray(self.result.get("gradient")) * HARTREE / BOHR


def check_units() -> float:
    """Largest deviation (eV/Angstrom) of water's forces from a central difference."""
    label = Labeller(np.array([8, 1, 1]))
    geometry = np.array([[0.0, 0.0, 0.1], [0.8, 0.1, -0.5], [-0.7, 0.0, -0.5]])
    forces, step, worst = label(geometry)[1], 1e-3, 0.0
    for index in np.ndindex(3, 3):
        ahead, behind = geometry.copy(), geometry.copy()
        ahead[index] += step
        behind[index] -= step
        slope = (label(ahead)[0] - label(behind)[0]) / (2 * step)
        worst = max(worst, abs(-slope - forces[index]))
    if worst > 0.02:
        raise RuntimeError(f"tblite forces differ from a finite difference by {worst} eV/Angstrom")
    return worst


def atomic_energies() -> dict[int, float]:
    """GFN2-xTB energies (eV) of the isolated ground-state atoms: the E0s."""
    return {z: Labeller(np.array([z]), uhf)(np.zeros((1, 3)))[0] for z, uhf in ATOM_UHF.items()}


def langevin(label: Labeller, start: np.ndarray, temperature: float, rng: Rng) -> list[Frame]:
    """Snapshots (positions, energy, forces) of a short trajectory, 1 fs steps.

    Starts with twice the kinetic energy of `temperature`: half of it goes into the potential, as
    the start geometry is near a minimum, and so the short run is warm from its first snapshot on.
    """
    mass = np.array([ATOM_MASS[int(z)] for z in label.numbers])[:, None]
    thermal = np.sqrt(KB * temperature / (mass * AMU))
    velocity = rng.normal(size=start.shape) * thermal * math.sqrt(2)
    keep = math.exp(-0.02)  # friction 0.02 / fs
    position, taken = start.copy(), []
    energy, forces = label(position, fresh=True)
    for step in range(1, DISCARD + SNAPSHOTS * STRIDE + 1):
        velocity += 0.5 * forces / (mass * AMU)
        position = position + 0.5 * velocity
        noise = rng.normal(size=start.shape) * thermal * math.sqrt(1 - keep * keep)
        velocity = keep * velocity + noise
        position = position + 0.5 * velocity
        energy, forces = label(position)
        velocity += 0.5 * forces / (mass * AMU)
        if step > DISCARD and (step - DISCARD) % STRIDE == 0:
            taken.append((position, energy, forces))
        if np.abs(forces).max() > 5 * MAX_FORCE:
            break
    return taken


def stretch_bond(numbers: np.ndarray, positions: np.ndarray, rng: Rng) -> np.ndarray:
    """Lengthen or shorten one bond by moving all that hangs on one of its ends."""
    graph = bonded(numbers, positions)
    pairs = np.argwhere(graph)
    if not len(pairs):
        return positions
    fixed, moved = (int(i) for i in pairs[rng.integers(len(pairs))])
    graph[fixed, moved] = graph[moved, fixed] = False
    side, front = {moved}, [moved]
    while front:
        fresh = set(np.flatnonzero(graph[front.pop()]).tolist()) - side
        side |= fresh
        front += fresh
    if fixed in side:  # a ring bond: only its end atom can move
        side = {moved}
    direction = positions[moved] - positions[fixed]
    out = positions.copy()
    out[sorted(side)] += rng.uniform(-0.15, 0.4) * direction / np.linalg.norm(direction)
    return out


def sample_molecule(job: tuple[str, Path]) -> int:
    """Make and label one molecule's frames, write them to its own file, return their number."""
    name, target = job
    if target.exists():
        with np.load(target) as part:
            return len(part["energy"])
    rng = np.random.default_rng(seed_of(name))
    numbers, starts = starts_of(name, len(TEMPERATURES), rng)
    label = Labeller(numbers)
    frames: list[Frame] = []
    for k, temperature in enumerate(TEMPERATURES if starts else ()):
        try:
            frames += langevin(label, starts[k % len(starts)], temperature, rng)
        except RuntimeError:  # the SCF failed
            label = Labeller(numbers)
    base = [f[0] for f in frames] or starts
    for k in range(DISPLACED if base else 0):
        positions = base[rng.integers(len(base))]
        if k % 3 == 0:
            positions = stretch_bond(numbers, positions, rng)
        sigma = rng.uniform(0.0, 0.04) if k % 3 == 0 else rng.uniform(0.02, 0.12)
        positions = positions + sigma * rng.normal(size=positions.shape)
        try:
            frames.append((positions, *label(positions, fresh=True)))
        except RuntimeError:
            label = Labeller(numbers)
    frames = [f for f in frames if np.abs(f[2]).max() < MAX_FORCE and np.isfinite(f[1])]
    shape = (len(frames), len(numbers), 3)
    temporary = target.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        numbers=np.tile(numbers, (len(frames), 1)),
        positions=np.array([f[0] for f in frames]).reshape(shape),
        energy=np.array([f[1] for f in frames]),
        forces=np.array([f[2] for f in frames]).reshape(shape),
    )
    os.replace(temporary, target)
    return len(frames)
