"""Scaling over ranks: measured for those there are, modelled from exact partitions beyond.

python benchmarks/scaling.py measure     # on --ranks, of --device: strong and weak scaling, forward, strong scaling of one node
                                         # update by method of partition, and the constants of this machine
python benchmarks/scaling.py partitions  # exact counts for 8 to 8,192 ranks, up to 3 million atoms, the graph streamed by tiles
python benchmarks/scaling.py model       # time per step for both, and the paper's numbers beside what geometry gives; that of a
                                         # node update by rank from partition_ranks.csv (domains.py) and fig3.csv
                                         # (throughput.py)

`measure` starts its ranks by torchrun, a core or a GPU each. Started by torchrun or srun itself it takes the ranks that there
are: the first P of them for each P of --ranks, while the others wait. Tables go to --raw, scaling_*.csv; a column `kind` says
measured or modelled, `device` on what. One JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from ase import Atoms

import devices
from data import disordered
from hamscale.basis import Basis, read_element_basis
from hamscale.config import EXCHANGES, Network
from hamscale.files import provenance, read_table, write_table, write_text
from hamscale.graph.graph import Graph, structure_graph
from hamscale.graph.neighbours import edges_within
from hamscale.inputs.ranks import RankPart, rank_part
from hamscale.inputs.tensors import build_network, graph_inputs, piece_inputs
from hamscale.paper.scaling import Machine, efficiency, per_rank, step_seconds
from hamscale.parallel import exchange
from hamscale.parallel.env import World
from hamscale.partition import METHODS, TiledEdges, partition
from hamscale.partition.halo import halo_of
from network import hafnia, unit_reference

LAYERS, CHANNELS, LMAX = 3, 16, 4
EMBEDDING_BYTES = (LMAX + 1) ** 2 * CHANNELS * 4
WARM, REPEATS = 2, 10


def parts_of_network(cutoff: float):
    basis = Basis(read_element_basis(e, "SZV-MOLOPT-SR-GTH", "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e in ("Hf", "O"))
    reference = unit_reference(basis, cutoff)
    torch.manual_seed(0)
    network = build_network(Network(channels=CHANNELS, layers=LAYERS, lmax=LMAX), reference)
    return basis, reference, network


# ------------------------------------------------------------------------------------------------------------ on each rank


@dataclass(frozen=True)
class Run:
    """One measurement: the world, of which the first `ranks` ranks work and the others wait, and the options."""

    world: World
    ranks: int
    o: argparse.Namespace

    @property
    def works(self) -> bool:
        return self.world.rank < self.ranks


def measure_all(w: World, ranks: list[int], o: argparse.Namespace) -> tuple[list[dict], dict]:
    """All scalings, and the constants of the machine; on every rank, of which the first has all of them."""
    rows = []
    for run in (Run(w, n, o) for n in ranks):
        if o.only == "all":
            rows += measure(run, "strong", hafnia(o.strong_atoms))
        if o.only != "node-update":
            tiled = o.tiling == "1-D"
            weak = hafnia(o.weak_atoms).repeat((run.ranks, 1, 1)) if tiled else hafnia(o.weak_atoms * run.ranks)
            rows += measure(run, "weak 1-D" if tiled else "weak", weak)
        if o.only != "weak":
            for method in METHODS if run.ranks > 1 else ("one rank",):
                rows += measure_node_update(run, hafnia(o.strong_atoms), method)
    if o.only == "node-update" or w.size == 1:
        return rows, {}
    constants = exchange_constants(w)
    if w.is_root:
        constants |= compute_constants(o) | copy_constants(o)
    w.barrier()
    return rows, constants


def measure(run: Run, mode: str, atoms: Atoms) -> list[dict]:
    basis, reference, network = parts_of_network(run.o.cutoff)
    names = {"mode": mode, "what": "forward", "method": "min-nn" if run.ranks > 1 else "one rank", "atoms": len(atoms)}
    if not run.works:
        return timed(run, None, RankPart(None), names)
    graph = structure_graph(atoms, basis, run.o.cutoff)
    part = rank_part(graph, reference, run.world, run.ranks, exchange=run.o.exchange)
    chunk = devices.chunk(run.o, len(part.graph.edges))
    inputs = graph_inputs(part.graph, reference, LMAX, torch.float32, chunk, part.halo).to(run.world.device)
    network = network.to(run.world.device)
    return timed(run, lambda: network(inputs, part.exchange), part, names)


def measure_node_update(run: Run, atoms: Atoms, method: str) -> list[dict]:
    """The node update of the second layer and the exchange after it."""
    basis, reference, network = parts_of_network(run.o.cutoff)
    names = {"mode": "strong", "what": "node update", "method": method, "atoms": len(atoms)}
    if not run.works:
        return timed(run, None, RankPart(None), names)
    part = RankPart(structure_graph(atoms, basis, run.o.cutoff))
    if run.ranks > 1:
        part = cut(part.graph, run, method)
    ghosts = np.empty(0, np.int64) if part.halo is None else part.halo.ghosts
    chunk = devices.chunk(run.o, len(part.graph.edges))
    inputs = piece_inputs(part.graph, reference, LMAX, torch.float32, ghosts, chunk).to(run.world.device)
    network = network.to(run.world.device)
    rows, channels = 2 * (LMAX + 1) ** 2, CHANNELS // 2
    x = torch.randn(len(inputs.species), rows, channels, device=run.world.device)
    edges = [torch.randn(rows, last - first, channels, device=run.world.device) for first, last, _, _ in inputs.spans]
    return timed(run, lambda: part.exchange(network.next_nodes(1, inputs, x, edges)), part, names)


def cut(graph: Graph, run: Run, method: str) -> RankPart:
    edges = [(graph.edges[:, 0], graph.edges[:, 1])]
    owner = partition(graph.atoms, edges, graph.cutoff_angstrom, run.ranks, method).owner
    part = graph.part(np.flatnonzero(owner == run.world.rank))
    halo = halo_of(part.edges, owner, run.world.rank)
    return RankPart(part, halo, exchange.EXCHANGES[run.o.exchange](halo, run.world))


@torch.inference_mode()
def timed(run: Run, work: Callable | None, part: RankPart, names: dict) -> list[dict]:
    """A row per repeat and rank: seconds of packing, exchange (waiting included), unpacking and the rest.

    On a CPU the rest is of CPU time, and of all repeats those REPEATS stay in which the exchange, summed over ranks, was
    shortest: on a machine with neighbours a rank that is not running lets the others wait. Ranks without work wait too.
    """
    w, rows = run.world, []
    statistics = exchange.Statistics()
    if isinstance(part.exchange, exchange.TorchExchange):
        part.exchange.exact, statistics = True, part.exchange.statistics
    for repeat in range(WARM + REPEATS * (1 if run.ranks == 1 else 4)):
        statistics.clear()
        w.barrier()
        start = devices.clock(run.o.device)
        if work:
            work()
        own = devices.clock(run.o.device) - start
        split = [statistics.pack_s, statistics.exchange_s, statistics.unpack_s]
        waited = split[1] if run.o.device == "cuda" else 0.0  # a thread that waits does not run
        everyone = torch.zeros(w.size, 5, dtype=torch.float64, device=w.device)
        everyone[w.rank] = torch.tensor([len(part.graph.edges) if work else 0, *split, own - split[0] - waited - split[2]])
        if repeat >= WARM:
            for rank, (edges, pack, wait, unpack, compute) in enumerate(w.sum(everyone)[: run.ranks].tolist()):
                of_rank = {"rank": rank, "edges": int(edges), "pack_s": pack, "exchange_s": wait, "unpack_s": unpack}
                rows.append({"kind": "measured"} | names | {"ranks": run.ranks, "repeat": repeat - WARM} | of_rank)
                rows[-1]["compute_s"] = compute
    table = pd.DataFrame(rows)
    order = table.groupby("repeat").exchange_s.transform("sum").rank(method="dense")
    return table[order <= REPEATS].to_dict("records")


def exchange_constants(w: World) -> dict:
    """Latency and bandwidth between ranks 0 and 1, by messages both ways as the exchange sends them."""

    def seconds(n_bytes: int, repeats: int) -> float:
        message, buffer = (torch.zeros(n_bytes // 4, device=w.device) for _ in range(2))
        times = []
        for _ in range(repeats):
            w.barrier()
            start = time.perf_counter()
            if w.rank < 2:
                peer = 1 - w.rank
                requests = dist.batch_isend_irecv([dist.P2POp(dist.irecv, buffer, peer), dist.P2POp(dist.isend, message, peer)])
                for r in requests:
                    r.wait()
            devices.finish(w.device.type)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    small, large, size = seconds(64, 200), seconds(1 << 24, 20), 1 << 24
    return {"latency_s": small, "bandwidth_bytes_s": size / (large - small)}


# -------------------------------------------------------------------------------------------------- on the first rank alone


def compute_constants(o: argparse.Namespace) -> dict:
    """Message rate of a layer (node and edge update) against the number of messages, on one core or GPU."""
    basis, reference, network = parts_of_network(o.cutoff)
    network, messages, rates = network.to(o.device), [], []
    for n in (12, 24, 48, 96, 192, 384, 768, *((1536, 3072) if o.device == "cuda" else ())):
        graph = structure_graph(hafnia(n), basis, o.cutoff)
        inputs = graph_inputs(graph, reference, LMAX, torch.float32, devices.chunk(o, len(graph.edges))).to(o.device)
        times = []
        with torch.inference_mode():
            for _ in range(WARM + REPEATS):
                start = time.perf_counter()
                network(inputs)
                devices.finish(o.device)
                times.append(time.perf_counter() - start)
        messages.append(len(graph.edges))
        rates.append(len(graph.edges) * LAYERS / float(np.median(times[WARM:])))
    return {"messages": messages, "messages_per_second": rates}


def copy_constants(o: argparse.Namespace) -> dict:
    """Rates of packing and unpacking, as TorchExchange does them; the least of 200."""
    x, rows = torch.randn(4000, (LMAX + 1) ** 2, CHANNELS, device=o.device), torch.randperm(4000, device=o.device)[:2000]
    received, times = x[:2000].clone(), {"pack_bytes_s": [], "unpack_bytes_s": []}
    for _ in range(200):
        devices.finish(o.device)
        start = time.perf_counter()
        torch.cat([x.index_select(0, rows).reshape(-1)])
        devices.finish(o.device)
        packed = time.perf_counter()
        torch.cat([received])
        devices.finish(o.device)
        times["unpack_bytes_s"].append(time.perf_counter() - packed)
        times["pack_bytes_s"].append(packed - start)
    return {name: 2000 * EMBEDDING_BYTES / min(t) for name, t in times.items()}


def do_measure(o: argparse.Namespace):
    """Measure on the ranks of this run, or, if it is of one process, on as many as are asked for, started here."""
    with devices.ranks(o.device) as w:
        ranks = sorted(o.ranks or ([2**k for k in range(w.size.bit_length())] if w.size > 1 else [1, 2]))
        if w.size > 1 and max(ranks) > w.size:
            sys.exit(f"--ranks {max(ranks)}: this run has {w.size} ranks. Start it on more, or give fewer.")
        if w.size > 1 or max(ranks) == 1:
            rows, constants = measure_all(w, ranks, o)
            if w.is_root:
                write(rows, constants, w.size, o)
            return
    devices.check(o.device, max(ranks))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(ranks))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment).returncode)


SAME, KEYS = ["device", "exchange", "cutoff_angstrom"], ["mode", "what", "ranks"]


def write(rows: list[dict], constants: dict, size: int, o: argparse.Namespace):
    """Write the table and the constants, and print a summary.

    Other rows of the table stay if they are of the same device, exchange and cutoff.
    """
    path, constants_path = o.raw / "scaling_measured.csv", o.raw / "scaling_machine.json"
    device = devices.name(o.device, "a core per rank")
    about = {"device": device, "exchange": o.exchange, "cutoff_angstrom": o.cutoff}
    table = pd.DataFrame(rows).assign(**about, **provenance())
    if path.is_file():
        known = read_table(path)
        same = (known[SAME] == [about[name] for name in SAME]).all(axis=1)
        again = known.set_index(KEYS).index.isin(table.set_index(KEYS).index)
        table = pd.concat([known[same & ~again], table])
    write_text(path, table.to_csv(index=False, float_format="%.5g"))
    if constants:
        source = f"benchmarks/scaling.py measure, {size} ranks, {'gloo' if o.device == 'cpu' else 'NCCL'}"
        constants = asdict(Machine(**constants | {"name": device, "source": source}))
        write_text(constants_path, json.dumps(constants | provenance(), indent=2) + "\n")
    print(json.dumps({"measured": efficiencies(table), "constants": constants} | about | provenance()))


def efficiencies(rows: pd.DataFrame) -> list[dict]:
    """Median over repeats of the slowest rank's seconds, and the efficiency, of every mode and number of ranks."""
    table = []
    for (mode, ranks), group in rows[rows.what == "forward"].groupby(["mode", "ranks"]):
        total = group.assign(seconds=group.pack_s + group.exchange_s + group.unpack_s + group.compute_s)
        seconds = total.groupby("repeat").seconds.max().median()
        table.append({"mode": mode, "ranks": int(ranks), "seconds": round(float(seconds), 5)})
    for mode in ("strong", "weak", "weak 1-D"):
        of_mode = pd.DataFrame([row for row in table if row["mode"] == mode])
        if len(of_mode):
            for row, e in zip((r for r in table if r["mode"] == mode), efficiency(of_mode, mode)):
                row["efficiency"] = round(float(e), 3)
    return table


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
    parser.add_argument("what", choices=["measure", "partitions", "model"])
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="default: 1 and 2; of a run that torchrun or srun started: its powers of two"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--exchange", choices=EXCHANGES, default="torch")
    parser.add_argument("--strong-atoms", type=int, default=768)
    parser.add_argument("--weak-atoms", type=int, default=384, help="per rank")
    parser.add_argument("--tiling", choices=["3-D", "1-D"], default="3-D", help="of weak scaling: a block, or cells in a row")
    parser.add_argument("--chunk", type=int, help="messages worked on together; default: 768 on a CPU, all on a GPU")
    parser.add_argument("--only", choices=["all", "node-update", "weak"], default="all", help="of `measure`; other rows stay")
    parser.add_argument("--cutoff", type=float, help="Angstrom; default: 6 of `measure`, 12 of `partitions`")
    parser.add_argument("--most-ranks", type=int, default=8192)
    parser.add_argument("--metis-atoms", type=int, default=192000)
    parser.add_argument("--raw", type=Path, default=Path("resources/raw"))
    o = parser.parse_args()
    o.cutoff = o.cutoff or (6.0 if o.what == "measure" else 12.0)
    {"measure": do_measure, "partitions": do_partitions, "model": do_model}[o.what](o)


if __name__ == "__main__":
    main()
