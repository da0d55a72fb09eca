# Configuration, checked before the DAG is built, and the paths that follow from it.
from pathlib import Path

from hamscale.cli import check_configuration
from hamscale.config import load_material, load_model, validate, Config
from snakemake.exceptions import WorkflowError

try:
    CONFIG = check_configuration(validate("config", config, Config))
    RUNS, CLUSTER = CONFIG.runs, CONFIG.cluster
    MATERIALS = {
        run.material: load_material(f"config/materials/{run.material}.yaml")
        for run in RUNS
    }
    MODELS = {run.model: load_model(f"config/models/{run.model}.yaml") for run in RUNS}
except ValueError as error:
    raise WorkflowError(str(error)) from None

FIGURES = (
    "bands",
    "dos",
    "error_by_pair",
    "error_by_distance",
    "decay",
    "heatmap",
    "training",
)

FIGURE_8_TABLES = ("summary", "decay", "blocks", "bands", "dos", "atoms", "image")


wildcard_constraints:
    material="[A-Za-z0-9_]+",
    model="[A-Za-z0-9_]+",
    id=r"[A-Za-z0-9_]+-\d{3}",
    batch=r"\d+",
    parts=r"\d+",


def settings(*sections):
    """Parameters of a rule: what it reads of a material's file, so that only a change of that runs it again."""

    def of_wildcards(wildcards):
        material = MATERIALS[wildcards.material].model_dump(mode="json")
        return {section: material[section] for section in sections}

    return of_wildcards


def source_sets(wildcards):
    """The set of a structure, and of what it is a tile of, and so on. A loop is told by the rule that builds it."""
    sets, name = [], wildcards.id.rsplit("-", 1)[0]
    while name not in sets:
        sets.append(name)
        tile = MATERIALS[wildcards.material].structures[name].tile
        name = tile.of.rsplit("-", 1)[0] if tile else name
    return [(name, MATERIALS[wildcards.material].structures[name]) for name in sets]


def recipe(wildcards):
    """How a structure is made, without how many there are of its set and what they are for."""
    return {
        name: s.model_dump(mode="json", exclude={"count", "split"})
        for name, s in source_sets(wildcards)
    }


def source_file(wildcards):
    return [s.file.path for _, s in source_sets(wildcards) if s.file]


def output_folder(wildcards, output):
    return str(Path(output[0]).parent)


def input_folder(wildcards, input):
    return str(Path(input[0]).parent)


def model_settings(wildcards):
    return MODELS[wildcards.model].model_dump(mode="json")


def of_split(pattern, *splits):
    """Files of all structures of some splits of a material."""

    def of_wildcards(wildcards):
        ids = MATERIALS[wildcards.material].identifiers(*splits)
        return expand(pattern, id=ids, allow_missing=True)

    return of_wildcards


def batch_ids(wildcards):
    """Structures of a batch of CP2K runs."""
    ids = MATERIALS[wildcards.material].identifiers("train", "validation", "test")
    first = int(wildcards.batch) * CLUSTER.runs_per_job
    return ids[first : first + CLUSTER.runs_per_job]


def batch_of(wildcards):
    """The record of the batch a structure is in."""
    ids = MATERIALS[wildcards.material].identifiers("train", "validation", "test")
    batch = ids.index(wildcards.id) // CLUSTER.runs_per_job
    return f"results/{wildcards.material}/batches/{batch}.json"


def predictions(run):
    return expand(
        "results/{material}/predicted/{model}/{id}.h5",
        material=run.material,
        model=run.model,
        id=MATERIALS[run.material].identifiers("test", "predict"),
    )


def figures(run):
    return expand(
        "results/figures/{material}/{model}/{id}/{figure}.{suffix}",
        material=run.material,
        model=run.model,
        id=MATERIALS[run.material].identifiers("test"),
        figure=FIGURES,
        suffix=("pdf", "png"),
    )


def summaries(wildcards):
    return [
        f"results/{run.material}/analysis/{run.model}/{id}/summary.csv"
        for run in RUNS
        for id in MATERIALS[run.material].identifiers("test")
    ]


def views(wildcards):
    return [
        f"results/{run.material}/analysis/{run.model}/{id}/atoms.csv"
        for run in RUNS
        for id in MATERIALS[run.material].identifiers("test", "predict")
    ]


def figure_8_files(structures, *tables):
    """Tables of each of the structures that figure 8 shows."""
    of = CONFIG.figure_8
    return [
        f"results/{of.material}/analysis/{of.model}/{id}/{table}.csv"
        for id in structures.values()
        for table in tables
    ]
