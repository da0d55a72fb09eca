# Configuration, checked before the DAG is built, and the paths that follow from it.
import os
import sys
from functools import cache
from pathlib import Path

from hamscale.config import check_configuration
from hamscale.config import load_material, load_model, read_yaml, validate, Config
from hamscale.runs import first_file
from snakemake.exceptions import WorkflowError

try:
    # Snakemake has read these, but takes the last of two equal keys
    for file in workflow.configfiles:
        read_yaml(file)
    CONFIG = check_configuration(validate("config", config, Config))
    RUNS, CLUSTER = CONFIG.runs, CONFIG.cluster
    MATERIALS = {
        run.material: load_material(f"config/materials/{run.material}.yaml")
        for run in RUNS
    }
    for parent in [m.extends for m in MATERIALS.values() if m.extends]:
        MATERIALS.setdefault(parent, load_material(f"config/materials/{parent}.yaml"))
    MODELS = {run.model: load_model(f"config/models/{run.model}.yaml") for run in RUNS}
    # of tables that are measured anew (paper.smk)
    ABLATED = ["hfo2", "gst124"] if CONFIG.raw == "results/raw" else []
    for name in ABLATED:
        MATERIALS.setdefault(name, load_material(f"config/materials/{name}.yaml"))
except ValueError as error:
    raise WorkflowError(str(error)) from None

# from where Snakemake runs, so that a clone may be moved
WORKFLOW = os.path.relpath(Path(str(workflow.current_basedir)).parent)

# rules take the `hamscale` of the interpreter that runs Snakemake, unless an environment of theirs (conda, container) has one
shell.prefix(f'export PATH="$PATH:{Path(sys.executable).parent}"; ')

FIGURES = (
    "bands",
    "dos",
    "error_by_pair",
    "error_by_distance",
    "decay",
    "heatmap",
    "slabs",
    "training",
)

# sisl tells its formats by the suffix
SISL_FILES = {"tbtrans": "hamiltonian.nc", "tshs": "hamiltonian.TSHS"}
FIGURE_8_TABLES = ("summary", "decay", "blocks", "bands", "dos", "atoms", "image")


wildcard_constraints:
    material="[A-Za-z0-9_]+",
    model="[A-Za-z0-9_]+",
    id=r"[A-Za-z0-9_]+-\d\d\d+",
    batch=r"\d+",
    network=r"\d+",
    parts=r"\d+",
    set="[A-Za-z0-9_]+",


def settings(*sections):
    """Parameters of a rule: what it reads of a material's file, so that only a change of that runs it again."""

    def of_wildcards(wildcards):
        material = MATERIALS[wildcards.material].model_dump(mode="json")
        return {
            section: material[section] for section in sections if section in material
        }

    return of_wildcards


def owner(material):
    """The material whose structures and DFT these are: another one where it extends that."""
    return MATERIALS[material].extends or material


def of_owner(pattern):
    """A file of a structure that belongs to the material's owner."""
    return lambda w: pattern.format(material=owner(w.material), id=w.id)


def structure_set(wildcards):
    return MATERIALS[wildcards.material].structures[wildcards.id.rsplit("-", 1)[0]]


def recipe(wildcards):
    """How a structure is made, without how many there are of its set and what they are for.

    The atoms of leads stay where others are displaced or melted.
    """
    made = structure_set(wildcards)
    moved = made.rattle_angstrom or made.melt_quench
    unread = {"count", "split"} if moved else {"count", "split", "transport"}
    return made.model_dump(mode="json", exclude=unread)


def settings_of_levels(wildcards):
    """What band edges depend on, which a file of operators has; T(E) is no part of it."""
    found = settings("species", "analysis")(wildcards)
    found["analysis"].pop("transmission", None)
    return found


def settings_of_analysis(wildcards):
    """What the analysis reads of a material's file: with the leads of what is a device."""
    transport = MATERIALS[wildcards.material].transport(wildcards.id)
    found = settings("analysis")(wildcards)
    return found | ({"transport": transport.model_dump()} if transport else {})


@cache
def run_files(material, name):
    """The files of H that stand for the runs of a set whose DFT is there already."""
    return [str(first_file(run)) for run in MATERIALS[material].structures[name].runs()]


@cache
def imported_files(material, name):
    """The folders and files of other codes' H and S that a set is imported from."""
    return [str(path) for path in MATERIALS[material].structures[name].imported()]


def overlap_of(wildcards):
    """The file with S of an imported structure, whose basis gives none."""
    if not structure_set(wildcards).operators:
        return []
    return of_owner("results/{material}/operators/{id}.h5")(wildcards)


def overlap_option(wildcards, input):
    return f"--overlap {input.overlap}" if input.overlap else ""


def options_of_prediction(wildcards, input):
    """A device is predicted in one pass: its ends go on for ever, and not as in the periodic cell that has them."""
    one_pass = (
        "--one-pass" if MATERIALS[wildcards.material].transport(wildcards.id) else ""
    )
    return f"{overlap_option(wildcards, input)} {one_pass}".strip()


def run_of(wildcards):
    """The run of CP2K that has H and S of a structure: one of the workflow, or one that a user had."""
    name, number = wildcards.id.rsplit("-", 1)
    if structure_set(wildcards).operators:
        return imported_files(wildcards.material, name)[int(number)]
    if structure_set(wildcards).dft:
        return run_files(wildcards.material, name)[int(number)]
    return f"results/{wildcards.material}/dft/{wildcards.id}"


def source_file(wildcards):
    """What a structure is made from: a file, a run of CP2K, or the structure it is a tile of. A loop is told by Snakemake."""
    s = structure_set(wildcards)
    if not s.built:
        return run_of(wildcards)
    if s.tile:
        return f"results/{wildcards.material}/structures/{s.tile.of}.extxyz"
    return s.file.path if s.file else []


def prepared_or(command):
    """What makes a file of a structure: a command, or a copy of what one process makes of all structures, where that is quick."""

    def of_wildcards(wildcards, input):
        file = f"config/materials/{wildcards.material}.yaml"
        source = input[0] if input else ""
        set_name = wildcards.id.rsplit("-", 1)[0]
        if set_name in MATERIALS[wildcards.material].quick_sets():
            return f"{WORKFLOW}/prepared.sh {file} '{source_file(wildcards) or ''}'"
        tile = f"--tile {source}" if structure_set(wildcards).tile else ""
        return command.format(file=file, id=wildcards.id, tile=tile, structure=source)

    return of_wildcards


def submissions_again(n):
    """How often a job that failed is submitted again. Snakemake within the job repeats nothing, else a training that the walltime
    stopped would begin anew in what is left of it."""
    return n if workflow.is_main_process else 0


def output_folder(wildcards, output):
    return str(Path(output[0]).parent)


def input_folder(wildcards, input):
    return str(Path(input[0]).parent)


def model_settings(wildcards):
    """What a network's weights depend on."""
    return MODELS[wildcards.model].of_weights()


def first_weights(wildcards):
    """The weights that a training begins with, where it does not begin with random ones."""
    folder = MODELS[wildcards.model].training.start_from
    return [f"{folder}/weights.safetensors"] if folder else []


def networks_of_model(wildcards):
    return expand(
        "results/{material}/networks/{model}-{network}/weights.safetensors",
        network=range(MODELS[wildcards.model].training.networks),
        allow_missing=True,
    )


def threads_of_training(wildcards):
    """Two networks of one thread each are faster than one after the other of two; on a cluster each has a job of its own."""
    cores = workflow.resource_settings.cores if workflow.is_main_process else None
    if cores is None:
        return 8
    return max(1, min(8, cores // MODELS[wildcards.model].training.networks))


def of_split(pattern, *splits):
    """Files of all structures of some splits of a material; `{owner}` in the pattern is who has their DFT."""

    def of_wildcards(wildcards):
        ids = MATERIALS[wildcards.material].identifiers(*splits)
        return expand(
            pattern, id=ids, owner=owner(wildcards.material), allow_missing=True
        )

    return of_wildcards


def graphs_of(*splits):
    """Files of the graphs of some splits, which are made together, as one folder."""
    return lambda w, input: [
        f"{input.graphs}/{id}.h5" for id in MATERIALS[w.material].identifiers(*splits)
    ]


def taught(wildcards):
    """What a teacher predicts, to be learnt beside DFT."""
    return of_split("results/{material}/taught/{id}.h5", "teach")(wildcards)


def dft_ids(material):
    """Structures of a material whose DFT is to be run, in its own order."""
    users = {r.material for r in RUNS if owner(r.material) == material}
    users |= {material} & set(ABLATED)
    needed = {
        i
        for name in users
        for i in MATERIALS[name].identifiers("train", "validation", "test")
    }
    sets = MATERIALS[material].structures
    return [
        i
        for i in MATERIALS[material].identifiers()
        if i in needed and sets[i.rsplit("-", 1)[0]].built
    ]


def operators_of_training(wildcards):
    """DFT of the training structures, for models whose loss follows eigenvalues."""
    if MODELS[wildcards.model].training.eigenvalue_weight == 0:
        return []
    return of_split("results/{owner}/operators/{id}.h5", "train")(wildcards)


def batch_ids(wildcards):
    """Structures of a batch of CP2K runs."""
    first = int(wildcards.batch) * CLUSTER.runs_per_job
    return dft_ids(wildcards.material)[first : first + CLUSTER.runs_per_job]


def batch_of(wildcards):
    """The record of the batch a structure is in."""
    batch = dft_ids(wildcards.material).index(wildcards.id) // CLUSTER.runs_per_job
    return f"results/{wildcards.material}/batches/{batch}.json"


def predictions(run):
    return expand(
        "results/{material}/predicted/{model}/{id}.h5",
        material=run.material,
        model=run.model,
        id=MATERIALS[run.material].identifiers("test", "predict"),
    )


def exports(run):
    return expand(
        "results/{material}/export/{model}/{id}/{target}",
        material=run.material,
        model=run.model,
        id=MATERIALS[run.material].identifiers("test", "predict"),
        target=[SISL_FILES.get(target, target) for target in CONFIG.export],
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


def transmissions(run):
    """Of structures whose T(E) is analysed: all with DFT of a material that asks for it, and devices with DFT and without."""
    material = MATERIALS[run.material]
    return [
        f"results/figures/{run.material}/{run.model}/{id}/transmission.png"
        for id in material.identifiers("test", "predict")
        if material.transport(id)
        or (material.analysis.transmission and id in material.identifiers("test"))
    ]


def tables_with_transmission(wildcards):
    """The tables of an analysis, beside which T(E) is; of a structure without DFT T(E) itself."""
    if wildcards.id in MATERIALS[wildcards.material].identifiers("predict"):
        return ["results/{material}/analysis/{model}/{id}/transmission.csv"]
    return rules.analyse.output


def options_of_transmission(wildcards):
    material = MATERIALS[wildcards.material]
    transport, analysis = material.transport(wildcards.id), material.analysis
    options = (
        f"--axis {transport.axis} --leads {transport.leads[0]} {transport.leads[1]}"
    )
    options += f" --temperature {analysis.temperature_kelvin}"
    if of := analysis.transmission:
        options += f" --window {of.window_ev}"
        options += f" --points {of.points}" if of.points else ""
    if transport.kgrid:
        options += f" --kgrid {' '.join(map(str, transport.kgrid))}"
    return options


def qualities(run):
    """Of the sets of a run's material, or of the one it extends, that melt and quench made."""
    sets = MATERIALS[run.material].structures
    return [
        f"results/{owner(run.material)}/quality/{name}/quality.png"
        for name, s in sets.items()
        if s.melt_quench
    ]


def targets():
    """What is made of all runs of the configuration."""
    return ["results/summary.csv", "results/index.html"] + [
        target
        for run in RUNS
        for target in predictions(run)
        + figures(run)
        + transmissions(run)
        + exports(run)
        + qualities(run)
    ]


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
