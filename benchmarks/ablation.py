"""What each part of the training is worth: python benchmarks/ablation.py hfo2 --out resources/raw/ablation_hfo2.csv

Trains variants of config/models/MATERIAL.yaml, one thread, on the DFT of results/MATERIAL (`make hfo2`, `make gst`) and writes
a row per variant and test set: errors, CPU seconds of training, commit. Rows of other variants stay as they are. Each is a
shorter training than the model's own, with a cosine schedule, the same for all.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import yaml

from hamscale.cli.training import fit
from hamscale.config import Model, load_material, load_model
from hamscale.evaluate import evaluate, summarise
from hamscale.files import provenance, read_table, write_table
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import write_graph
from hamscale.graph.reference import read_reference
from hamscale.inputs.model_folder import join
from hamscale.operators import read_operators
from hamscale.train.loop import TrainingFiles, train

# what `default` is, and all others but for their change
DEFAULT = {"networks": 1, "schedule": "cosine", "average": 0.0}
# name: fields of Network and Training; `graph`: of the material's; `structures` and `steps_factor` of this script
VARIANTS = {
    "default": {},
    "mean blocks alone": {"graph": {"crystal_field": False, "two_centre": False}},
    "two-centre reference": {"graph": {"crystal_field": False}},
    "network not told of the crystal field": {"crystal_field": False},
    "onsite weight 0.03": {"onsite_weight": 0.03},
    "onsite weight 0.3": {"onsite_weight": 0.3},
    "L1 alone": {"l2_scale_mev": 1e9},
    "L1 + L2 / 1 meV": {"l2_scale_mev": 1.0},
    "eigenvalue weight 0.03": {"eigenvalue_weight": 0.03},
    "eigenvalue weight 0.1": {"eigenvalue_weight": 0.1},
    "constant rate": {"schedule": "constant"},
    "constant rate, average 0.98": {"schedule": "constant", "average": 0.98},
    "rate 6e-3": {"learning_rate": 6e-3},
    "weight decay 0.1": {"weight_decay": 0.1},
    "lmax 2": {"lmax": 2},
    "lmax 6": {"lmax": 6},
    "1 layer": {"layers": 1},
    "3 layers": {"layers": 3},
    "4 layers": {"layers": 4},
    "8 channels": {"channels": 8, "hidden": 8, "values": 8, "feed_forward": 32},
    "32 channels": {"channels": 32, "hidden": 32, "values": 32, "feed_forward": 128},
    "12 gaussians": {"gaussians": 12},
    "64 gaussians": {"gaussians": 64},
    "2 networks": {"networks": 2},
    "4 networks": {"networks": 4},
    "a quarter of the structures": {"structures": 0.25},
    "a third of the structures": {"structures": 1 / 3},
    "half of the structures": {"structures": 0.5},
    "half of the steps": {"steps_factor": 0.5},
    "twice the steps": {"steps_factor": 2},
    "four times the steps": {"steps_factor": 4},
}
# material: variants left out, steps, sets of training and of test
CHOSEN = {
    "hfo2": ({"a third of the structures"}, 250, ["train", "train_mild"], ["test", "test_mild"]),
    "gst124": (
        {
            *("L1 + L2 / 1 meV", "eigenvalue weight 0.1", "rate 6e-3", "12 gaussians", "64 gaussians", "4 networks"),
            *("a quarter of the structures", "half of the structures", "four times the steps"),
        },
        80,
        ["train", "train_28"],
        ["test_28", "nearly_crystalline"],
    ),
}


def run(name: str, variant: dict, material, sets, o) -> pd.DataFrame:
    variant = dict(variant)
    of_graph, fraction, factor = variant.pop("graph", {}), variant.pop("structures", 1.0), variant.pop("steps_factor", 1)
    content, steps = load_model(f"config/models/{o.material}.yaml").model_dump(), round(o.steps * factor)
    content["training"] |= DEFAULT | {"steps": steps, "validate_every": steps // 10}
    for key, value in variant.items():
        content["network" if key in content["network"] else "training"][key] = value
    operators = {id: Path(f"results/{o.material}/operators/{id}.h5") for ids in sets.values() for id in ids}
    kept = sets["train"][:: round(1 / fraction)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        changed = json.loads(material.model_dump_json(exclude_none=True))
        changed["graph"] |= of_graph
        (folder / "material.yaml").write_text(yaml.safe_dump(changed))
        fit(folder / "material.yaml", [operators[id] for id in kept], folder / "reference.h5")
        reference = read_reference(folder / "reference.h5")
        for id in [*kept, *sets["validation"]]:
            write_graph(folder / f"{id}.h5", BlockCodec(reference).encode(read_operators(operators[id])))
        files = [[folder / f"{id}.h5" for id in ids] for ids in (kept, sets["validation"])]
        started, cpu = time.time(), time.process_time()
        print(name, flush=True)
        model = Model.model_validate(content)
        of_kept = [operators[id] for id in kept] if model.training.eigenvalue_weight else []
        networks = [folder / f"{k}" for k in range(model.training.networks)]
        for k, out in enumerate(networks):
            checkpoint = folder / f"checkpoint-{k}"
            train(model, TrainingFiles(folder / "reference.h5", *files, of_kept), out, checkpoint, k)
        join(networks, folder / "model")
        cost = {"train_cpu_s": round(time.process_time() - cpu), "train_wall_s": round(time.time() - started)}
        table = pd.read_csv(folder / "model" / "train.csv")
        rows, _ = evaluate(folder / "model", material, [operators[id] for id in sets["test"]])
    of_networks = table.groupby("network")
    training_error = {
        "train_mae_mev": of_networks["train_mae_mev"].last().mean(),
        "validation_mae_mev": of_networks["validation_mae_mev"].min().mean(),
    }
    return pd.DataFrame(
        [
            {"variant": name, "set": of_set, "structures": len(kept), "steps": steps}
            | {key: value for key, value in summarise(part).items() if key not in ("structures", "atoms", "elements")}
            | training_error
            | cost
            | {"git_commit": provenance()["git_commit"]}
            for of_set, part in rows.groupby("set", sort=False)
        ]
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("material", choices=CHOSEN)
    parser.add_argument("--steps", type=int, help="default: 250 for hfo2, 80 for gst124")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    material = load_material(f"config/materials/{o.material}.yaml")
    left_out, steps, *chosen = CHOSEN[o.material]
    o.steps = o.steps or steps
    sets = {
        split: [id for id in material.identifiers(split) if names is None or id.rsplit("-", 1)[0] in names]
        for split, names in zip(("train", "test", "validation"), (*chosen, None))
    }
    for name in o.variants or [name for name in VARIANTS if name not in left_out]:
        rows = run(name, VARIANTS[name], material, sets, o)
        print(rows.to_string(index=False), flush=True)
        table = read_table(o.out) if o.out.is_file() else pd.DataFrame({"variant": []})
        table = pd.concat([table[table["variant"] != name], rows]).reset_index(drop=True)
        order = {variant: k for k, variant in enumerate(VARIANTS)}
        table = table.sort_values("variant", key=lambda column: column.map(order), kind="stable")
        write_table(o.out, table, material=o.material, train=sets["train"], test=sets["test"])


if __name__ == "__main__":
    main()
