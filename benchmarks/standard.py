"""The standard set of `benchmarks/network.py`, one fresh process each, into results/benchmarks/network.csv: make bench

--device cuda leaves out what differs in threads alone, and adds what fills a GPU: into network_cuda.csv, make bench-gpu
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

import devices
from hamscale.files import write_text

CASES = [
    "--atoms 324",
    "--atoms 324 --recompute",
    "--atoms 324 --threads 2",
    "--atoms 96 --layers 3",
    "--atoms 96 --layers 3 --recompute",
    "--atoms 96 --layers 3 --dtype mixed",
    "--graph gst --atoms 72 --cutoff 12 --layers 3 --recompute --repeats 3",
    "--atoms 96 --channels 64",
    "--atoms 96 --channels 64 --feed-forward 256",
    "--atoms 324 --layers 3 --mode forward",
    "--atoms 324 --layers 3 --mode forward --threads 2",
]
LARGE = ["--atoms 1536 --layers 3 --recompute", "--atoms 3072 --layers 3 --mode forward"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    o = parser.parse_args()
    devices.check(o.device)
    rows, cases = [], CASES if o.device == "cpu" else [case for case in CASES if "--threads" not in case] + LARGE
    for case in cases:
        command = [sys.executable, Path(__file__).with_name("network.py"), *case.split(), "--device", o.device]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append({"case": case} | json.loads(output.splitlines()[-1]))
        print(case, {key: rows[-1][key] for key in ("us_per_edge", "wall_s", "kb_per_edge", "floor_us_per_edge")}, flush=True)
    out = Path(f"results/benchmarks/network{'' if o.device == 'cpu' else '_cuda'}.csv")
    write_text(out, pd.DataFrame(rows).to_csv(index=False))
    print(out)


if __name__ == "__main__":
    main()
