"""Messages per second of the message transformation against the number of messages: python benchmarks/throughput.py

The node update of a layer that is not the first, forward: rotate, SO(2) convolutions, attention, rotate back, sum. E channels
everywhere (channels, hidden, values), lmax 4, two heads. HfO2 at 6 A, 768 atoms; fewer messages are those into fewer atoms. A
curve ends where one pass takes --longest seconds. On a CPU seconds are of CPU time, over the threads: neighbours on the machine
take turns, and wall time would be theirs too. `saturated`: the rate is within 10 % of the highest of its curve. --device cuda
measures a GPU, --most-atoms how far: the paper goes to some 1e5 messages. Rows of other devices stay in the table.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import devices
from hamscale.basis import Basis, read_element_basis
from hamscale.config import Network
from hamscale.files import provenance, read_table, write_table
from hamscale.graph.graph import structure_graph
from hamscale.inputs.tensors import build_network, piece_inputs
from network import hafnia, unit_reference

LMAX, CUTOFF = 4, 6.0
ATOMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1536, 3072)
CHANNELS = (16, 32, 64, 128)


def inputs_of(graph, reference, n_atoms: int, o: argparse.Namespace):
    """The messages into the first atoms of a graph, from all of them."""
    owned, others = np.arange(n_atoms), np.arange(n_atoms, len(graph.atoms))
    part = graph.part(owned)
    return piece_inputs(part, reference, LMAX, torch.float32, others, devices.chunk(o, len(part.edges)))


def seconds(network, inputs, channels: int, device: str, repeats: int) -> float:
    """The least of the passes, after one that warms up."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    rows, channels = 2 * (LMAX + 1) ** 2, channels // 2
    x = torch.randn(len(inputs.species), rows, channels, device=device)
    edges = [torch.randn(rows, last - first, channels, device=device) for first, last, _, _ in inputs.spans]
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = clock()
            network.next_nodes(1, inputs, x, edges)
            devices.finish(device)
            times.append(clock() - start)
    return min(times[1:]) / (1 if device == "cuda" else torch.get_num_threads())


def measure(o) -> pd.DataFrame:
    devices.check(o.device)
    torch.set_num_threads(o.threads)
    elements, counts = ("Hf", "O"), [n for n in ATOMS if n <= o.most_atoms]
    basis = Basis(read_element_basis(e, "SZV-MOLOPT-SR-GTH", "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS") for e in elements)
    reference, graph = unit_reference(basis, CUTOFF), structure_graph(hafnia(max(768, o.most_atoms)), basis, CUTOFF)
    name = devices.name(o.device, f"{o.threads} thread{'s'[: o.threads > 1]}")
    rows = []
    for channels in CHANNELS:
        torch.manual_seed(0)
        settings = Network(lmax=LMAX, layers=2, channels=channels, hidden=channels, values=channels, feed_forward=64)
        network = build_network(settings, reference).to(o.device)
        took = 0.0
        for n_atoms in counts:
            if took * 1.5 > o.longest:  # the next is about twice as long
                break
            inputs = inputs_of(graph, reference, n_atoms, o)
            inputs = replace(inputs.to(o.device), pairs={})
            took = seconds(network, inputs, channels, o.device, o.repeats)
            messages = len(inputs.source)
            rows.append({"device": name, "channels": channels, "messages": messages, "seconds": took})
            print(json.dumps(rows[-1]), flush=True)
    table = pd.DataFrame(rows)
    table["messages_per_second"] = table.messages / table.seconds
    highest = table.groupby("channels").messages_per_second.transform("max")
    table["saturated"] = table.messages_per_second > 0.9 * highest
    table["message_kib"] = 3 * (LMAX + 1) ** 2 * table.channels * 4 / 1024
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, help="messages that are worked on together; default: 768 on a CPU, all on a GPU")
    parser.add_argument("--most-atoms", type=int, help="default: 768 on a CPU, 3,072 on a GPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--longest", type=float, default=4.0, help="seconds of one pass")
    parser.add_argument("--raw", type=Path, default=Path("resources/raw"))
    o = parser.parse_args()
    o.most_atoms = o.most_atoms or (768 if o.device == "cpu" else 3072)
    table, path = measure(o), o.raw / "fig3.csv"
    if path.is_file():
        known = read_table(path)
        table = pd.concat([known[~known.device.isin(table.device)], table])
    write_table(path, table)
    print(json.dumps({"rows": len(table), "csv": str(path)} | provenance()))


if __name__ == "__main__":
    main()
