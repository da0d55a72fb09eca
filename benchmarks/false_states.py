"""How long states are, by energy: python benchmarks/false_states.py FILES... --out resources/raw/false_states.csv

FILES: operators of DFT, results/M/operators/ID.h5. Of every structure the smallest eigenvalue of S, and for ranges of energy
above the highest occupied state the largest and the mean v^+ v of the states (v^+ S v = 1), at random k-points. A state with a
large v^+ v lies along directions that S nearly misses: such states belong high, and one near the gap is suspect
(`hamscale.analysis.false_states`).
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from hamscale.analysis.false_states import random_kpoints
from hamscale.files import write_table
from hamscale.operators import read_operators
from hamscale.units import hartree_to_ev
from hamscale.workers import eigh

EDGES_EV = (-np.inf, 0.01, 4.0, 8.0, 20.0, 60.0, np.inf)
KPOINTS = 8


def lengths(path: Path) -> list[dict]:
    """A row per range of energy of one structure."""
    operators = read_operators(path)
    occupied, energies, squares, smallest = operators.n_electrons // 2, [], [], []
    for k in random_kpoints(operators)[:KPOINTS]:
        H, S = operators.at_k(k)
        e, v = eigh(H, S)
        energies.append(hartree_to_ev(e - e[occupied - 1]))
        squares.append(np.square(np.abs(v)).sum(0))
        smallest.append(np.linalg.eigvalsh(S)[0])
    energies, squares = np.concatenate(energies), np.concatenate(squares)
    rows = []
    for low, high in zip(EDGES_EV, EDGES_EV[1:]):
        within = squares[(energies >= low) & (energies < high)]
        if len(within):
            rows.append({"from_ev": low, "to_ev": high, "largest": within.max(), "mean": within.mean(), "states": len(within)})
    names = {"material": path.parents[1].name, "structure": path.stem, "orbitals": operators.n_orbitals}
    return [names | {"smallest_overlap_eigenvalue": min(smallest)} | row for row in rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    table = pd.DataFrame([row for path in o.operators for row in lengths(path)])
    print(table.to_string(index=False))
    write_table(o.out, table)


if __name__ == "__main__":
    main()
