"""Share of exchange that is hidden behind work that needs no ghosts: torchrun --nproc-per-node 4 benchmarks/overlap.py

A training step of HfO2, three layers, lmax 4, C = 16: forward and backward pass on CPUs, by gloo. Of every exchange two
times are taken: from sending until all has arrived, and those in which the rank did nothing else, sending or waiting. What is
hidden is 1 less their ratio. `at once`: the same with every exchange waited for as soon as it is sent. Times are sums over
ranks and exchanges, the median of --repeats steps. Writes overlap.csv.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

import devices
from hamscale.files import provenance, read_table, write_table
from hamscale.graph.graph import structure_graph
from hamscale.inputs.ranks import rank_part
from hamscale.inputs.tensors import graph_inputs
from hamscale.parallel.exchange import TorchExchange
from network import hafnia
from scaling import LMAX, parts_of_network


class Watched(TorchExchange):
    """An exchange of which a thread waits for all messages, so that their arrival is known even if nobody asked yet."""

    def __init__(self, *args):
        super().__init__(*args)
        self.thread, self.travel_s = ThreadPoolExecutor(1), 0.0

    def start(self) -> None:
        """Begin to measure, on all ranks together."""
        self.world.barrier()
        self.statistics.clear()
        self.travel_s = 0.0

    def seconds(self) -> tuple[float, float]:
        """Return how long messages were on their way since `start`, and how long this rank spent on sending and waiting."""
        return self.travel_s, self.statistics.exchange_s

    def transfer(self, ranks: list[int], messages: list, buffers: Sequence) -> Callable[[], None]:
        started = self.now()
        wait = super().transfer(ranks, messages, buffers)

        def arrive() -> None:
            wait()
            self.travel_s += self.now() - started

        return self.thread.submit(arrive).result


class AtOnce:
    """An exchange whose halves follow one another; its backward pass as of the exchange."""

    def __init__(self, exchange: TorchExchange):
        self.exchange = exchange

    def post(self, x: torch.Tensor) -> Callable:
        known = self.exchange(x)
        return lambda: known

    def post_edges(self, blocks: dict) -> Callable:
        theirs = self.exchange.post_edges(blocks)()
        return lambda: theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, default=384)
    parser.add_argument("--cutoff", type=float, default=6.0, help="Angstrom")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--raw", type=Path, default=Path("resources/raw"))
    o = parser.parse_args()
    basis, reference, network = parts_of_network(o.cutoff)
    with devices.ranks("cpu") as w:
        part = rank_part(structure_graph(hafnia(o.atoms), basis, o.cutoff), reference, w, w.size)
        inputs = graph_inputs(part.graph, reference, LMAX, torch.float32, halo=part.halo)
        local = len(inputs.source) / len(part.graph.edges)
        swap = Watched(part.halo, w, 0, part.blocks)
        ways, rows = {"between": swap, "at once": AtOnce(swap)}, []
        for repeat in range(o.repeats + 1):
            for way, exchange in ways.items():  # in turn: neighbours on the machine come and go
                network.zero_grad(set_to_none=True)
                swap.start()
                offsite, onsite = network(inputs, exchange, recompute=True)
                loss = sum(v.square().mean() for v in (*offsite.values(), *onsite.values()))
                times = {"forward": swap.seconds()}
                swap.start()
                loss.backward()
                times["backward"] = swap.seconds()
                for direction, seconds in times.items():
                    travel, waited, share = w.sum(torch.tensor([*seconds, local / w.size], dtype=torch.float64)).tolist()
                    names = {"way": way, "pass": direction, "repeat": repeat}
                    rows.append(names | {"travel_s": travel, "waited_s": waited, "local_edges": share})
        if w.is_root:
            table = pd.DataFrame(rows)
            table = table[table.repeat > 0].groupby(["way", "pass"], as_index=False, sort=False).median().drop(columns="repeat")
            table["hidden"] = 1 - table.waited_s / table.travel_s
            names = {"device": devices.name("cpu", "a core per rank"), "ranks": w.size, "atoms": o.atoms}
            table = table.assign(**names, cutoff_angstrom=o.cutoff)
            path = o.raw / "overlap.csv"
            if path.is_file():
                known = read_table(path)
                again = (known[list(names)] == list(names.values())).all(axis=1) & (known.cutoff_angstrom == o.cutoff)
                table = pd.concat([known[~again], table])
            write_table(path, table, digits=4)
            print(table.to_string(index=False))
            print(json.dumps({"csv": str(path)} | provenance()))


if __name__ == "__main__":
    main()
