"""Who owns what, and what every rank exchanges with whom, of the structure of the scaling figures: python benchmarks/domains.py

Disordered HfO2, 24,000 atoms: 2 x 2 x 2 of a 3,000-atom cell, and for the 1-D tiling 8 x 1 x 1 of it. Writes exact counts:
fig5_domains.csv, the atoms within 2.2 A of three faces and their owners, 64 parts, 12 A; partition_ranks.csv, what every rank
has and exchanges, 32 to 128 parts, 12 and 14 A; topology.csv, embeddings between any two ranks per exchange, both ways, at 12
A.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from data import disordered
from hamscale.files import provenance, write_table
from hamscale.graph.neighbours import edges_within
from hamscale.partition import METHODS, TiledEdges, partition

FACES_ANGSTROM = 2.2
PARTS = (32, 64, 128)


def near_faces(atoms) -> np.ndarray:
    """Atoms near the upper faces along x and z and the lower along y: what is seen from there."""
    lengths, positions = np.diag(atoms.cell), atoms.positions
    return np.flatnonzero(
        (positions[:, 0] > lengths[0] - FACES_ANGSTROM)
        | (positions[:, 1] < FACES_ANGSTROM)
        | (positions[:, 2] > lengths[2] - FACES_ANGSTROM)
    )


def pairs_of_ranks(result, **names) -> pd.DataFrame:
    receiver, sender, first, last = result.messages.T
    low, high = np.minimum(receiver, sender), np.maximum(receiver, sender)
    table = pd.DataFrame({"rank_a": low, "rank_b": high, "embeddings": last - first})
    return table.groupby(["rank_a", "rank_b"], as_index=False).sum().assign(**names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, default=Path("resources/raw"))
    o = parser.parse_args()
    cube = disordered(24000)
    unit = cube[:3000]
    unit.set_cell(cube.cell / 2)
    shown = near_faces(cube)
    domains = pd.DataFrame(cube.positions[shown].round(2), columns=["x_angstrom", "y_angstrom", "z_angstrom"])
    domains.insert(0, "element", np.array(cube.get_chemical_symbols())[shown])
    ranks, topology = [], []
    for cutoff in (12.0, 14.0):
        edges = edges_within(unit, cutoff)
        for tiling, repeat in (("3-D", (2, 2, 2)), ("1-D", (8, 1, 1))):
            if tiling == "1-D" and cutoff != 12.0:
                continue
            atoms, tiled = unit.repeat(repeat), TiledEdges(edges, 3000, repeat)
            for parts in PARTS if tiling == "3-D" else (64,):
                for method in METHODS:
                    result = partition(atoms, tiled, cutoff, parts, method)
                    names = {"tiling": tiling, "cutoff_angstrom": cutoff, "ranks": parts, "method": method}
                    if tiling == "3-D":
                        ranks.append(pd.DataFrame(names | {"rank": np.arange(parts)} | result.per_rank()))
                    if cutoff == 12.0 and parts < 128:
                        topology.append(pairs_of_ranks(result, **names))
                    if (tiling, cutoff, parts) == ("3-D", 12.0, 64):
                        domains[f"owner_{method.replace('-', '_')}"] = result.owner[shown]
                    print(json.dumps(names | result.quality()), flush=True)
    structure = "disordered HfO2, 24,000 atoms"
    write_table(o.raw / "fig5_domains.csv", domains, structure=structure, parts=64, cell_angstrom=np.diag(cube.cell).tolist())
    write_table(o.raw / "partition_ranks.csv", pd.concat(ranks), structure=structure)
    write_table(o.raw / "topology.csv", pd.concat(topology), structure=structure)
    print(json.dumps({"rows": len(domains)} | provenance()))


if __name__ == "__main__":
    main()
