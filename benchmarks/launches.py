"""Count what a pass would launch on a GPU, and model what a GPU could do at best: python benchmarks/launches.py

launches.csv: operations that are neither views nor allocations, two layers, C = 16, HfO2 at 6 A, by way of arranging them
(model/chunks.py), number of atoms and pass; exact, and the same on every machine. The backward pass begins at the components
of H: the loss is not in it. Operations on a GPU are launches; a few, such as a sum of many values, are two.

roofline.csv: bytes and FLOP of a forward pass in one chunk per edge, by kind of operation and number of channels, HfO2 at 12 A,
from the shapes of all operations. roofline_rates.csv: messages per second that follow from them and from the data sheets of
GPUs (paper/roofline.py). They are modelled: no GPU was used.
"""

import argparse
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

from hamscale.files import write_table
from hamscale.model.chunks import Way
from hamscale.model.operations import Operations
from hamscale.paper.roofline import GPUS, by_kind, rates
from network import build, options

PASSES = {"forward": False, "forward and backward": True}
ALL = 10**9


def counted(model, inputs, backward: bool) -> Operations:
    """The operations of one pass, after one that has filled the buffers."""
    for _ in range(1 if inputs.distances.is_meta else 2):
        model.zero_grad(set_to_none=True)
        with Operations() as operations, torch.set_grad_enabled(backward):
            outputs = [values for part in model(inputs) for values in part.values()]
            if backward:
                torch.autograd.backward(outputs, outputs)
    return operations


def launches(atoms_of: list[int]) -> pd.DataFrame:
    rows = []
    for atoms in atoms_of:
        model, inputs = build(options(["--atoms", str(atoms), "--layers", "2"]))
        for way in Way:
            arranged = inputs.arranged(way, ALL)
            for name, backward in PASSES.items():
                kinds = Counter(operation.kind for operation in counted(model, arranged, backward).counted)
                facts = {"way": way.value, "pass": name, "atoms": atoms, "edges": len(inputs.source)}
                rows.append(facts | {"chunks": len(arranged.spans), "operations": kinds.total()} | kinds)
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def per_operation(channels: int, dtype: str, atoms: int) -> tuple[int, pd.DataFrame]:
    """Number of edges, and a row (kind, bytes, flop, short) for every operation of a forward pass, in their order."""
    model, inputs = build(
        options(
            ["--atoms", str(atoms), "--cutoff", "12", "--layers", "2", "--dtype", dtype, "--channels", str(channels)]
            + ["--feed-forward", str(4 * channels)]
        )
    )
    arranged = inputs.to("meta").arranged(Way.BATCHED, ALL)
    operations = counted(model.to("meta"), arranged, backward=False)
    rows = [(o.kind, o.bytes, o.flop, o.short) for o in operations.counted]
    return len(inputs.source), pd.DataFrame(rows, columns=["kind", "bytes", "flop", "short"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--raw", type=Path, default=Path("results/raw"))
    parser.add_argument("--atoms", type=int, nargs="+", default=[12, 96, 324])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    o = parser.parse_args()
    command = "python benchmarks/launches.py"
    write_table(o.raw / "launches.csv", launches(o.atoms), command=command)
    kinds, curves = [], []
    for channels in o.channels:
        for dtype in ("float32", "mixed"):
            small, large = (per_operation(channels, dtype, atoms) for atoms in (48, 96))
            kinds.append(by_kind(small, large).assign(channels=channels, precision=dtype))
            curves += [rates(small, large, gpu).assign(channels=channels, precision=dtype) for gpu in GPUS]
            print(channels, dtype, kinds[-1].to_string(), flush=True)
    write_table(o.raw / "roofline.csv", pd.concat(kinds), kind="modelled", command=command)
    write_table(o.raw / "roofline_rates.csv", pd.concat(curves), kind="modelled", command=command)


if __name__ == "__main__":
    main()
