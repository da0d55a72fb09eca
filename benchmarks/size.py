"""A prediction at size, from structure to file: python benchmarks/size.py --material gst --repeat 2 2 2

gst: a cell of 1,008 atoms of GeSb2Te4 as config/materials/gst124.yaml makes it, 12 A; hfo2: 3,000 atoms of hafnia, 12 A; or
another --structure of that material. Tiled by --repeat, predicted by a network of two layers with random weights (time and
memory do not depend on them), H and exact S streamed to a file in --folder. --train: instead, one training step on the cell
itself, three layers, C = 16, recomputing. Prints one JSON line last: wall and CPU seconds, peak resident memory, size of the
file; --out adds it to a table. Started by torchrun, ranks share the prediction: cpu_s and peak_gib are then those of the rank
with most. Without --material, all that the table resources/raw/size.csv has, each in a process of its own:
about an hour on two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from hamscale.basis import material_basis
from hamscale.building import build_structure
from hamscale.config import Network, load_material
from hamscale.files import provenance, read_table, write_table
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import write_reference
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.parallel.env import World, world
from hamscale.predict import predict
from hamscale.structures import wrap_as_cp2k
from network import peak_bytes, unit_reference

CELLS = {"gst": ("gst124", "cell_1008-000"), "hfo2": ("hfo2", "cell_3000-000")}
# from 7e3 to 1.4e7 edges, and the sizes of the paper
RUNS = (
    "hfo2 --structure test-000",
    "hfo2 --structure test-000 --repeat 2 2 2",
    "hfo2 --structure test-000 --repeat 4 4 4",
    "hfo2",
    "hfo2 --repeat 2 2 2",
    "gst --structure test-000",
    "gst",
    "gst --repeat 2 2 2",
    "hfo2 --train --structure test-000",
    "hfo2 --train --structure test-000 --repeat 2 2 2",
    "hfo2 --train --structure test-000 --repeat 4 4 4",
    "hfo2 --train",
)


def training_step(model, atoms, reference, cutoff: float):
    """One forward and backward pass: a loss of everything that is read out."""
    graph = structure_graph(wrap_as_cp2k(atoms), reference.basis, cutoff)
    inputs = graph_inputs(graph, reference, model.lmax, torch.float32)
    offsite, onsite = model(inputs, recompute=True)
    sum(v.square().mean() for part in (offsite, onsite) for v in part.values()).backward()
    return len(graph.edges)


def prediction(w: World, model, reference, network: Network, atoms, folder: str | None) -> tuple[dict, int]:
    """Predict with the ranks of a world, and return what a row says of it and the number of edges."""
    # a name that all ranks know
    name = Path(folder or tempfile.gettempdir()) / f"size-{os.environ.get('MASTER_PORT', os.getpid())}"
    if w.is_root:
        name.mkdir()
        write_reference(name / "r.h5", reference)
        save_model(name / "model", [model.state_dict()], network.model_dump(), name / "r.h5", {})
    w.barrier()
    try:
        start = time.perf_counter()
        result = predict(name / "model", atoms, world=w)
        row = {"forward_s": round(time.perf_counter() - start, 1)}
        result.write(name / "h.h5", w)
        edges = w.sum(torch.tensor(len(result.blocks.graph.edges)))
        files = [name / "h.h5", *(name / "h.h5.shards").glob("*.h5")]
        row["file_gb"] = round(sum(file.stat().st_size for file in files) / 1e9, 2)
        w.barrier()
    finally:
        if w.is_root:
            shutil.rmtree(name)
    return row | {"orbitals": int(reference.basis.n_orbitals(atoms.numbers).sum())}, int(edges)


def largest(w: World, value: float) -> float:
    """Return the largest value of all ranks."""
    values = torch.zeros(w.size, dtype=torch.float64)
    values[w.rank] = value
    return float(w.sum(values).max())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--material", choices=CELLS)
    parser.add_argument("--structure", help="ID of the material; default: its large cell")
    parser.add_argument("--repeat", type=int, nargs=3, default=(1, 1, 1))
    parser.add_argument("--cutoff", type=float, default=12.0, help="Angstrom")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--folder", help="where H goes; default: the folder for temporary files")
    parser.add_argument("--out", type=Path, help="table to add a row to")
    o = parser.parse_args()
    if not o.material:
        common = [
            "--cutoff",
            str(o.cutoff),
            *(["--folder", o.folder] if o.folder else []),
            *(["--out", str(o.out)] if o.out else []),
        ]
        for run in RUNS:
            subprocess.run([sys.executable, __file__, "--material", *run.split(), *common], check=True)
        return
    name, cell = CELLS[o.material]
    material = load_material(f"config/materials/{name}.yaml")
    reference = unit_reference(material_basis(material), o.cutoff)
    network = Network(layers=3 if o.train else 2, gaussians=32)
    torch.manual_seed(0)
    model, atoms = build_network(network, reference), build_structure(material, o.structure or cell)
    with world("cpu") as w:
        start, cpu = time.perf_counter(), time.process_time()
        atoms = atoms.repeat(o.repeat)
        if o.train:
            result, edges = {}, training_step(model, atoms, reference, o.cutoff)
        else:
            result, edges = prediction(w, model, reference, network, atoms, o.folder)
        result |= {"wall_s": round(time.perf_counter() - start, 1), "cpu_s": round(largest(w, time.process_time() - cpu), 1)}
        result |= {"peak_gib": round(largest(w, peak_bytes() / 2**30), 2), "threads": torch.get_num_threads()}
        if not w.is_root:
            return
    what = {"material": o.material, "atoms": len(atoms), "edges": edges, "cutoff_angstrom": o.cutoff, "training_step": o.train}
    row = what | result | {"ranks": w.size, "git_commit": provenance()["git_commit"]}
    if o.out:
        rows = [read_table(o.out)] if o.out.is_file() else []
        write_table(o.out, pd.concat([*rows, pd.DataFrame([row])]).sort_values(["training_step", "material", "edges"]))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
