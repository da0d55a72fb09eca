"""What one rank of many holds and does, without the others: python benchmarks/one_rank.py --atoms 192000 --ranks 512 --rank 17

A cubic cell of 3,000 disordered atoms of HfO2 (0.083 atoms/A^3), tiled; the graph is cut by min-nn. The rank makes its part
from the positions: owners of all atoms, its own edges, ghosts and lists, and the reference blocks of its atoms with potentials
of formal charges. Then it makes one forward pass of a network of two layers with random weights, some atoms at a time. In place
of what others would send are values of its own: time and memory do not depend on their numbers. peak_gib is the peak resident
memory until then; setup_s, of which degrees_s and crystal_field_s, and the forward pass are CPU time. Afterwards the same
process predicts a periodic cell of as many atoms as the rank has, on one rank, in turn with further passes of the rank:
us_per_edge of both is the least of --repeats. Prints one JSON line; --out adds it to a table.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase import Atoms

from data import jittered
from hamscale.basis import Basis, read_element_basis
from hamscale.config import Network
from hamscale.files import provenance, read_table, write_table
from hamscale.graph.graph import Graph, UnbuiltGraph
from hamscale.inputs.ranks import RankPart, rank_part
from hamscale.inputs.tensors import build_network
from hamscale.parallel.env import World
from hamscale.predict.in_parts import forward_in_parts
from hamscale.structures import wrap_as_cp2k
from network import peak_bytes, unit_reference

UNIT_ATOMS, DENSITY = 3000, 0.083
CHARGES = {8: -2.0, 72: 4.0}


def cell(n_atoms: int) -> Atoms:
    """A cubic cell of disordered HfO2."""
    rng, side = np.random.default_rng(0), (n_atoms / DENSITY) ** (1 / 3)
    symbols = rng.permutation((["Hf", "O", "O"] * n_atoms)[:n_atoms])
    return Atoms(symbols, jittered(n_atoms, [side] * 3, rng), cell=[side] * 3, pbc=True)


def tiled(n_atoms: int) -> Atoms:
    """Cells of UNIT_ATOMS atoms, as near to a cube of them as their number allows."""
    n = n_atoms // UNIT_ATOMS
    assert n * UNIT_ATOMS == n_atoms, f"--atoms: expected a multiple of {UNIT_ATOMS}"
    repeats = [(n // (a * b), a, b) for a in range(1, n + 1) for b in range(1, a + 1) if n % (a * b) == 0]
    return cell(UNIT_ATOMS).repeat(min(repeats, key=lambda r: max(r) - min(r)))


class Watched(UnbuiltGraph):
    """A graph that notes the CPU time of counting degrees."""

    def degrees(self) -> np.ndarray:
        start = time.process_time()
        result = super().degrees()
        object.__setattr__(self, "seconds", time.process_time() - start)
        return result


class StandIn:
    """Rows of this rank in place of those of others, as many as would arrive."""

    def __init__(self, part: RankPart) -> None:
        self.ghosts, self.atoms = len(part.halo.ghosts), len(part.graph.atoms)
        self.counts = dict(zip(part.exchange.pairs, (sum(counts) for counts in part.exchange.blocks.counts)))

    def gather(self, values: np.ndarray) -> np.ndarray:
        return np.resize(values, (self.atoms, *values.shape[1:]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x[torch.arange(self.ghosts) % len(x)]])

    def post_edges(self, blocks: dict) -> Callable:
        return lambda: {pair: blocks[pair][torch.arange(n) % max(1, len(blocks[pair]))] for pair, n in self.counts.items()}


def forward_us_per_edge(network, graph: Graph, reference, **ranks) -> float:
    start = time.process_time()
    forward_in_parts([network], graph, reference, **ranks)
    return 1e6 * (time.process_time() - start) / len(graph.edges)


def measure(o: argparse.Namespace) -> dict:
    elements = ("Hf", "O")
    basis = Basis(read_element_basis(e, "SZV-MOLOPT-SR-GTH", "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e in elements)
    reference = unit_reference(basis, o.cutoff, CHARGES)
    torch.manual_seed(0)
    network = build_network(Network(layers=2, gaussians=32), reference)
    atoms = wrap_as_cp2k(tiled(o.atoms))
    before, start = peak_bytes(), time.process_time()
    source = Watched(atoms, basis, o.cutoff)
    part = rank_part(source, reference, World(o.rank, o.ranks), o.ranks)
    before_field, stand_in = time.process_time(), StandIn(part)
    graph = replace(part.graph, crystal_field=reference.crystal_field.of_graph(part.graph, stand_in.gather))
    setup, after_setup = time.process_time() - start, peak_bytes()
    exchange = {"halo": part.halo, "exchange": stand_in}
    of_rank = [forward_us_per_edge(network, graph, reference, **exchange)]
    row = {
        "edges": len(graph.edges),
        "owned": len(graph.owned),
        "ghosts": len(part.halo.ghosts),
        "neighbours": len(part.halo.send),
        "sent": sum(map(len, part.halo.send.values())),
        "structure_gib": before / 2**30,
        "setup_gib": after_setup / 2**30,
        "peak_gib": peak_bytes() / 2**30,
        "setup_s": setup,
        "degrees_s": source.seconds,
        "crystal_field_s": setup - (before_field - start),
    }
    small = UnbuiltGraph(wrap_as_cp2k(cell(len(graph.owned))), basis, o.cutoff).part()
    alone = [forward_us_per_edge(network, small, reference)]
    for _ in range(o.repeats - 1):
        of_rank.append(forward_us_per_edge(network, graph, reference, **exchange))
        alone.append(forward_us_per_edge(network, small, reference))
    return row | {"us_per_edge": min(of_rank), "us_per_edge_one_rank": min(alone), "ratio": min(of_rank) / min(alone)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, default=192000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--rank", type=int, default=17)
    parser.add_argument("--cutoff", type=float, default=12.0, help="Angstrom")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="table to add a row to")
    o = parser.parse_args()
    torch.set_num_threads(1)
    what = {"atoms": o.atoms, "ranks": o.ranks, "rank": o.rank, "cutoff_angstrom": o.cutoff}
    row = what | measure(o) | {"git_commit": provenance()["git_commit"]}
    if o.out:
        rows = [read_table(o.out)] if o.out.is_file() else []
        write_table(o.out, pd.concat([*rows, pd.DataFrame([row])]))
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
