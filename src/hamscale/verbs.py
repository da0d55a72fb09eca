"""What each verb does: from the arguments of a command line to one or two calls and a file.

Modules are imported where a verb needs them: a command line answers at once, and only those that use it wait for torch.
"""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from . import config
from .config import load_config
from .files import facts, write_table, write_text

STOPPED = 85
EIGENVALUE_TOLERANCE_HARTREE = 5e-8  # of parsed H(k), S(k) against what CP2K printed; runs here give 1e-10 or less


def check(config: Path):
    """Validate a configuration with every material and model it names."""
    check_configuration(load_config(config))
    print(f"{config}: good")


def check_configuration(content: config.Config) -> config.Config:
    """The configuration, with every file it names validated. Raises one ValueError that lists every error of every file."""
    errors = []
    for run in content.runs:
        for load, file in (
            (config.load_material, f"config/materials/{run.material}.yaml"),
            (config.load_model, f"config/models/{run.model}.yaml"),
        ):
            try:
                load(file)
            except ValueError as error:
                errors += [line for line in str(error).splitlines() if line not in errors]
    if errors:
        raise ValueError("\n".join(errors))
    return content


def schema(kind: str):
    """Print the JSON schema of a configuration file, for editors."""
    print(json.dumps(getattr(config, kind.title()).model_json_schema(), indent=2))


def structure(material: Path, id: str, tile: Path | None, out: Path):
    """Build one structure of a material: extxyz."""
    from .structures import build_structure, read_structure_file, write_structure_file

    write_structure_file(out, build_structure(config.load_material(material), id, tile and read_structure_file(tile)))


def input(material: Path, structure: Path, out: Path):
    """Write the CP2K input of a structure."""
    from .basis import material_basis
    from .dft.inputs import cp2k_input
    from .structures import read_structure_file

    settings = config.load_material(material)
    try:
        write_text(out, cp2k_input(read_structure_file(structure), settings, material_basis(settings)))
    except ValueError as error:
        raise ValueError(f"{structure}: {error}") from None


def dft(input: Path, out: Path, command: str | None):
    """Run CP2K in a scratch folder; a run that is accepted is moved to OUT at once."""
    from .dft.run import run_cp2k

    run_cp2k(input, out, command)


def batch(inputs: list[Path], store: Path, at_once: int, command: str | None, out: Path):
    """Run CP2K on many inputs, in one job; OUT is a record of those refused, and why. Runs accepted before are not repeated."""
    from .dft.run import run_batch

    errors = run_batch(inputs, store, at_once, command, lambda message: print(message, flush=True))
    write_text(out, json.dumps({"runs": [path.stem for path in inputs], "errors": errors}, indent=2) + "\n")


def collect(input: Path, store: Path, record: Path, out: Path):
    """Take an accepted run of `hamscale batch` from its store."""
    from .dft.run import collect as run

    run(input, store, record, out)


def operators(material: Path, structure: Path, run: Path, out: Path):
    """Parse H and S of a CP2K run, and find the band edges on the k-grid of the analysis."""
    from .analysis.spectra import find_levels
    from .basis import material_basis
    from .dft.outputs import eigenvalue_check, read_run
    from .operators import write_operators
    from .structures import read_structure_file

    settings = config.load_material(material)
    result = read_run(
        run, read_structure_file(structure), material_basis(settings), {"config_sha256": config.sha256(settings.dft)}
    )
    deviation = eigenvalue_check(result)
    print(f"{run}: eigenvalues of H(k), S(k) against those CP2K printed: max {deviation:.1e} Ha")
    if deviation > EIGENVALUE_TOLERANCE_HARTREE:
        raise ValueError(
            f"{run}: eigenvalues of the parsed H, S differ from those CP2K printed by {deviation:.1e} Ha, expected at most "
            f"{EIGENVALUE_TOLERANCE_HARTREE:.0e}. Is the run of this structure, complete, and of a CP2K version that is known?"
        )
    result.attributes |= find_levels(result, settings.analysis).attributes()
    write_operators(out, result)


class _Stored:
    """Operators files, read one at a time each time they are iterated over."""

    def __init__(self, paths):
        self.paths = paths

    def __iter__(self):
        from .operators import read_operators

        return (read_operators(path) for path in self.paths)


def reference(material: Path, operators: list[Path], out: Path):
    """Fit energy gauge, reference and scales to training structures."""
    from ase.data import atomic_numbers

    from .graph.crystal_field import Ions
    from .graph.reference import fit_reference, write_reference

    settings = config.load_material(material)
    charges = {atomic_numbers[element]: charge for element, charge in settings.graph.charges.items()}
    ions = Ions(settings.graph.near_angstrom, charges, settings.graph.far)
    of = settings.graph
    result = fit_reference(
        _Stored(operators), of.cutoff_angstrom, of.auto_threshold_hartree, ions, of.crystal_field, of.two_centre
    )
    outside = result.outside_fraction
    print(
        f"cutoff {result.cutoff_angstrom:.2f} A; H reaches {result.reach_angstrom:.2f} A; beyond the cutoff: {outside:.2%} of sum |H|"
    )
    if outside > 0.01:
        warnings.warn(
            f"{outside:.1%} of sum |H| lies beyond the cutoff of {result.cutoff_angstrom} A, where the network does not reach. "
            "Raise graph.cutoff_angstrom.",
            stacklevel=2,
        )
    write_reference(out, result)


def graph(reference: Path, operators: Path, out: Path):
    """Build the graph of a structure with its targets."""
    from .graph.codec import BlockCodec
    from .graph.graph import write_graph
    from .graph.reference import read_reference
    from .operators import read_operators

    result = BlockCodec(read_reference(reference)).encode(read_operators(operators))
    print(
        f"{len(result.atoms)} atoms, {len(result.edges)} edges, {result.attributes['outside_fraction']:.2%} of sum |H| outside"
    )
    write_graph(out, result)


def partition(
    structure: Path,
    frame: int | None,
    cutoff: float | None,
    reference: Path | None,
    parts: int,
    method: str,
    ranks_per_node: int,
    out: Path,
):
    """Decide which rank owns which atom, and what they send one another. Prints the quality as JSON."""
    from .graph.neighbours import edges_within
    from .graph.reference import read_reference
    from .partition import partition as run
    from .partition.halo import write_partition
    from .structures import read_structure_file, wrap_as_cp2k

    if (cutoff is None) == (reference is None):
        raise ValueError("give either --cutoff or --reference.")
    if cutoff is None:
        cutoff = read_reference(reference).cutoff_angstrom
    atoms = wrap_as_cp2k(read_structure_file(structure, frame))
    edges = edges_within(atoms, cutoff)
    result = run(atoms, [(edges[:, 0], edges[:, 1])], cutoff, parts, method, ranks_per_node=ranks_per_node)
    write_partition(out, result, atoms)
    print(json.dumps({"method": method, "parts": parts} | result.quality() | {"seconds": result.attributes["seconds"]}))


def train(
    model: Path,
    reference: Path,
    train: list[Path],
    validation: list[Path],
    operators: list[Path],
    partitions: list[Path],
    ranks_per_structure: int | None,
    exchange: str,
    network: int,
    out: Path,
    checkpoint: Path,
):
    """Train a network of a model: OUT/{weights.safetensors, config.json, reference.h5, train.csv}. Resumes from CHECKPOINT.

    On many ranks: torchrun --nproc-per-node P -m hamscale train ..., or srun. SIGUSR1 or SIGTERM: checkpoint, exit code 85.
    """
    from .train.loop import Stopped, TrainingFiles
    from .train.loop import train as run

    if not train:
        raise ValueError("--train: no graph was given, expected at least one. Give the material a set with split: train.")
    settings = config.load_model(model)
    show = lambda message: print(message, flush=True)  # noqa: E731
    with ranks() as world:
        world.stop_on_signals()
        try:
            files = TrainingFiles(reference, train, validation, operators, partitions)
            run(settings, files, out, checkpoint, show, network, world, ranks_per_structure, exchange)
        except Stopped as stopped:
            if world.is_root:
                show(str(stopped))
            return STOPPED
    return 0


def join(networks: list[Path], out: Path):
    """Make one model of networks that differ in their seeds alone: its prediction is their mean."""
    from .inputs.model_folder import join as run

    run(networks, out)


def predict(
    model: Path, structure: Path, frame: int | None, material: Path | None, out: Path, reference_only: bool, exchange: str
):
    """Predict H, with exact S, of a structure. On many ranks each writes a shard, and OUT reads as all of them."""
    from .predict import K_GRID
    from .predict import predict as run
    from .structures import read_structure_file

    analysis = config.load_material(material).analysis if material else K_GRID
    with ranks() as world:
        prediction = run(model, read_structure_file(structure, frame), reference_only, world=world, exchange=exchange)
        prediction.write(out, world, analysis)


def export(operators: Path, to: str, out: Path, **options):
    """Write H and S for another code: quatrex, sisl, TBtrans, Siesta, DeepH, CP2K's own CSR, MatrixMarket (docs/files.md)."""
    from .export import export as run

    for line in run(operators, to, out, **{name: value for name, value in options.items() if value is not None}):
        print(f"{out}: {line}")


def import_(source: Path, out: Path):
    """Turn a DeepH data set into operators: one structure into the file OUT, a folder of many into OUT/NAME.h5."""
    from .export import import_deeph

    for path in import_deeph(source, out):
        print(path)


@contextmanager
def ranks():
    """The ranks of this run; where one is lost, what is known of it is the last line."""
    from .parallel.env import RankLost, world

    try:
        with world() as result:
            yield result
    except RankLost as error:
        raise OSError(str(error)) from None


def analyse(material: Path, dft: Path, predicted: Path, baseline: Path, out: Path):
    """Compare predicted with DFT operators: the tables OUT/*.csv of docs/files.md, and OUT/errors.html."""
    from .analysis.tables import analysis_tables
    from .operators import read_operators
    from .page import tables_page

    settings = config.load_material(material)
    files = [read_operators(path) for path in (dft, predicted, baseline)]
    name = {"material": material.stem, "model": predicted.parent.name, "structure": predicted.stem}
    tables = analysis_tables(*files, settings.analysis, name)
    for table_name, content in tables.items():
        write_text(out / f"{table_name}.csv", content.to_csv(index=False))
    shown = {
        "By pair of elements": tables["by_pair"],
        "By distance": tables["by_distance"],
        "Mean potential of slabs along the longest cell vector": tables["slabs"],
    }
    write_text(out / "errors.html", tables_page(f"Errors of {' / '.join(name.values())}", shown))


def view(predicted: Path, parts: int, out: Path):
    """Tables of a structure and its predicted H that need no DFT: OUT/{atoms, parts, image}.csv."""
    from .analysis.views import view_tables
    from .operators import read_operators

    operators = read_operators(predicted)
    facts = {
        "cell_angstrom": operators.atoms.cell.round(6).tolist(),
        "orbitals": operators.n_orbitals,
        "model": operators.attributes["model"],
    }
    for name, content in view_tables(operators, parts).items():
        write_table(out / f"{name}.csv", content, **facts)


def dos(operators: Path, clusters: int, radius: float, core: float, width: float, window: float, exact: bool, out: Path):
    """Density of states of a large structure from clusters cut out around some of its atoms: OUT, a csv with standard errors.

    The band edges it finds are stored in OPERATORS, a prediction, if there are none of a k-grid.
    """
    from .analysis.regions import dos_table
    from .operators import store_levels

    content, about, levels = dos_table(operators, clusters, radius, core, width, window, exact)
    write_table(out, content, **about)
    print(json.dumps(about | {"stored": store_levels(operators, levels.attributes())}))


def quality(structures: list[Path], out: Path):
    """Density, radial distribution and coordination of disordered structures: OUT/{distribution, coordination}.csv, OUT/quality.{pdf, png}."""
    from .analysis.disorder import coordination, density_g_cm3, radial_distribution
    from .figures.structure import draw_quality
    from .structures import read_structure_file

    atoms = [read_structure_file(path) for path in structures]
    about = {"structures": len(atoms), "density_g_cm3": [round(density_g_cm3(a), 3) for a in atoms]}
    distribution = radial_distribution(atoms)
    numbers = coordination(atoms, distribution)
    write_table(out / "distribution.csv", distribution, **about)
    write_table(out / "coordination.csv", numbers, **about)
    draw_quality(distribution, numbers, out / "quality")


def figure_8(label: list[str], analysis: list[Path], view: Path, out: Path):
    """The tables of figure 8, OUT/fig8_*.csv, from those of `analyse` and `view`."""
    from .analysis.views import figure_8_tables

    if len(label) != len(analysis) + 1:
        raise ValueError(f"{len(label)} labels for {len(analysis)} structures and one view: expected one each.")
    about = facts(view / "atoms.csv") | {"label": label[-1]}
    about = {name: about[name] for name in ("label", "cell_angstrom", "orbitals", "model")}
    for name, content in figure_8_tables(dict(zip(label, analysis)), view).items():
        write_table(out / f"fig8_{name}.csv", content, **about)


def draw(figure: list[str], raw: Path, out: Path):
    """Draw figures of the paper from raw tables: OUT/figN.pdf and .png."""
    from .figures import PAPER, draw_paper

    for name in figure or PAPER:
        draw_paper(name, raw, out)


def index(results: Path, out: Path):
    """One page of all materials, without a server or another file: structures, partitions, H, errors, bands, DOS."""
    from .page import index_page

    write_text(out, index_page(results))


def evaluate(model: Path, split: str, sets: list[str] | None, material: Path | None, out: Path | None):
    """Errors of a model on the structures of a split that have DFT: a JSON line per set, and one over all last.

    Before them a line per slab of each structure that is long enough for two: mean potentials of DFT and predicted. OUT is a row per
    structure, and OUT with _slabs before its suffix a row per slab.
    """
    from .evaluate import evaluate as run
    from .evaluate import summarise

    # results/MATERIAL/models/NAME, or resources/models/MATERIAL, whose DFT is under results
    shipped, folder = model.resolve().parent.parent.name == "resources", model.resolve().parents[2]
    material = material or Path("config/materials") / f"{model.name if shipped else model.resolve().parents[1].name}.yaml"
    settings = config.load_material(material)
    of_split = list(dict.fromkeys(i.rsplit("-", 1)[0] for i in settings.identifiers(split)))
    if unknown := set(sets or ()) - set(of_split):
        raise ValueError(
            f"--sets {' '.join(sorted(unknown))}: not of the split {split}. Its sets: {', '.join(of_split) or 'none'}."
        )
    results = (Path("results") if shipped else folder) / (settings.extends or material.stem) / "operators"
    ids = [i for i in settings.identifiers(split) if not sets or i.rsplit("-", 1)[0] in sets]
    if missing := [i for i in ids if not (results / f"{i}.h5").is_file()]:
        raise ValueError(
            f"{results}: no DFT of {', '.join(missing)}. Make it: snakemake {results.parent.name} ..., or give --sets."
        )
    if not ids:
        raise ValueError(f"{material}: no structure of the split {split}.")
    rows, slabs = run(model, settings, [results / f"{i}.h5" for i in ids])
    if out:
        write_table(out, rows, model=model.name, split=split)
        write_table(out.with_name(f"{out.stem}_slabs{out.suffix}"), slabs, model=model.name, split=split)
    for slab in slabs[slabs.groupby("structure")["slab"].transform("size") > 1].round(4).to_dict("records"):
        print(json.dumps(slab))
    for name, part in rows.groupby("set", sort=False):
        print(json.dumps({"set": name} | summarise(part)))
    print(json.dumps(summarise(rows)))


def figures(analysis: Path, train_csv: Path, out: Path):
    """Draw every figure of a structure from its tables: OUT/*.pdf and *.png."""
    from .figures import draw_all

    draw_all(analysis, train_csv, out)


def summary(summaries: list[Path], out: Path):
    """Join the summaries of structures into one table: OUT, and the same as .html."""
    from .page import tables_page

    content = pd.concat([pd.read_csv(path) for path in summaries])
    write_text(out, content.to_csv(index=False))
    shown = content.drop(columns=["elements", "rmse_mev", "max_abs_error_mev", "orbitals"], errors="ignore")
    write_text(
        out.with_suffix(".html"),
        tables_page("Held-out structures", {"Errors and gaps": shown.set_index("structure").T.reset_index()}),
    )


def table(summary: Path):
    """Print a summary as a table."""
    content = pd.read_csv(summary)
    columns = {
        "mae_mev": "MAE meV", "baseline_mae_mev": "reference", "mae_mev_onsite": "onsite", "mae_mev_offsite": "offsite",
        "eigenvalue_mae_mev_occupied": "occupied eig. meV", "gap_dft_ev": "gap DFT eV", "gap_predicted_ev": "predicted",
        "dft_seconds": "DFT s", "prediction_seconds": "prediction s",
    }  # fmt: skip
    for name in ("dft", "predicted"):
        gaps, metals = content[f"gap_{name}_ev"].map("{:.3f}".format), content[f"metal_{name}"].astype(bool)
        content[f"gap_{name}_ev"] = gaps.mask(metals, "metal")
    shown = content[["material", "model", "structure", *columns]].rename(columns=columns)
    print(shown.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
