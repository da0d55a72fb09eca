"""What partitioners make of a structure: python benchmarks/partition.py --atoms 24000 --cutoff 12 --parts 128 --method min-nn

Prints one JSON line last. --shape: paper, a disordered 48 x 32 x 23.6 A cell of 3,000 atoms at 0.083 atoms/A^3 tiled 2x2x2
(other numbers of atoms scale the cell); cube, a cubic cell of 3,000 atoms tiled n x n x n; slab, with 40 A of vacuum;
triclinic; wire, 30 A thick along z in vacuum; step, twice as dense in one half. Without --method: all three on all shapes and
numbers of parts, into --csv, one row each. seconds: the partitioner alone; seconds_lists: the lists of what travels. The graph
is not counted.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms

from data import disordered, jittered
from hamscale.files import provenance, write_text
from hamscale.graph.neighbours import edges_within
from hamscale.partition import METHODS, TiledEdges, partition


def hard(shape: str, n: int) -> Atoms:
    """Structures that are not one dense box."""
    density, rng = 0.083, np.random.default_rng(0)
    if shape == "slab":
        thick = 20.0
        side = (n / density / thick) ** 0.5
        return Atoms("O" * n, jittered(n, [side, side, thick], rng), cell=[side, side, thick + 40], pbc=True)
    if shape == "wire":
        thick = 30.0
        length = n / density / thick**2
        positions = jittered(n, [thick, thick, length], rng) + [20, 20, 0]
        return Atoms("O" * n, positions, cell=[thick + 40, thick + 40, length], pbc=True)
    side = (n / density) ** (1 / 3)
    if shape == "step":
        half = [side / 2, side, side]
        dense, thin = (
            jittered(2 * n // 3, half, rng),
            jittered(n - 2 * n // 3, half, np.random.default_rng(1)) + [side / 2, 0, 0],
        )
        return Atoms("O" * n, np.concatenate([dense, thin]), cell=[side] * 3, pbc=True)
    atoms = Atoms("O" * n, jittered(n, [side] * 3, rng), cell=[side] * 3, pbc=True)
    skewed = np.array([[1, 0, 0], [0.5, 3**0.5 / 2, 0], [0.3, 0.3, 0.9]])
    atoms.set_cell(skewed * side / np.linalg.det(skewed) ** (1 / 3), scale_atoms=True)
    return atoms


def structure_and_edges(shape: str, n: int, cutoff: float):
    if shape == "cube":
        tiles = round((n / 3000) ** (1 / 3))
        side = (3000 / 0.083) ** (1 / 3)
        unit = Atoms("O" * 3000, jittered(3000, [side] * 3, np.random.default_rng(0)), cell=[side] * 3, pbc=True)
        repeat = (tiles,) * 3
        return unit.repeat(repeat), TiledEdges(edges_within(unit, cutoff), 3000, repeat)
    atoms = disordered(n) if shape == "paper" else hard(shape, n)
    edges = edges_within(atoms, cutoff)
    return atoms, [(edges[:, 0].copy(), edges[:, 1].copy())]


def measured(atoms, edges, cutoff: float, parts: int, method: str, ranks_per_node: int = 1) -> dict:
    started = time.perf_counter()
    result = partition(atoms, edges, cutoff, parts, method, ranks_per_node=ranks_per_node)
    whole = time.perf_counter() - started
    quality = result.quality()
    return {
        "atoms": len(atoms),
        "edges": int(result.edges.sum()),
        "cutoff_angstrom": cutoff,
        "parts": parts,
        "method": method,
        **{name: round(value, 4) for name, value in quality.items()},
        "bytes_per_exchange_mean": round(quality["sent_mean"] * 1600),
        "seconds": round(result.attributes["seconds"], 4),
        "seconds_lists": round(whole - result.attributes["seconds"], 4),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["paper", "cube", "slab", "triclinic", "wire", "step"], default="paper")
    parser.add_argument("--atoms", type=int, default=24000)
    parser.add_argument("--cutoff", type=float, default=12.0, help="Angstrom")
    parser.add_argument("--parts", type=int, default=128)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path("resources/raw/partition.csv"))
    o = parser.parse_args()
    if o.method:
        atoms, edges = structure_and_edges(o.shape, o.atoms, o.cutoff)
        row = measured(atoms, edges, o.cutoff, o.parts, o.method, o.ranks_per_node)
        print(json.dumps({"shape": o.shape} | row | provenance()))
        return
    rows = []
    cases = [("paper", 24000, cutoff, (32, 64, 128)) for cutoff in (12.0, 14.0)]
    cases += [(shape, 12000, 12.0, (64, 100)) for shape in ("slab", "triclinic", "wire", "step")]
    for shape, n, cutoff, all_parts in cases:
        atoms, edges = structure_and_edges(shape, n, cutoff)
        for parts in all_parts:
            for method in METHODS:
                rows.append({"shape": shape} | measured(atoms, edges, cutoff, parts, method))
                print(json.dumps(rows[-1]), flush=True)
    write_text(o.csv, pd.DataFrame([row | provenance() for row in rows]).to_csv(index=False))
    print(json.dumps({"rows": len(rows), "csv": str(o.csv)} | provenance()))


if __name__ == "__main__":
    main()
