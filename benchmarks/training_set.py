"""Training on more structures than memory holds: python benchmarks/training_set.py

Writes --structures graph files of the size of MoS2 (6 atoms, DZVP, 2,650 edges), each with targets of its own, to a folder that
is removed afterwards, and trains config/models/demo.yaml on them for --steps steps, a structure each:

- streamed: with training.cache_gib of --cache-gib, after all structures have been read once, so that what stays in memory is
  all that may; peak resident memory of the process, which makes no other steps;
- compared: the same steps, in one process and in turns, streamed with no cache (every structure is read while those before it
  are computed), and with those structures in memory before the first step. Seconds are wall time; `ratio` is the median over
  steps of one over the other, `cpu_ratio` that of the sums of CPU time of the process, and `same` says whether all losses and
  the weights after the last step are the same bits.

Blocks are made up, since time and memory do not depend on their numbers. Prints one JSON line last; --out adds it to a table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data import made_up_operators
from hamscale.basis import material_basis
from hamscale.building import build_structure
from hamscale.config import Model, load_material, load_model
from hamscale.files import provenance, read_table, write_table
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import write_graph
from hamscale.graph.reference import write_reference
from hamscale.parallel.env import World
from hamscale.structures import wrap_as_cp2k
from hamscale.train.loop import Trainer, TrainingFiles
from hamscale.train.structures import Structures
from network import peak_bytes, unit_reference

CUTOFF = 12.3  # Angstrom, as the material's own reference has it


def write_set(folder: Path, structures: int) -> None:
    """Write a reference and graphs that differ in their targets."""
    material = load_material("config/materials/mos2.yaml")
    basis = material_basis(material)
    reference = unit_reference(basis, CUTOFF)
    write_reference(folder / "reference.h5", reference)
    atoms = wrap_as_cp2k(build_structure(material, "train-000"))
    graph = BlockCodec(reference).encode(made_up_operators(atoms, basis, CUTOFF))
    random = np.random.default_rng(0)
    for k in range(structures):
        offsite, onsite = (
            {key: blocks * random.uniform(0.5, 1.5, blocks.shape) * 1e-3 for key, blocks in of.items()}
            for of in (graph.offsite, graph.onsite)
        )
        write_graph(folder / f"{k:05d}.h5", replace(graph, offsite=offsite, onsite=onsite))


def trainer(folder: Path, name: str, steps: int, cache_gib: float) -> Trainer:
    paths = sorted(folder.glob("[0-9]*.h5"))
    settings = load_model("config/models/demo.yaml").model_dump()
    settings["training"] |= {"steps": steps, "validate_every": 10 * steps, "cache_gib": cache_gib}
    files = TrainingFiles(folder / "reference.h5", paths[1:], paths[:1])
    return Trainer(Model.model_validate(settings), files, folder / name, folder / f"{name}-checkpoint", 0, World(), 1, "torch")


def timed_step(trained: Trainer, step: int, structures: Structures) -> tuple[float, float, list[float]]:
    """Make a step. Returns wall and CPU seconds, and sums of its errors, which are the same bits only if its loss is."""
    trained.learner.set_rate(step)
    started, cpu = time.perf_counter(), time.process_time()
    trained.step(step, structures)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    errors, trained.recent = trained.recent.totals.flatten().tolist(), type(trained.recent)()
    return seconds, cpu, errors


def streamed(folder: Path, steps: int, cache_gib: float) -> dict:
    started = time.perf_counter()
    trained = trainer(folder, "streamed", steps, cache_gib)
    ready = time.perf_counter() - started
    room = trained.settings.cache_gib * 2**30
    every = range(len(trained.files.train))
    with Structures(trained.prepare, chain(every, trained.order()), trained.is_mine, room) as structures:
        for _ in every:
            next(structures)
        seconds = [timed_step(trained, step, structures)[0] for step in range(steps)]
        kept = sum(structure.nbytes for structure in structures.kept.values())
    return {
        "start_s": round(ready, 2),
        "streamed_s_per_step": round(float(np.median(seconds)), 4),
        "kept_gib": round(kept / 2**30, 2),
        "peak_gib": round(peak_bytes() / 2**30, 2),
    }


def compared(folder: Path, steps: int) -> dict:
    read, held = (trainer(folder, name, steps, 0.0) for name in ("read", "held"))
    numbers = list(held.order())[:steps]
    seconds, same = [], True
    with (
        Structures(read.prepare, read.order(), read.is_mine, 0.0) as coming,
        Structures(held.prepare, chain(numbers, held.order()), held.is_mine, float("inf")) as there,
    ):
        size = [next(there).nbytes for _ in numbers]
        for step in range(steps):
            turns = [(read, coming), (held, there)]
            of_turns = [timed_step(trained, step, structures) for trained, structures in turns[:: 1 if step % 2 else -1]]
            (*of_read, found), (*of_held, expected) = of_turns[:: 1 if step % 2 else -1]
            seconds.append((of_read, of_held))
            same = same and found == expected
    weights = [trained.learner.model.state_dict() for trained in (read, held)]
    same = same and all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))
    times, cpu = np.array(seconds).transpose(2, 0, 1)
    return {
        "structure_mib": round(float(np.mean(size)) / 2**20, 2),
        "read_s_per_step": round(float(np.median(times[:, 0])), 4),
        "in_memory_s_per_step": round(float(np.median(times[:, 1])), 4),
        "ratio": round(float(np.median(times[:, 0] / times[:, 1])), 4),
        "cpu_ratio": round(float(cpu[:, 0].sum() / cpu[:, 1].sum()), 4),
        "same": same,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--structures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache-gib", type=float, default=Model().training.cache_gib)
    parser.add_argument("--folder", type=Path, help="where the graphs go; default: the folder for temporary files")
    parser.add_argument("--out", type=Path, help="table to add a row to")
    parser.add_argument("--part", choices=["streamed", "compared"], help="with a --folder that has the graphs: one part alone")
    o = parser.parse_args()
    if o.part:
        result = streamed(o.folder, o.steps, o.cache_gib) if o.part == "streamed" else compared(o.folder, o.steps)
        print(json.dumps(result))
        return
    row = {"structures": o.structures, "steps": o.steps, "cache_gib": o.cache_gib, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        write_set(Path(folder), o.structures + 1)
        row["files_gb"] = round(sum(path.stat().st_size for path in Path(folder).glob("[0-9]*.h5")) / 1e9, 2)
        for part in ("streamed", "compared"):
            command = [sys.executable, __file__, "--folder", folder, "--part", part, "--steps", str(o.steps)]
            said = subprocess.run([*command, "--cache-gib", str(o.cache_gib)], check=True, stdout=subprocess.PIPE, text=True)
            row |= json.loads(said.stdout.splitlines()[-1])
    row |= {"git_commit": provenance()["git_commit"]}
    if o.out:
        rows = [read_table(o.out)] if o.out.is_file() else []
        sizes = f"--structures {o.structures} --steps {o.steps} --cache-gib {o.cache_gib}"
        command = f"python benchmarks/training_set.py {sizes} --out {o.out}"
        write_table(o.out, pd.concat([*rows, pd.DataFrame([row])]), command=command)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
