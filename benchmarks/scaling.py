"""Scaling over ranks: measured for those there are, modelled from exact partitions beyond.

python benchmarks/scaling.py measure     # constants of this machine, strong and weak scaling on --ranks, forward, one thread
                                         # each, and strong scaling of one node update by method of partition
python benchmarks/scaling.py partitions  # exact counts for 8 to 8,192 ranks, up to 3 million atoms, the graph streamed by tiles
python benchmarks/scaling.py model       # time per step for both, and the paper's numbers beside what geometry gives; that of a
                                         # node update by rank from partition_ranks.csv (domains.py) and fig3.csv
                                         # (throughput.py)

Tables go to --raw, scaling_*.csv; a column `kind` says measured or modelled. One JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase import Atoms

from data import disordered
from hamscale.basis import Basis, read_element_basis
from hamscale.config import Network
from hamscale.files import machine, provenance, read_table, write_table, write_text
from hamscale.graph.graph import structure_graph
from hamscale.graph.neighbours import edges_within
from hamscale.inputs.ranks import rank_part
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.paper.scaling import Machine, efficiency, per_rank, step_seconds
from hamscale.parallel.env import World, world
from hamscale.parallel.exchange import TorchExchange
from hamscale.partition import METHODS, TiledEdges, partition
from hamscale.partition.halo import halo_of
from network import hafnia, unit_reference

LAYERS, CHANNELS, LMAX, CUTOFF = 3, 16, 4, 6.0
EMBEDDING_BYTES = (LMAX + 1) ** 2 * CHANNELS * 4
WARM, REPEATS = 2, 10


def parts_of_network():
    basis = Basis(read_element_basis(e, "SZV-MOLOPT-SR-GTH", "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e in ("Hf", "O"))
    reference = unit_reference(basis, CUTOFF)
    torch.manual_seed(0)
    network = build_network(Network(channels=CHANNELS, layers=LAYERS, lmax=LMAX), reference)
    return basis, reference, network


# ------------------------------------------------------------------------------------------------------------ on each rank


def run_rank(atoms_strong: int, atoms_weak: int, only: str, out: Path):
    """All scalings on this world, then, on two ranks or more, the constants of the exchange; rank 0 writes."""
    with world("cpu") as w:
        torch.set_num_threads(1)
        rows = []
        if only != "node-update":
            for mode, atoms in (("strong", hafnia(atoms_strong)), ("weak", hafnia(atoms_weak * w.size))):
                rows += measure(w, mode, atoms)
        for method in METHODS if w.size > 1 else ("one rank",):
            rows += measure_node_update(w, hafnia(atoms_strong), method)
        constants = exchange_constants(w) if w.size > 1 else {}
        if w.is_root:
            write_text(out, json.dumps({"rows": rows, "constants": constants}))


def measure(w: World, mode: str, atoms: Atoms) -> list[dict]:
    basis, reference, network = parts_of_network()
    graph, halo, swap = structure_graph(atoms, basis, CUTOFF), None, None
    if w.size > 1:
        part = rank_part(graph, reference, w, w.size)
        graph, halo, swap = part.graph, part.halo, part.exchange
    inputs = graph_inputs(graph, reference, LMAX, torch.float32, halo=halo)
    run = lambda: network(inputs, swap) if swap else network(inputs)  # noqa: E731
    names = {"mode": mode, "what": "forward", "method": "min-nn" if swap else "one rank"}
    with torch.inference_mode():
        return timed(w, run, swap, names | {"atoms": len(atoms), "edges": len(graph.edges)})


def measure_node_update(w: World, atoms: Atoms, method: str) -> list[dict]:
    """The node update of the second layer and the exchange after it."""
    basis, reference, network = parts_of_network()
    graph, halo, swap = structure_graph(atoms, basis, CUTOFF), None, None
    if w.size > 1:
        owner = partition(graph.atoms, [(graph.edges[:, 0], graph.edges[:, 1])], CUTOFF, w.size, method).owner
        graph = graph.part(np.flatnonzero(owner == w.rank))
        halo = halo_of(graph.edges, owner, w.rank)
        swap = TorchExchange(halo, w)
    inputs = graph_inputs(graph, reference, LMAX, torch.float32, halo=halo)
    K = (LMAX + 1) ** 2
    x = torch.randn(len(inputs.species), K, CHANNELS)
    edges = [torch.randn(K, last - first, CHANNELS) for first, last, _, _ in inputs.spans]

    def run():
        features = network.node_updates[1](x, edges, inputs, False)
        return swap(features) if swap else features

    names = {"mode": "strong", "what": "node update", "method": method}
    with torch.inference_mode():
        return timed(w, run, swap, names | {"atoms": len(atoms), "edges": len(graph.edges)})


def timed(w: World, run, swap, names: dict) -> list[dict]:
    """A row per repeat and rank: seconds of packing, exchange (waiting included), unpacking and, of CPU time, the rest.

    Of all repeats those REPEATS stay in which the exchange, summed over ranks, was shortest: on a machine with neighbours a
    rank that is not running lets the others wait.
    """
    rows = []
    for repeat in range(WARM + REPEATS * (1 if swap is None else 4)):
        if swap:
            swap.statistics.clear()
        w.barrier()
        start = time.thread_time()
        run()
        own = time.thread_time() - start
        s = swap.statistics if swap else None
        split = [s.pack_s, s.exchange_s, s.unpack_s] if s else [0.0] * 3
        everyone = torch.zeros(w.size, 5, dtype=torch.float64)
        everyone[w.rank] = torch.tensor([names["edges"], *split, own - split[0] - split[2]])
        w.sum(everyone)
        if repeat >= WARM:
            for rank, (edges, pack, exchange, unpack, compute) in enumerate(everyone.tolist()):
                of_rank = {"rank": rank, "edges": int(edges), "pack_s": pack, "exchange_s": exchange, "unpack_s": unpack}
                times = of_rank | {"compute_s": compute}
                rows.append({"kind": "measured"} | names | {"ranks": w.size, "repeat": repeat - WARM} | times)
    table = pd.DataFrame(rows)
    waited = table.groupby("repeat").exchange_s.transform("sum").rank(method="dense")
    return table[waited <= REPEATS].to_dict("records") if swap else rows


def exchange_constants(w: World) -> dict:
    """Latency and bandwidth between ranks 0 and 1, by the exchange's own transfer."""
    import torch.distributed as dist

    def seconds(n_bytes: int, repeats: int) -> float:
        message, buffer = torch.zeros(n_bytes // 4), torch.empty(n_bytes // 4)
        times = []
        for _ in range(repeats):
            w.barrier()
            start = time.perf_counter()
            if w.rank < 2:
                peer = 1 - w.rank
                requests = dist.batch_isend_irecv([dist.P2POp(dist.irecv, buffer, peer), dist.P2POp(dist.isend, message, peer)])
                for r in requests:
                    r.wait()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    small, large, size = seconds(64, 200), seconds(1 << 24, 20), 1 << 24
    return {"latency_s": small, "bandwidth_bytes_s": size / (large - small)}


# -------------------------------------------------------------------------------------------------------------- in one process


def compute_constants() -> dict:
    """Message rate of a layer (node and edge update) against the number of messages; one thread."""
    torch.set_num_threads(1)
    basis, reference, network = parts_of_network()
    messages, rates = [], []
    for n in (12, 24, 48, 96, 192, 384, 768):
        graph = structure_graph(hafnia(n), basis, CUTOFF)
        inputs = graph_inputs(graph, reference, LMAX, torch.float32)
        times = []
        with torch.inference_mode():
            for _ in range(WARM + REPEATS):
                start = time.perf_counter()
                network(inputs)
                times.append(time.perf_counter() - start)
        messages.append(len(graph.edges))
        rates.append(len(graph.edges) * LAYERS / float(np.median(times[WARM:])))
    return {"messages": messages, "messages_per_second": rates}


def copy_constants() -> dict:
    """Rates of packing and unpacking, as TorchExchange.swap does them; the least of 200."""
    x, rows = torch.randn(4000, (LMAX + 1) ** 2, CHANNELS), torch.randperm(4000)[:2000]
    received, times = x[:2000].clone(), {"pack_bytes_s": [], "unpack_bytes_s": []}
    for _ in range(200):
        start = time.perf_counter()
        torch.cat([x.index_select(0, rows).reshape(-1)])
        packed = time.perf_counter()
        torch.cat([received])
        times["unpack_bytes_s"].append(time.perf_counter() - packed)
        times["pack_bytes_s"].append(packed - start)
    return {name: 2000 * EMBEDDING_BYTES / min(t) for name, t in times.items()}


def launch(ranks: int, o) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        arguments = [
            __file__,
            "rank",
            "--strong-atoms",
            o.strong_atoms,
            "--weak-atoms",
            o.weak_atoms,
            "--only",
            o.only,
            "--out",
            out,
        ]
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command = [sys.executable] if ranks == 1 else runner
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([str(a) for a in [*command, *arguments]], check=True, env=environment, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def do_measure(o):
    results = {ranks: launch(ranks, o) for ranks in o.ranks}
    rows = pd.DataFrame([row for r in results.values() for row in r["rows"]]).assign(**provenance())
    path, constants_path = o.raw / "scaling_measured.csv", o.raw / "scaling_machine.json"
    if o.only == "all":
        found = compute_constants() | next((r["constants"] for r in results.values() if r["constants"]), {})
    else:
        known, found = pd.read_csv(path), json.loads(constants_path.read_text())
        rows = pd.concat([known[known.what != "node update"], rows])
    constants = asdict(Machine(**{
        k: found[k] for k in ("messages", "messages_per_second", "latency_s", "bandwidth_bytes_s")
    } | {
        "name": f"{machine()['processor']}, a core per rank",
        "source": f"benchmarks/scaling.py measure, {os.cpu_count()} cores, gloo",
    } | copy_constants()))  # fmt: skip
    write_text(path, rows.to_csv(index=False, float_format="%.5g"))
    write_text(constants_path, json.dumps(constants | provenance(), indent=2) + "\n")
    table = []
    for (mode, ranks), group in rows[rows.what == "forward"].groupby(["mode", "ranks"]):
        total = group.assign(seconds=group.pack_s + group.exchange_s + group.unpack_s + group.compute_s)
        seconds = total.groupby("repeat").seconds.max().median()
        table.append({"mode": mode, "ranks": int(ranks), "seconds": round(float(seconds), 5)})
    for mode in ("strong", "weak"):
        of_mode = pd.DataFrame([row for row in table if row["mode"] == mode])
        for row, e in zip((r for r in table if r["mode"] == mode), efficiency(of_mode, mode)):
            row["efficiency"] = round(float(e), 3)
    print(json.dumps({"measured": table, "constants": constants} | provenance()))


# ---------------------------------------------------------------------------------------------------------------- partitions

# tiles of 3,000 atoms, 8 ranks each
WEAK = {8: (1, 1, 1), 64: (2, 2, 2), 128: (4, 2, 2), 256: (4, 4, 2), 512: (4, 4, 4), 1024: (8, 4, 4), 2048: (8, 8, 4)}
WEAK |= {4096: (8, 8, 8), 8192: (16, 8, 8)}
LINE = {8: (1, 1, 1), 64: (8, 1, 1), 128: (16, 1, 1), 256: (32, 1, 1), 512: (64, 1, 1)}


def do_partitions(o):
    """Exact counts by rank. METIS needs the whole adjacency in memory: only where that fits (--metis-atoms)."""
    whole = disordered(24000)  # 2 x 2 x 2 of the cell
    unit = whole[:3000]
    unit.set_cell(whole.cell / 2)
    edges = edges_within(unit, o.cutoff)
    path = o.raw / "scaling_partitions.csv"
    done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["tiling", "ranks", "method"])
    for tiling, ranks, repeat in [("3-D", r, t) for r, t in WEAK.items()] + [("1-D", r, t) for r, t in LINE.items()]:
        for method in ("low-nn", "min-nn", "metis"):
            atoms = 3000 * int(np.prod(repeat))
            if ((done.tiling == tiling) & (done.ranks == ranks) & (done.method == method)).any():
                continue
            if ranks > o.most_ranks or (method == "metis" and atoms > o.metis_atoms):
                continue
            start = time.perf_counter()
            result = partition(unit.repeat(repeat), TiledEdges(edges, 3000, repeat), o.cutoff, ranks, method)
            counts = result.per_rank()
            rows = pd.DataFrame({"rank": np.arange(ranks), **counts}).assign(
                kind="exact", tiling=tiling, tiles="x".join(map(str, repeat)), atoms=atoms, ranks=ranks, method=method,
                cutoff_angstrom=o.cutoff, seconds=result.attributes["seconds"], **provenance(),
            )  # fmt: skip
            done = pd.concat([done, summary(rows)]) if len(done) else summary(rows)
            write_text(path, done.to_csv(index=False))
            print(json.dumps({"tiling": tiling, "ranks": ranks, "method": method, "atoms": atoms, **result.quality(),
                              "seconds_in_all": round(time.perf_counter() - start, 1)}), flush=True)  # fmt: skip


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per partition: means, maxima, and the slowest rank's counts are kept as those of the rank with most of each."""
    first = rows.iloc[0]
    result = {k: first[k] for k in ("kind", "tiling", "tiles", "atoms", "ranks", "method", "cutoff_angstrom", "seconds")}
    for name in ("neighbours", "sent", "received", "nodes", "edges"):
        result |= {f"{name}_mean": rows[name].mean(), f"{name}_max": rows[name].max()}
    return pd.DataFrame([result | {k: first[k] for k in provenance()}])


# --------------------------------------------------------------------------------------------------------------------- model

# What the paper states (Section 5 and figure 7): 33.4 MiB per rank and 87 % at 512 ranks of the 3-D tiling, 20.4 GB/s achieved.
PAPER = {"mib_per_rank": 33.4, "efficiency_percent": 87.0, "bandwidth_bytes_s": 20.4e9, "exchanges_per_layer": 2}


def do_model(o):
    """Time per step of every partition on this machine's constants, and the paper's statements beside what geometry gives."""
    partitions = pd.read_csv(o.raw / "scaling_partitions.csv")
    stored = json.loads((o.raw / "scaling_machine.json").read_text())
    here = Machine(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k not in provenance()})
    node_update(o.raw, here)
    rows = []
    for _, p in partitions.iterrows():
        worst = {name: [p[f"{name}_max"]] for name in ("neighbours", "sent", "received", "edges")}
        ranks = per_rank(worst, here, LAYERS, EMBEDDING_BYTES)
        cell = per_rank({"neighbours": [0], "sent": [0], "received": [0], "edges": [p.edges_mean]}, here, LAYERS, 0)
        rows.append(
            {
                "kind": "modelled", "machine": here.name, "tiling": p.tiling, "atoms": p.atoms, "ranks": p.ranks,
                "method": p.method, "seconds": step_seconds(ranks), "seconds_without_exchange": step_seconds(cell),
                **ranks[["compute_s", "pack_s", "exchange_s", "unpack_s"]].iloc[0],
                "sent_mib_per_exchange": p.sent_mean * EMBEDDING_BYTES / 2**20,
                "received_mib_per_exchange": p.received_mean * EMBEDDING_BYTES / 2**20,
                "neighbours_mean": p.neighbours_mean,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    write_text(o.raw / "scaling_modelled.csv", table.assign(**provenance()).to_csv(index=False))
    compared = compare(partitions)
    write_text(o.raw / "scaling_paper.csv", compared.assign(**provenance()).to_csv(index=False))
    print(table.to_string(index=False))
    print(compared.to_string(index=False))
    print(json.dumps({"rows": len(table)} | provenance()))


def node_update(raw: Path, here: Machine):
    """One node update and the exchange after it by rank, of the partitions of 24,000 atoms: scaling_node_update.csv."""
    counts, throughput = read_table(raw / "partition_ranks.csv"), read_table(raw / "fig3.csv")
    rate = throughput[(throughput.channels == CHANNELS) & throughput.device.str.startswith(here.name.split(",")[0])]
    machine = replace(here, messages=tuple(rate.messages), messages_per_second=tuple(rate.messages_per_second))
    times = per_rank(counts, machine, 1, EMBEDDING_BYTES)[["compute_s", "pack_s", "exchange_s", "unpack_s"]]
    table = pd.concat([counts[["cutoff_angstrom", "ranks", "method", "rank", "edges"]], times], axis=1)
    write_table(raw / "scaling_node_update.csv", table.assign(kind="modelled"), digits=5, machine=here.name)


def compare(partitions: pd.DataFrame) -> pd.DataFrame:
    """What could be meant by the published 33.4 MiB per rank, each reading beside it; nothing is fitted.

    implied_messages_s: the rate of messages per rank at which that traffic over the published bandwidth costs 13 % of a pass.
    """
    rows = []
    for _, p in partitions[partitions.ranks == 512].iterrows():
        one_way = p.received_mean * EMBEDDING_BYTES / 2**20
        for reading, factor in (
            ("received, one exchange", 1),
            ("sent and received, one exchange", 2),
            ("received, two exchanges of a layer", 2),
            ("sent and received, two exchanges of a layer", 4),
            ("received, one exchange per layer, three layers", 3),
            ("sent and received, two exchanges per layer, three layers", 12),
            ("received, two exchanges per layer, three layers", 6),
        ):
            mib = one_way * factor
            exchange_s = mib * 2**20 / PAPER["bandwidth_bytes_s"]
            share = 1 - PAPER["efficiency_percent"] / 100
            rows.append(
                {
                    "tiling": p.tiling, "method": p.method, "reading": reading, "exact_mib_per_rank": round(mib, 2),
                    "published_mib_per_rank": PAPER["mib_per_rank"], "ratio": round(mib / PAPER["mib_per_rank"], 3),
                    "exchange_ms_at_published_bandwidth": round(exchange_s * 1e3, 3),
                    "implied_messages_s": round(p.edges_mean / (exchange_s * (1 - share) / share)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "partitions", "model", "rank"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strong-atoms", type=int, default=768)
    parser.add_argument("--weak-atoms", type=int, default=384, help="per rank")
    parser.add_argument(
        "--only", choices=["all", "node-update"], default="all", help="of `measure`; other rows and constants stay"
    )
    parser.add_argument("--cutoff", type=float, default=12.0, help="Angstrom, of `partitions`")
    parser.add_argument("--most-ranks", type=int, default=8192)
    parser.add_argument("--metis-atoms", type=int, default=192000)
    parser.add_argument("--raw", type=Path, default=Path("resources/raw"))
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.what == "rank":
        run_rank(o.strong_atoms, o.weak_atoms, o.only, o.out)
    else:
        {"measure": do_measure, "partitions": do_partitions, "model": do_model}[o.what](o)


if __name__ == "__main__":
    main()
