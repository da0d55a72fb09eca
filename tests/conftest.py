"""What tests share: bases, structures, a Hamiltonian that needs no DFT, CP2K runs made once per session."""

import os

# BLAS of tests, and of the programs that they start, on one thread: threads that spin for each other take minutes on a busy machine
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import gzip
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.spacegroup import crystal
from scipy.linalg import eigh
from scipy.spatial.transform import Rotation
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from hamscale.basis import Basis, material_basis, read_element_basis
from hamscale.config import Material
from hamscale.dft.inputs import cp2k_input
from hamscale.dft.outputs import RECORD, parse_output, read_run
from hamscale.dft.run import run_cp2k
from hamscale.graph.overlap import overlap_table
from hamscale.operators import Operators, group_by_species, write_operators
from hamscale.structures import wrap_as_cp2k

DATA = Path(__file__).parent / "data"
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
    for z_i, z_j, blocks, index in group_by_species(atoms.numbers, orbitals, pairs, offsets):
        S[index] = table.blocks(z_i, z_j, pairs.vectors[blocks])
        H[index] = S[index] * (energy[pairs[blocks, 0]] + energy[pairs[blocks, 1]])[:, None] / 2
    operators = Operators(atoms, basis, pairs, H, S, {"source": "dft", "wall_seconds": 0.0})
    operators.make_hermitian(operators.hamiltonian)
    operators.make_hermitian(operators.overlap)
    return operators


@pytest.fixture(scope="session")
def rotation() -> np.ndarray:
    return Rotation.random(rng=np.random.default_rng(5)).as_matrix()


@pytest.fixture(scope="session")
def szv() -> Basis:
    return basis_of(Hf=SZV, O=SZV)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> dict[str, Path]:
    """Folders of recorded CP2K 2023.1 runs.

    Water as binary and as text; Si8 with 2x2x2 k-points: all elements, and CP2K's own files of those above 1e-9.
    """
    root = tmp_path_factory.mktemp("recorded")
    for name in ("h2o_bin", "h2o_txt"):
        (root / name).mkdir()
        for path in (DATA / "h2o").glob(f"{name}*.gz"):
            target = "run.out" if ".out" in path.name else path.name.removesuffix(".gz")
            (root / name / target).write_bytes(gzip.decompress(path.read_bytes()))
    log = gzip.decompress((DATA / "si8" / "si8.out.gz").read_bytes())
    for name in ("si8", "si8_cut"):
        (root / name).mkdir()
        (root / name / "run.out").write_bytes(log)
    with tarfile.open(DATA / "si8" / "si8t_csr.tar.xz") as archive:
        archive.extractall(root / "unpacked", filter="data")
    for path in (root / "unpacked").rglob("*.csr"):
        shutil.move(path, root / "si8_cut" / path.name)
    # every element, recorded as one of each +-R to save space: written out again as CP2K's files
    full = np.load(DATA / "si8" / "HSR_half.npz")
    number = {tuple(R): n for n, R in enumerate(full["R"].tolist(), start=1)}
    for name in ("KS", "S"):
        for k, half in enumerate(full["half"]):
            part = slice(*full[f"{name}_ptr"][k : k + 2])
            i, j, R = full[f"{name}_i"][part], full[f"{name}_j"][part], full["R"][half]
            for row, column, cell in ((i, j, R), (j, i, -R)):
                records = np.empty(len(row), RECORD)
                records["head"] = records["tail"] = 16
                records["row"], records["column"], records["value"] = row + 1, column + 1, full[f"{name}_v"][part]
                records.tofile(root / "si8" / f"si8-{name}_SPIN_1_R_{number[tuple(cell.tolist())]}-1_0.csr")
    return {name: root / name for name in ("h2o_bin", "h2o_txt", "si8", "si8_cut")}


def of_log(directory: Path, basis: Basis) -> Operators:
    """A recorded run of the silicon cube, with the atoms its own log prints."""
    output = parse_output(directory / "run.out")
    return read_run(directory, Atoms(output.elements, output.positions, cell=[5.431] * 3, pbc=True), basis)


@pytest.fixture(scope="session")
def si8(recorded) -> Operators:
    """Eight atoms, all elements as CP2K wrote them, and the atoms where it counts its images from."""
    operators = of_log(recorded["si8"], basis_of(Si=SZV))
    atoms = operators.atoms.copy()
    atoms.positions -= 5.431 * np.trunc(atoms.positions / 5.431 + 0.5)  # all are positive
    return replace(operators, atoms=atoms)


@pytest.fixture(params=["dft", "si8"])
def solid(request) -> Operators:
    """A model with s, p and d shells, then H and S of DFT."""
    return request.getfixturevalue(request.param)


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


def calculate(atoms: Atoms, settings: Material, directory: Path) -> tuple[Path, Basis]:
    """A real CP2K run: folder and basis."""
    basis = material_basis(settings)
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_suffix(".inp")
    path.write_text(cp2k_input(atoms, settings, basis))
    run_cp2k(path, directory)
    return directory, basis


WATER = Atoms("OHH", [(0, 0, 0.117), (0, 0.757, -0.469), (0, -0.757, -0.469)], cell=[7.0] * 3, pbc=False)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, tuple[Path, Basis, Atoms]]:
    """Real CP2K runs, once: a molecule, the same turned, silicon and hafnia in triclinic cells."""
    root = tmp_path_factory.mktemp("runs")
    turn = Rotation.random(rng=np.random.default_rng(5)).as_matrix()
    water, turned = WATER.copy(), WATER.copy()
    water.positions += 3.5
    turned.positions = WATER.positions @ turn.T + 3.5
    dry = material({"H": DZVP, "O": DZVP}, cutoff_ry=400, rel_cutoff_ry=40)
    cases = {
        "water": (water, dry),
        "water_turned": (turned, dry),
        "silicon": (silicon(1), material({"Si": SZV}, cutoff_ry=100, rel_cutoff_ry=30, kpoints=(2, 1, 1))),
        "hafnia": (hafnia(1), material({"Hf": SZV, "O": SZV}, cutoff_ry=120, rel_cutoff_ry=30)),
    }
    return {name: (*calculate(atoms, settings, root / name), atoms) for name, (atoms, settings) in cases.items()}


@pytest.fixture(scope="session")
def dft(szv) -> Operators:
    """A crystal's operators; tests take changed copies of it."""
    return model_hamiltonian(hafnia(), szv)


@pytest.fixture(scope="session")
def water() -> Operators:
    """A molecule's operators."""
    return model_hamiltonian(WATER, basis_of(H="SZV-MOLOPT-GTH", O="SZV-MOLOPT-GTH"))


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
analysis: {kgrid: [2, 1, 1], band_points: 12}
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


class Browser:
    """A headless Chromium that notes every request and every message of the console."""

    def __init__(self, folder: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", f"user-data-dir={folder}", "window-size=1400,1000",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))

    def open(self, path: Path):
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.driver.get(path.resolve().as_uri())
        return self.driver

    def console(self) -> list[tuple[str, str]]:
        return [(entry["level"], entry["message"]) for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, but for what is in the page itself, or in the browser's own first one."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:", "chrome:"))]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not Path("/usr/bin/chromium").exists():
        pytest.fail("Chromium is not installed: run tests/setup_programs.sh, as `make test` does.")
    result = Browser(tmp_path_factory.mktemp("chromium"))
    yield result
    result.driver.quit()
