"""Things that tests share and import: bases, structures, a Hamiltonian that needs no DFT, copies of the workflow, patience."""

import gzip
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import yaml
from ase import Atoms
from ase.spacegroup import crystal
from filelock import FileLock
from scipy.linalg import eigh

from hamscale.basis import Basis, material_basis, read_element_basis
from hamscale.config import Material
from hamscale.container import Source, new_h5
from hamscale.dft.inputs import cp2k_input
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import read_run
from hamscale.dft.run import run_cp2k
from hamscale.graph.overlap import overlap_table
from hamscale.operators import Operators, group_by_species, write_operators
from hamscale.structures import wrap_as_cp2k

DATA = Path(__file__).parent / "data"
# seconds that a test waits for something that takes a few: a busy machine is slow, and faulthandler_timeout of pyproject.toml
# is longer
PATIENCE = 800

SZV, DZVP = "SZV-MOLOPT-SR-GTH", "DZVP-MOLOPT-SR-GTH"


def basis_of(**sets: str) -> Basis:
    return Basis(read_element_basis(e, name, "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e, name in sets.items())


def rattled(atoms: Atoms, seed: int, amplitude: float = 0.1) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, atoms.positions.shape)
    return wrap_as_cp2k(atoms)


def rotated(atoms: Atoms, R: np.ndarray) -> Atoms:
    atoms = atoms.copy()
    atoms.set_cell(np.asarray(atoms.cell) @ R.T)
    atoms.positions = atoms.positions @ R.T
    return atoms


def hafnia(seed: int = 0) -> Atoms:
    """Fluorite HfO2, three atoms in a triclinic cell, rattled."""
    primitive = crystal(
        ["Hf", "O"], [(0, 0, 0), (0.25, 0.25, 0.25)], spacegroup=225, cellpar=[5.08] * 3 + [90] * 3, primitive_cell=True
    )
    return rattled(Atoms(primitive.numbers, primitive.positions + 0.1, cell=primitive.cell, pbc=True), seed)


def silicon(seed: int = 0) -> Atoms:
    return rattled(ase.build.bulk("Si", "diamond", a=5.431), seed)


def model_hamiltonian(atoms: Atoms, basis: Basis) -> Operators:
    """H_ij = (v_i + v_j) S_ij / 2 with v_i an element's energy and a sum over the atom's neighbours.

    Rotates, permutes and tiles as a Hamiltonian of DFT does, is more than two-centre, and costs nothing.
    """
    table = overlap_table(basis)
    pairs = table.pairs(atoms)
    crowding = np.where(pairs.onsite, 0, np.exp(-((pairs.distances / 1.5) ** 2)))
    crowding = np.bincount(pairs[:, 0], crowding, minlength=len(atoms))
    energy = -0.3 - 0.002 * atoms.numbers + 5 * crowding
    orbitals = basis.n_orbitals(atoms.numbers)
    offsets = np.concatenate([[0], np.cumsum(orbitals[pairs[:, 0]] * orbitals[pairs[:, 1]])])
    S, H = np.empty(offsets[-1]), np.empty(offsets[-1])
    for z_i, z_j, blocks, places in group_by_species(atoms.numbers, orbitals, pairs, offsets):
        overlap = table.blocks(z_i, z_j, pairs.vectors[blocks])
        places.put(S, overlap)
        places.put(H, overlap * (energy[pairs[blocks, 0]] + energy[pairs[blocks, 1]])[:, None] / 2)
    operators = Operators(atoms, basis, pairs, H, S, {"source": "dft", "wall_seconds": 0.0})
    operators.make_hermitian(operators.hamiltonian)
    operators.make_hermitian(operators.overlap)
    return operators


def magnetic(operators: Operators, splitting: float = 0.05) -> Operators:
    """The same with an H of each spin, which differ by a share of H and so turn, permute and tile as it does."""
    H = operators.hamiltonian
    return replace(operators, hamiltonian=np.stack([(1 + splitting) * H, (1 - splitting) * H]))


def atoms_of_log(directory: Path) -> Atoms:
    """The atoms of a recorded run of the silicon cube, as its own log prints them."""
    output = parse_output(directory / "run.out")
    return Atoms(output.elements, output.positions, cell=[5.431] * 3, pbc=True)


def of_log(directory: Path, basis: Basis) -> Operators:
    """A recorded run of the silicon cube, with the atoms its own log prints."""
    return read_run(directory, atoms_of_log(directory), basis)


def unpacked(name: str, folder: Path) -> Path:
    """A folder with the files of a recorded run of tests/data/cp2k."""
    recorded = DATA / "cp2k" / name
    folder.mkdir()
    for path in recorded.glob("*.gz"):
        (folder / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    if (archive := recorded / "csr.tar.xz").is_file():
        shutil.unpack_archive(archive, folder)
    return folder


def written(folder: Path, operators: Operators) -> Path:
    """The file of some operators."""
    write_operators(folder / "operators.h5", operators)
    return folder / "operators.h5"


KPOINTS = [(0.0, 0.0, 0.0), (0.5, 0.0, 0.5), (0.13, -0.27, 0.41)]


def bands_hartree(operators: Operators) -> np.ndarray:
    """Eigenvalues at KPOINTS, (K, n)."""
    return np.array([eigh(*operators.at_k(k), eigvals_only=True) for k in KPOINTS])


def bands_of_cells(H: dict, S: dict) -> np.ndarray:
    """Eigenvalues at KPOINTS of dense matrices by cell, H(k) = sum_R exp(2 pi i k.R) H(R)."""
    result = []
    for k in KPOINTS:
        Hk, Sk = (sum(np.exp(2j * np.pi * np.dot(k, R)) * M for R, M in matrices.items()) for matrices in (H, S))
        result.append(eigh(Hk, Sk, eigvals_only=True))
    return np.array(result)


def material(species: dict[str, str], **dft) -> Material:
    return Material.model_validate(
        {
            "species": {element: {"basis": basis} for element, basis in species.items()},
            "dft": dft,
            "structures": {"train": {"split": "train", "builder": {"name": "bulk"}}},
        }
    )


def calculate(atoms: Atoms, settings: Material, directory: Path):
    """Run CP2K; the folder is there if the run was accepted. A test that calls this asks for the fixture `cp2k`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_suffix(".inp")
    path.write_text(cp2k_input(atoms, settings, material_basis(settings)))
    run_cp2k(path, directory)


WATER = Atoms("OHH", [(0, 0, 0.117), (0, 0.757, -0.469), (0, -0.757, -0.469)], cell=[7.0] * 3, pbc=False)


# a material that CP2K needs seconds for
TOY = """
species:
  Si: {basis: SZV-MOLOPT-SR-GTH}
dft: {cutoff_ry: 80, rel_cutoff_ry: 30, eps_default: 1.0e-8}
structures:
  train: &crystal
    split: train
    count: 2
    builder: {name: bulk, arguments: {name: Si, crystalstructure: diamond, a: 5.431}}
    rattle_angstrom: 0.1
  validation: {<<: *crystal, split: validation, count: 1}
  test: {<<: *crystal, split: test, count: 1}
  tiled: {split: predict, tile: {of: test-000}, repeat: [2, 1, 1]}
graph: {cutoff_angstrom: 5.0}
analysis: {kgrid: [2, 1, 1], band_points: 12, transmission: {axis: a, kgrid: [8, 1, 1], points: 40}}
"""


def copy_workflow(folder: Path, material: str, models: dict) -> Path:
    """The workflow with its profiles in a folder, where the material `toy` is learnt by the first of some models."""
    root = Path(__file__).parents[1]
    shutil.copy(root / "Snakefile", folder)
    for name in ("workflow", "envs", "alps", "resources"):
        shutil.copytree(root / name, folder / name)
    for name in ("materials", "models"):
        (folder / "config" / name).mkdir(parents=True)
    (folder / "config" / "config.yaml").write_text(f"runs: [{{material: toy, model: {next(iter(models))}}}]\n")
    (folder / "config" / "materials" / "toy.yaml").write_text(material)
    for name, model in models.items():
        (folder / "config" / "models" / f"{name}.yaml").write_text(yaml.safe_dump(model))
    return folder


def wait_for(condition: Callable, what: str, seconds: float = PATIENCE):
    """Call `condition` until its result is true, and return that result.

    Fails, saying that `what` was waited for, after so many seconds.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


@contextmanager
def shared_by_workers(tmp_path_factory, name: str) -> Iterator[Path]:
    """Yield a folder that all workers of pytest-xdist share; while one is inside, and may fill it, the others wait.

    https://pytest-xdist.readthedocs.io/en/stable/how-to.html#making-session-scoped-fixtures-execute-only-once
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of the session; a worker has one of its own in it
    with FileLock(base / f"{name}.lock"):
        yield base / name


@contextmanager
def forged(path):
    """Open a protected file for changes, as someone does who then gives it the digests of what is in it."""
    with closing(Source(path)) as source:
        os.truncate(path, source.size)
        with new_h5(path, path, source.schema, source) as file:
            yield file
