"""Fixtures of the tests, and the programs that some of them need.

A test that runs a program asks for the fixture `cp2k`, `browser`, `graphviz`, `mkdocs`, `mpirun` or `slurm`, itself or by a
fixture that does, and so carries the marker of that name. Where a program is missing its tests are deselected, which a line at
the end says; with --all-programs, as `make test` has it, that is an error.
"""

import os

# BLAS of tests, and of the programs that they start, runs on one thread: threads that spin for each other take minutes on a
# busy machine
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import graphene
from scipy.spatial.transform import Rotation

from hamscale.basis import Basis, material_basis
from hamscale.dft.csr import RECORD
from hamscale.dft.outputs import read_run
from hamscale.operators import Operators
from helpers import (
    DATA,
    DZVP,
    SZV,
    WATER,
    atoms_of_log,
    basis_of,
    calculate,
    hafnia,
    material,
    model_hamiltonian,
    rattled,
    shared_by_workers,
    silicon,
)
from programs import PROGRAMS, missing_programs

MISSING = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser):
    parser.addoption("--all-programs", action="store_true", help="a missing program is an error; tests are not deselected")


def pytest_configure(config):
    config.stash[MISSING] = missing_programs()
    if config.getoption("all_programs") and config.stash[MISSING]:
        missing = "; ".join(config.stash[MISSING].values())
        raise pytest.UsageError(f"missing are {missing}. Install them, or run `pytest` without --all-programs.")


@pytest.hookimpl(tryfirst=True)  # before markers are looked at
def pytest_collection_modifyitems(config, items):
    """Mark each test by the programs its fixtures run, deselect those whose program is missing, and put long modules first."""
    for item in items:
        for name in PROGRAMS.keys() & set(item.fixturenames):
            item.add_marker(name)
    missing = config.stash[MISSING]
    lost = [item for item in items if any(item.get_closest_marker(name) for name in missing)]
    if lost:
        config.hook.pytest_deselected(items=lost)
        items[:] = [item for item in items if item not in lost]
    if hasattr(config, "workerinput"):
        # a module goes to one worker as a whole: what begins last should not be what takes longest
        order = {path: 3 for path in {item.path for item in items}}
        for item in items:
            for rank, name in enumerate(("slurm", "cp2k", "browser")):
                if item.get_closest_marker(name):
                    order[item.path] = min(order[item.path], rank)
        items.sort(key=lambda item: order[item.path])


def pytest_terminal_summary(terminalreporter, config):
    if missing := config.stash[MISSING]:
        markers = ", ".join(missing)
        terminalreporter.write_line(
            f"tests marked {markers} are not run: missing are {'; '.join(missing.values())}", yellow=True
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide CP2K from a test that is not marked.

    A test that forgets the fixture then fails on every machine, not only where CP2K is missing.
    """
    with pytest.MonkeyPatch.context() as environment:
        if not item.get_closest_marker("cp2k"):
            environment.setenv("HAMSCALE_CP2K", "a-test-that-runs-cp2k-asks-for-the-fixture-cp2k")
        return (yield)


@pytest.fixture(scope="session")
def cp2k():
    """CP2K of this machine, as `hamscale.dft.run.cp2k_command` finds it."""


@pytest.fixture(scope="session")
def graphviz():
    """The program `dot`."""


@pytest.fixture(scope="session")
def mkdocs():
    """MkDocs, with what envs/docs.lock has beside it."""


@pytest.fixture(scope="session")
def mpirun():
    """Open MPI's mpirun."""


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium, one for each worker."""
    from chromium import Browser

    result = Browser(tmp_path_factory.mktemp("chromium"))
    yield result
    result.driver.quit()


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
    shutil.unpack_archive(DATA / "si8" / "si8t_csr.tar.xz", root / "unpacked")
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


@pytest.fixture(scope="session")
def si8(recorded) -> Operators:
    """Eight atoms, all elements as CP2K wrote them, and the atoms where it counts its images from."""
    atoms = atoms_of_log(recorded["si8"])
    atoms.positions -= 5.431 * np.trunc(atoms.positions / 5.431 + 0.5)  # all are positive
    return read_run(recorded["si8"], atoms, basis_of(Si=SZV))


@pytest.fixture(scope="session")
def sheet() -> Operators:
    """A sheet's operators, periodic along a and b."""
    return model_hamiltonian(rattled(graphene("BN", a=2.5, vacuum=6.0), 0), basis_of(B=SZV, N=SZV))


@pytest.fixture(params=["dft", "si8", "sheet"])
def solid(request) -> Operators:
    """A model with s, p and d shells, then H and S of DFT, then a sheet."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def runs(cp2k, tmp_path_factory) -> dict[str, tuple[Path, Basis, Atoms]]:
    """Real CP2K runs, made once a session: a molecule, the same turned, silicon and hafnia in triclinic cells."""
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
    result = {}
    with shared_by_workers(tmp_path_factory, "runs") as root:
        for name, (atoms, settings) in cases.items():
            if not (root / name).exists():  # an accepted run is moved there as a whole
                calculate(atoms, settings, root / name)
            result[name] = root / name, material_basis(settings), atoms
    return result


@pytest.fixture(scope="session")
def dft(szv) -> Operators:
    """A crystal's operators; tests take changed copies of it."""
    return model_hamiltonian(hafnia(), szv)


@pytest.fixture(scope="session")
def water() -> Operators:
    """A molecule's operators."""
    return model_hamiltonian(WATER, basis_of(H="SZV-MOLOPT-GTH", O="SZV-MOLOPT-GTH"))
