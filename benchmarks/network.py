"""Time and memory of the network, forward or forward and backward: python benchmarks/network.py --graph hfo2 --atoms 96

hfo2: monoclinic cells tiled, Gaussian displacements of 0.35 A, 0.083 atoms/A^3, SZV; gst: GeSb2Te4 by random sequential
placing, 0.0325 atoms/A^3, DZVP. Prints one JSON line last. us_per_edge is CPU time, user and system, of one step over edges,
the least of --repeats: neighbours on the machine can only add to it; wall_s likewise; us_per_edge_median their median;
kb_per_edge the growth of the peak resident memory of this process over what it was with graph and model in place.
floor_us_per_edge: the least matrix work of the general layers (2.54 MFLOP forward and backward at C = 16, quadratic in C) at
the rate of this machine's own matrix product. --device cuda: seconds are of wall time, memory is the GPU's.
"""

import argparse
import json
import resource
import time

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal
from torch.utils.flop_counter import FlopCounterMode

import devices
from hamscale.basis import Basis, read_element_basis
from hamscale.config import Network
from hamscale.files import provenance
from hamscale.graph.coupling import Coupling
from hamscale.graph.crystal_field import CrystalField, features
from hamscale.graph.graph import structure_graph
from hamscale.graph.polarization import potential_count
from hamscale.graph.reference import Reference
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.model.chunks import Way
from hamscale.model.network import EDGES_AT_ONCE


def hafnia(n_atoms: int) -> Atoms:
    sites = [(0.276, 0.04, 0.208), (0.074, 0.332, 0.347), (0.449, 0.758, 0.48)]
    unit = crystal(["Hf", "O", "O"], sites, spacegroup=14, cellpar=[5.117, 5.172, 5.295, 90, 99.18, 90])
    unit.set_cell(unit.cell * (len(unit) / 0.083 / unit.get_volume()) ** (1 / 3), scale_atoms=True)
    cells = round(n_atoms / len(unit))
    repeat = min(
        ((a, b, cells // a // b) for a in range(1, cells + 1) for b in range(1, cells + 1) if cells % (a * b) == 0),
        key=lambda r: max(r) - min(r),
    )
    atoms = unit.repeat(repeat)
    rng = np.random.default_rng(0)
    while True:  # a displaced atom that comes too near another is displaced anew
        moved = atoms.copy()
        moved.positions += rng.normal(0, 0.35, atoms.positions.shape)
        for _ in range(100):
            close = np.unique(neighbor_list("i", moved, 1.0))
            if not len(close):
                return moved
            moved.positions[close] = atoms.positions[close] + rng.normal(0, 0.35, (len(close), 3))


def gst(n_atoms: int) -> Atoms:
    edge = (n_atoms / 0.0325) ** (1 / 3)
    rng, positions = np.random.default_rng(0), []
    while len(positions) < n_atoms:
        trial = rng.uniform(0, edge, 3)
        difference = np.array(positions).reshape(-1, 3) - trial
        difference -= edge * np.round(difference / edge)
        if (np.linalg.norm(difference, axis=1) > 2.3).all():
            positions.append(trial)
    symbols = (["Ge", "Sb", "Sb", "Te", "Te", "Te", "Te"] * n_atoms)[:n_atoms]
    return Atoms(symbols, positions, cell=[edge] * 3, pbc=True)


def unit_reference(basis: Basis, cutoff: float, charges: dict[int, float] | None = None) -> Reference:
    """Make a reference of the right shapes: time does not depend on its numbers.

    charges: formal ones by element; without them nothing acts beyond the cutoff.
    """
    coupling = Coupling(basis)
    charges = np.array([[charges[z]] for z in sorted(basis)]) if charges else np.empty((len(basis), 0))
    one_each = Atoms(list(basis), [(2.0 * k, 0, 0) for k in range(len(basis))], cell=[20.0] * 3, pbc=True)
    of_atoms = features(structure_graph(one_each, basis, cutoff), sorted(basis), coupling.lmax, 4.5, charges)
    each = lambda value: {a: np.full(coupling[a, a].n_slots, value) for a in basis}  # noqa: E731
    overlap = {a: np.eye(basis[a].n_orbitals).ravel() @ coupling[a, a].transform for a in basis}
    tables = {
        a: [np.zeros((of_atoms.by_degree[L].shape[2], len(slots))) for L, slots in coupling[a, a].slots.items()] for a in basis
    }
    potentials = np.zeros(potential_count(*charges.shape))
    field = CrystalField(coupling, 4.5, charges, each(0.0), each(0.0), tables, potentials, overlap, each(1.0))
    of_pairs = lambda value: {  # noqa: E731
        (a, b): np.full((int(cutoff * 4) + 3, coupling[a, b].n_slots), value) for a in basis for b in basis
    }
    return Reference(basis, True, cutoff, cutoff, 0.0, field, of_pairs(0.0), of_pairs(1.0), each(1.0), 0.0)


def gemm_rate(device: str = "cpu") -> float:
    """Floating-point operations per second of a square matrix product."""
    a = torch.randn(2048, 2048, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        devices.finish(device)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes(device: str = "cpu") -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", choices=["hfo2", "gst"], default="hfo2")
    parser.add_argument("--atoms", type=int, default=96)
    parser.add_argument("--cutoff", type=float, default=6.0, help="Angstrom")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--hidden", type=int, help="channels between SO(2) convolutions, and per head; default: --channels")
    parser.add_argument("--feed-forward", type=int, default=64, help="channels inside the feed-forward")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lmax", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=["forward", "train"], default="train")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "float64", "mixed"], default="float32", help="mixed: bfloat16 messages")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--chunk", type=int, help="edges; default: 768 on a CPU, all that fit on a GPU")
    parser.add_argument(
        "--way", choices=[way.value for way in Way], help="of arranging operations; default: as suits the device"
    )
    parser.add_argument("--repeats", type=int, default=7)
    o = parser.parse_args(arguments)
    o.hidden = o.hidden or o.channels
    devices.check(o.device)
    return o


def build(o: argparse.Namespace):
    """The network and the input of the options."""
    dtype = torch.float32 if o.dtype == "mixed" else getattr(torch, o.dtype)
    atoms = {"hfo2": hafnia, "gst": gst}[o.graph](o.atoms)
    name = {"hfo2": "SZV-MOLOPT-SR-GTH", "gst": "DZVP-MOLOPT-SR-GTH"}[o.graph]
    elements = sorted(set(atoms.get_chemical_symbols()))
    basis = Basis(read_element_basis(e, name, "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e in elements)
    reference = unit_reference(basis, o.cutoff)
    graph = structure_graph(atoms, basis, o.cutoff)
    assert len(graph.edges), "no edges: raise --cutoff"
    torch.manual_seed(0)
    settings = Network(
        channels=o.channels, hidden=o.hidden, values=o.hidden, feed_forward=o.feed_forward, layers=o.layers, lmax=o.lmax
    )
    model = build_network(settings, reference).to(o.device, dtype)
    if o.dtype == "mixed":
        model.messages_in(torch.bfloat16)
    inputs = graph_inputs(graph, reference, o.lmax, dtype, devices.chunk(o, len(graph.edges))).to(o.device)
    return model, inputs if o.way is None else inputs.arranged(Way(o.way), EDGES_AT_ONCE)


def main():
    o = options()
    torch.set_num_threads(o.threads)
    model, inputs = build(o)

    def step():
        if o.mode == "forward":
            with torch.inference_mode():
                model(inputs)
        else:
            train()
        devices.finish(o.device)

    def train():
        model.zero_grad(set_to_none=True)
        offsite, onsite = model(inputs, recompute=o.recompute)
        sum(v.abs().mean() for v in (*offsite.values(), *onsite.values())).backward()

    before = peak_bytes(o.device)
    step()  # warms up, and its peak is the peak
    times, walls = [], []
    for _ in range(o.repeats):
        start, wall = cpu_seconds(), time.perf_counter()
        step()
        walls.append(time.perf_counter() - wall)
        times.append(walls[-1] if o.device == "cuda" else cpu_seconds() - start)
    edges = len(inputs.source)
    torch.set_num_threads(1)  # products are counted in the thread that does them
    with FlopCounterMode(display=False) as counter:
        step()
    flop = counter.get_total_flops() / edges
    result = vars(o) | {
        "us_per_edge": round(1e6 * min(times) / edges, 1),
        "us_per_edge_median": round(1e6 * float(np.median(times)) / edges, 1),
        "wall_s": round(min(walls), 4),
        "kb_per_edge": round((peak_bytes(o.device) - before) / 1024 / edges, 2),
        "edges": edges,
        "params": sum(p.numel() for p in model.parameters()),
        "floor_us_per_edge": round(1e6 * flop / gemm_rate(o.device), 1),
        "machine": devices.name(o.device, f"{o.threads} threads"),
        "torch": torch.__version__,
    }
    print(json.dumps(result | provenance()))


if __name__ == "__main__":
    main()
