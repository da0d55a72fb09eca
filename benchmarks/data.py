"""Time and memory of geometry and graph: python benchmarks/data.py --atoms 24000 --cutoff 12

The structure of the paper's scaling figures: disordered HfO2, 0.083 atoms/A^3, a 48 x 32 x 23.6 A cell of 3,000 atoms tiled
2x2x2. Builds the edges, their vectors, distances and partners, and stores the graph. With --targets a GeSb2Te4 cell (DZVP) with
made-up blocks instead: coupling, gauge, reference and targets, stored. Prints one JSON line last; kb_per_edge is the growth of
the peak resident memory over what the structure took.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from ase import Atoms

from hamscale.basis import Basis, read_element_basis
from hamscale.files import provenance
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import structure_graph, write_graph
from hamscale.graph.neighbours import edges_within
from hamscale.operators import Operators
from network import gst, peak_bytes, unit_reference


def jittered(n: int, lengths, rng: np.random.Generator) -> np.ndarray:
    """Positions at random sites of a grid, each moved by up to a quarter of its spacing, (n, 3)."""
    lengths = np.asarray(lengths, float)
    grid = np.ceil((n * 1.05) ** (1 / 3) * lengths / lengths.prod() ** (1 / 3)).astype(int)
    sites = np.stack(np.meshgrid(*[np.arange(g) for g in grid], indexing="ij"), -1).reshape(-1, 3)
    sites = sites[np.sort(rng.permutation(len(sites))[:n])]
    return (sites + 0.5 + rng.uniform(-0.25, 0.25, sites.shape)) / grid * lengths


def disordered(n_atoms: int) -> Atoms:
    """Atoms on a jittered grid in a cell of an eighth of them, tiled."""
    n = n_atoms // 8
    lengths = np.array([48, 32, 23.6]) * (n / 0.083 / (48 * 32 * 23.6)) ** (1 / 3)
    rng = np.random.default_rng(0)
    positions = jittered(n, lengths, rng)
    symbols = rng.permutation((["Hf", "O", "O"] * n)[:n])
    return Atoms(symbols, positions, cell=lengths, pbc=True).repeat((2, 2, 2))


def made_up_operators(atoms, basis, cutoff: float) -> Operators:
    """Hermitian blocks of random numbers on every pair within the cutoff."""
    edges = edges_within(atoms, cutoff)
    own = np.zeros((len(atoms), 5), np.int64)
    own[:, 0] = own[:, 1] = np.arange(len(atoms))
    pairs = np.concatenate([edges, own])
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    orbitals = basis.n_orbitals(atoms.numbers)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(orbitals[pairs[:, 0]] * orbitals[pairs[:, 1]]).sum())
    operators = Operators(atoms, basis, pairs, values, values.copy())
    operators.make_hermitian(operators.hamiltonian)
    operators.overlap = operators.hamiltonian * 0.01
    return operators


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--atoms", type=int, default=24000)
    parser.add_argument("--cutoff", type=float, default=12.0, help="Angstrom")
    parser.add_argument("--targets", action="store_true")
    o = parser.parse_args()
    elements, name = (["Ge", "Sb", "Te"], "DZVP-MOLOPT-SR-GTH") if o.targets else (["Hf", "O"], "SZV-MOLOPT-SR-GTH")
    basis = Basis(read_element_basis(e, name, "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e in elements)
    if o.targets:
        atoms, reference = gst(o.atoms), unit_reference(basis, o.cutoff)
        operators = made_up_operators(atoms, basis, o.cutoff)
    else:
        atoms = disordered(o.atoms)
    before, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        graph = BlockCodec(reference).encode(operators) if o.targets else structure_graph(atoms, basis, o.cutoff)
        built = time.perf_counter() - start
        write_graph(Path(folder) / "graph.h5", graph)
    edges = len(graph.edges)
    result = vars(o) | {
        "edges": edges,
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_building": round(built, 2),
        "cpu_ms_per_1000_edges": round(1e6 * (time.process_time() - cpu) / edges, 3),
        "kb_per_edge": round((peak_bytes() - before) / 1024 / edges, 3),
        "peak_gib": round(peak_bytes() / 2**30, 2),
    }
    print(json.dumps(result | provenance()))


if __name__ == "__main__":
    main()
