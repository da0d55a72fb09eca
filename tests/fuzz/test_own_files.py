"""Mutants of our own files: each is refused in a line, or taken and the same in every value.

FUZZ says how many mutants of each kind there are; `make fuzz` sets it.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fuzz.mutate import mutants
from hamscale.config import Network
from hamscale.container import identity
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import read_graph, write_graph
from hamscale.graph.neighbours import Neighbourhood
from hamscale.graph.reference import fit_reference, read_reference, write_reference
from hamscale.inputs.model_folder import load_model, save_model
from hamscale.inputs.tensors import build_network
from hamscale.operators import read_operators, write_operators
from hamscale.partition import partition
from hamscale.partition.halo import read_owner, write_partition
from hamscale.train.checkpoint import read_checkpoint, write_checkpoint
from helpers import SZV, basis_of, model_hamiltonian, silicon

COUNT = int(os.environ.get("FUZZ", "60"))
SECONDS = 10
MEMORY = 2**28  # beside eight times the file


def flat(value):
    """All numbers and texts that an object holds, in order."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return [np.asarray(value).tobytes()]
    if isinstance(value, dict):
        return [part for key, inner in sorted(value.items(), key=str) for part in (str(key), *flat(inner))]
    if isinstance(value, list | tuple):
        return [part for inner in value for part in flat(inner)]
    if isinstance(value, torch.nn.Module):
        return flat(value.state_dict())
    if hasattr(value, "__dict__"):
        return flat({name: inner for name, inner in vars(value).items() if not name.startswith("_")})
    return [repr(value)]


def operators(path):
    o = read_operators(path / "operators.h5")
    basis = [(e.name, e.text, e.potential, e.valence) for e in o.basis.values()]
    structure = [o.atoms.numbers, o.atoms.positions, o.atoms.cell[:], o.atoms.pbc]
    return flat([structure, o.pairs.table, o.hamiltonian, o.overlap, dict(o.attributes), basis, o.orbital_energies])


def graph(path):
    g = read_graph(path / "graph.h5")
    return flat([g.atoms.numbers, g.atoms.positions, g.atoms.cell[:], g.edges.table, g.offsite, g.onsite, g.crystal_field,
                 g.attributes, g.cutoff_angstrom])  # fmt: skip


def reference(path):
    r = read_reference(path / "reference.h5")
    field = r.crystal_field
    return flat([r.cutoff_angstrom, r.reach_angstrom, r.longest_cell_angstrom, r.two_centre, r.scale, r.onsite_scale,
                 r.outside_fraction, r.floor_hartree, field.charges, field.centre, field.mean, field.tables,
                 field.coefficients, field.overlap, field.spread])  # fmt: skip


READERS = {
    "operators": operators,
    "graph": graph,
    "reference": reference,
    "partition": lambda path: flat(read_owner(path / "partition.h5", silicon(), 2, 5.0)),
    "model": lambda path: flat([network.state_dict() for network in load_model(path / "model")[0]]),
    "checkpoint": lambda path: flat(read_checkpoint(path / "checkpoint.safetensors")),
}
FILES = {kind: [f"{kind}.h5"] for kind in ("operators", "graph", "reference", "partition")} | {
    "model": [f"model/{name}" for name in ("config.json", "weights.safetensors", "reference.h5")],
    "checkpoint": ["checkpoint.safetensors"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small valid files of each kind."""
    folder, basis = tmp_path_factory.mktemp("valid"), basis_of(Si=SZV)
    of = model_hamiltonian(silicon(), basis)
    write_operators(folder / "operators.h5", of)
    fitted = fit_reference([of], 5.0)
    write_reference(folder / "reference.h5", fitted, {"operators": [identity(folder / "operators.h5")]})
    encoded = BlockCodec(fitted).encode(of)
    write_graph(folder / "graph.h5", encoded)
    write_partition(folder / "partition.h5", partition(of.atoms, Neighbourhood(of.atoms, 5.0), 5.0, 2), of.atoms)
    sizes = Network(
        lmax=1, channels=2, layers=1, hidden=2, heads=1, values=2, attention=2, feed_forward=2, gaussians=2, radial=2
    )
    torch.manual_seed(0)
    weights = build_network(sizes, fitted).state_dict()
    save_model(folder / "model", [weights], sizes.model_dump(), folder / "reference.h5", {})
    write_checkpoint(folder / "checkpoint.safetensors", weights, {"step": 3, "fingerprint": "0", "rows": [{"a": 1.5}]})
    return folder


def renamed(path: Path, seed: int) -> None:
    """Rename, copy, delete or retype a part of an HDF5 file with libhdf5, and leave its digests as they were."""
    random = np.random.default_rng(seed)
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name, other = random.choice(names, 2)
        how = random.integers(5)
        if how == 0:
            file.move(name, f"{name}x")
        elif how == 1:
            del file[name]
        elif how == 2:
            file.copy(name, f"copy of {name.replace('/', ' ')}")
        elif how == 3 and isinstance(file[name], h5py.Dataset):
            values = file[name][()]
            del file[name]
            file[name] = values.astype(random.choice(["f4", "i8", ">f8", "c16"]))
        elif how == 4 and isinstance(file[name], h5py.Dataset) and isinstance(file[other], h5py.Dataset):
            values = file[other][()]
            del file[name]
            file[name] = values


def judge(kind: str, folder: Path, expected: list) -> str:
    """Read a mutant, and say what came of it."""
    signal.alarm(SECONDS)
    try:
        found = READERS[kind](folder)
    except (ValueError, OSError) as error:
        return "refused" if "\n" not in str(error).strip() else f"many lines: {error!r}"
    except MemoryError:
        return "memory"
    except Exception as error:  # noqa: BLE001  whatever is raised is what is looked for
        return f"traceback: {error!r}"
    finally:
        signal.alarm(0)
    return "same" if found == expected else "taken and different"


def work(kind: str, valid: str, folder: str, count: int) -> None:
    """Judge mutants of a kind, and print how many came to what; to be run in a process of its own."""
    root, target = Path(valid), Path(folder)
    expected, counts, first = READERS[kind](root), {}, {}
    sources = FILES[kind]
    largest = max((root / name).stat().st_size for name in sources)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY + 8 * largest,) * 2)
    shutil.copytree(root, target, dirs_exist_ok=True)
    for number, name in enumerate(name for _ in range(count) for name in sources):
        if number >= count:
            break
        data = (root / name).read_bytes()
        if name.endswith(".h5") and number % 5 == 4:
            (target / name).write_bytes(data)
            renamed(target / name, number)
        else:
            (target / name).write_bytes(next(mutants(data, 1, number)))
        print(number, flush=True)
        came = judge(kind, target, expected)
        counts[came] = counts.get(came, 0) + 1
        first.setdefault(came, number)
        (target / name).write_bytes(data)
    print(json.dumps([counts, first]))


@pytest.mark.parametrize("kind", READERS)
def test_mutants_are_refused_or_the_same(files, tmp_path, kind):
    code = f"import test_own_files as t; t.work({kind!r}, {str(files)!r}, {str(tmp_path / 'm')!r}, {COUNT})"
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{here.parent}:{os.environ.get('PYTHONPATH', '')}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0, f"after mutant {last}: {done.stderr[-2000:]}"
    counts, first = json.loads(last)
    assert set(counts) <= {"refused", "same"}, (counts, first)
    assert sum(counts.values()) == COUNT
    assert counts["refused"] > 0.8 * COUNT
