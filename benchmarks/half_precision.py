"""What exchange in 16 bits costs: change of predicted H, and the bytes that travel: python benchmarks/half_precision.py

Held-out structures, predicted by the models of resources/models on 2 and on 4 ranks, by every exchange of torch: changes of the
coupled components of H within the cutoff, mean and largest, against what travels in float32. Writes half_precision.csv.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

import devices
from hamscale.building import build_structure
from hamscale.config import load_material
from hamscale.files import provenance, read_table, write_table
from hamscale.parallel.env import World
from hamscale.predict.model import Residual, TrainedModel
from hamscale.units import hartree_to_mev

CASES = {"hfo2": "test_96-000", "gst124": "test-000"}
EXCHANGES = ("torch", "torch-float16", "torch-bfloat16")


def flat(residual: Residual) -> tuple[torch.Tensor, torch.Tensor]:
    """The components of edges and of atoms, meV."""
    return tuple(
        hartree_to_mev(1.0) * torch.cat([torch.empty(0), *(torch.from_numpy(v).flatten() for v in part.values())])
        for part in (residual.offsite, residual.onsite)
    )


def compare(w: World, name: str, structure: str) -> list[dict]:
    model = TrainedModel.load(f"resources/models/{name}")
    atoms = build_structure(load_material(f"config/materials/{name}.yaml"), structure)
    rows, exact = [], None
    for exchange in EXCHANGES:
        part = model.part(atoms, w, exchange)
        found = flat(model.residual(part, world=w))
        exact = exact or found
        difference = [(a - b).abs().double() for a, b in zip(found, exact)]
        largest, sums = torch.zeros(w.size, 2, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        largest[w.rank] = torch.stack([d.max() for d in difference])
        sent = part.exchange.statistics.bytes_sent
        sums[:] = torch.tensor([*(d.sum() for d in difference), *(len(d) for d in difference), sum(sent.values())])
        offsite, onsite, n_offsite, n_onsite, n_bytes = w.sum(sums).tolist()
        row = {"model": name, "structure": structure, "atoms": len(atoms), "ranks": w.size, "exchange": exchange}
        row |= {"mean_mev": (offsite + onsite) / (n_offsite + n_onsite), "mean_mev_offsite": offsite / n_offsite}
        row |= {"mean_mev_onsite": onsite / n_onsite, "largest_mev": float(w.sum(largest).max()), "sent_mib": n_bytes / 2**20}
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--raw", type=Path, default=Path("resources/raw"))
    o = parser.parse_args()
    path = o.raw / "half_precision.csv"
    with devices.ranks("cpu") as w:
        if w.size > 1:
            rows = [row for name, structure in CASES.items() for row in compare(w, name, structure)]
            if w.is_root:
                table = pd.DataFrame(rows)
                if path.is_file():
                    known = read_table(path)
                    table = pd.concat([known[known.ranks != w.size], table])
                write_table(path, table, digits=4)
                print(table.to_string(index=False))
            return
    for ranks in o.ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run([*launcher, __file__, "--raw", o.raw], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(json.dumps({"csv": str(path)} | provenance()))


if __name__ == "__main__":
    main()
