"""A prediction at size, from structure to file: python benchmarks/size.py --material gst --repeat 2 2 2

gst: a cell of 1,008 atoms of GeSb2Te4 as config/materials/gst124.yaml makes it, 12 A; hfo2: 3,000 atoms of hafnia, 12 A; or
another --structure of that material. Tiled by --repeat, predicted by a network of two layers with random weights (time and
memory do not depend on them), H and exact S streamed to a file in --folder. --train: instead, one training step on the cell
itself, three layers, C = 16, recomputing. Prints one JSON line last: wall and CPU seconds, peak resident memory, size of the
file; --out adds it to a table. Without --material, all that the table resources/raw/size.csv has, each in a process of its own:
about an hour on two cores.
"""

import argparse
import json
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
    result, edges = {}, 0
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        folder = Path(folder)
        write_reference(folder / "r.h5", reference)
        save_model(folder / "model", [model.state_dict()], network.model_dump(), folder / "r.h5", {})
        start, cpu = time.perf_counter(), time.process_time()
        atoms = atoms.repeat(o.repeat)
        if o.train:
            edges = training_step(model, atoms, reference, o.cutoff)
        else:
            prediction = predict(folder / "model", atoms)
            result["forward_s"] = round(time.perf_counter() - start, 1)
            prediction.write(folder / "h.h5")
            edges = len(prediction.blocks.graph.edges)
            orbitals = int(reference.basis.n_orbitals(atoms.numbers).sum())
            result |= {"orbitals": orbitals, "file_gb": round((folder / "h.h5").stat().st_size / 1e9, 2)}
        result |= {"wall_s": round(time.perf_counter() - start, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    result |= {"peak_gib": round(peak_bytes() / 2**30, 2), "threads": torch.get_num_threads()}
    what = {"material": o.material, "atoms": len(atoms), "edges": edges, "cutoff_angstrom": o.cutoff, "training_step": o.train}
    row = what | result | {"git_commit": provenance()["git_commit"]}
    if o.out:
        rows = [read_table(o.out)] if o.out.is_file() else []
        write_table(o.out, pd.concat([*rows, pd.DataFrame([row])]).sort_values(["training_step", "material", "edges"]))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
