"""Cost of BLAS threads, alone and beside one busy process.

    python benchmarks/threads.py --model results/hfo2_demo/models/demo --out resources/raw/threads.csv

Generalised eigenvalues of n orbitals on one and on two threads, and `hamscale evaluate` of a model (`make demo`), each with
nothing else on the machine and with one process that computes without end. Medians of the repeats; run it on a machine that
does nothing else.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.linalg
from threadpoolctl import threadpool_limits

from hamscale.files import write_table

BUSY = [sys.executable, "-c", "while True: pass"]


@contextmanager
def busy():
    process = subprocess.Popen(BUSY)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def timed(work, repeats: int, of: int) -> dict:
    """Median CPU and wall seconds of work(), of this process or of the children it waits for."""
    cpu, wall = [], []
    for _ in range(repeats):
        before, started = resource.getrusage(of), time.perf_counter()
        work()
        after = resource.getrusage(of)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        wall.append(time.perf_counter() - started)
    return {"cpu_s": statistics.median(cpu), "wall_s": statistics.median(wall)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a model whose test set is evaluated, with its DFT in results/")
    parser.add_argument("--orbitals", type=int, nargs="+", default=[300, 600, 1200, 2400, 3600])
    parser.add_argument("--out", type=Path, required=True)
    o, rows = parser.parse_args(), []
    rng = np.random.default_rng(0)
    for n in o.orbitals:
        H = rng.normal(size=(n, n))
        H, S = H + H.T, np.eye(n) + 0.1 * H @ H.T / n
        for threads in (1, 2):
            for beside in (False, True):
                with threadpool_limits(threads, user_api="blas"), busy() if beside else nullcontext():
                    cost = timed(lambda: scipy.linalg.eigh(H, S), 5 if n < 2000 else 1, resource.RUSAGE_SELF)  # noqa: B023
                rows.append({"what": f"eigh {n}", "threads": threads, "beside": int(beside)} | cost)
                print(json.dumps(rows[-1]), flush=True)
    for beside in (False, True) if o.model else ():
        command = [sys.executable, "-m", "hamscale", "evaluate", str(o.model), "--split", "test"]
        # the busy process is a child too, but counts only once it is waited for, after the last repeat
        with busy() if beside else nullcontext():
            cost = timed(lambda: subprocess.run(command, check=True, capture_output=True), 3, resource.RUSAGE_CHILDREN)  # noqa: B023
        rows.append({"what": "evaluate", "threads": 0, "beside": int(beside)} | cost)
        print(json.dumps(rows[-1]), flush=True)
    write_table(o.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
