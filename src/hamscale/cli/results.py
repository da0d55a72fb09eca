"""Define the commands that compare predictions with DFT, and collect the results."""

import json
import logging
import warnings
from pathlib import Path

from .. import config
from ..config import Analysis, Material, Split
from ..files import read_table, together, write_table
from .commands import MATERIAL, ONE_PASS, OUT, THRESHOLD, argument, command

log = logging.getLogger(__name__)


@command(
    "analyse",
    MATERIAL,
    argument("--dft", required=True, help="file of H and S of DFT"),
    argument("--predicted", required=True, help="file of the prediction of the same structure"),
    argument("--baseline", required=True, help="its prediction with `predict --reference-only`"),
    THRESHOLD,
    OUT,
)
def analyse(material: Path, dft: Path, predicted: Path, baseline: Path, overlap_threshold: float | None, out: Path) -> None:
    """Compare predicted with DFT operators, and write the tables OUT/*.csv of docs/files.md and OUT/errors.html."""
    from ..analysis.tables import analysis_tables
    from ..operators import read_operators
    from ..page import tables_page

    settings = config.load_material(material)
    analysis, transport = _analysis(settings, overlap_threshold), settings.transport(predicted.stem)
    of_dft, of_predicted, of_baseline = (read_operators(path) for path in (dft, predicted, baseline))
    name = {"material": material.stem, "model": predicted.parent.name, "structure": predicted.stem}
    tables = analysis_tables(of_dft, of_predicted, of_baseline, analysis, name, transport)
    row = tables["summary"].iloc[0]
    if row["false_states"] or row["suspect_states"]:
        warnings.warn(
            f"{predicted}: false states at {row['false_states']} of {row['random_kpoints']} random k-points, and states that "
            f"look false without DFT at {row['suspect_states']} (docs/howto/choosing.md, a basis that is nearly singular).",
            stacklevel=2,
        )
    shown = {
        "By pair of elements": tables["by_pair"],
        "By distance": tables["by_distance"],
        "Mean potential of slabs along the longest periodic cell vector": tables["slabs"],
    }
    with together(out, last="summary.csv") as folder:
        for table_name, content in tables.items():
            (folder / f"{table_name}.csv").write_text(content.to_csv(index=False))
        (folder / "errors.html").write_text(tables_page(f"Errors of {' / '.join(name.values())}", shown))
    if "transmission" not in tables:  # one of other settings
        (out / "transmission.csv").unlink(missing_ok=True)


@command(
    "evaluate",
    argument("model", help="folder of the model, results/MATERIAL/models/NAME or one of resources/models"),
    argument("--split", choices=["train", "validation", "test"], default="test", help="default: test"),
    argument("--sets", type=str, nargs="*", metavar="SET", help="some sets of the split; default: all"),
    argument("--material", help="default: config/materials/M.yaml of results/M/models/NAME"),
    ONE_PASS,
    THRESHOLD,
    argument("--out", metavar="PATH", help="also write a row per structure: csv"),
)
def evaluate_model(
    model: Path,
    split: Split,
    sets: list[str] | None,
    material: Path | None,
    one_pass: bool,
    overlap_threshold: float | None,
    out: Path | None,
) -> None:
    """Measure the errors of a model on the structures of a split that have DFT: a JSON line per set, and one over all last.

    Before them it prints a line per slab of each structure that is long enough for two slabs, with the mean potentials of DFT
    and of the prediction. OUT has a row per structure, and OUT with _slabs before its suffix a row per slab.
    """
    from ..evaluate import evaluate, summarise

    # a model is results/MATERIAL/models/NAME, or a shipped one, resources/models/MATERIAL, whose DFT is under results
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
    settings = settings.model_copy(update={"analysis": _analysis(settings, overlap_threshold)})
    rows, slabs = evaluate(model, settings, [results / f"{i}.h5" for i in ids], one_pass)
    if out:
        with together(out.parent, last=out.name) as temporary:
            write_table(temporary / out.name, rows, model=model.name, split=split)
            write_table(temporary / f"{out.stem}_slabs{out.suffix}", slabs, model=model.name, split=split)
    for slab in slabs[slabs.groupby("structure")["slab"].transform("size") > 1].round(4).to_dict("records"):
        print(json.dumps(slab))
    for name, part in rows.groupby("set", sort=False):
        print(json.dumps({"set": name} | summarise(part)))
    print(json.dumps(summarise(rows)))


def _analysis(settings: Material, overlap_threshold: float | None) -> Analysis:
    """Return the analysis of a material, with the overlap threshold of the command line if there is one."""
    if overlap_threshold is None:
        return settings.analysis
    return Analysis.model_validate(settings.analysis.model_dump() | {"overlap_threshold": overlap_threshold})


@command(
    "view",
    argument("predicted", help="file of the prediction"),
    argument("--parts", type=int, default=8, help="ranks its atoms are shared by"),
    OUT,
)
def write_view(predicted: Path, parts: int, out: Path) -> None:
    """Write tables of a structure and its predicted H that need no DFT: OUT/{atoms, parts, image}.csv."""
    from ..analysis.views import view_tables
    from ..operators import read_operators

    operators = read_operators(predicted)
    facts = {
        "cell_angstrom": operators.atoms.cell.round(6).tolist(),
        "periodic": operators.atoms.pbc.tolist(),
        "orbitals": operators.n_orbitals,
        "model": operators.attributes["model"],
    }
    with together(out, last="atoms.csv") as folder:
        for name, content in view_tables(operators, parts).items():
            write_table(folder / f"{name}.csv", content, **facts)


@command("summary", argument("summaries", nargs="+", help="files summary.csv that `analyse` wrote"), OUT)
def join_summaries(summaries: list[Path], out: Path) -> None:
    """Join the summaries of structures into one table: OUT, and the same as .html."""
    import pandas as pd

    from ..page import tables_page

    content = pd.concat([pd.read_csv(path) for path in summaries])
    shown = content.drop(columns=["elements", "rmse_mev", "max_abs_error_mev", "orbitals"], errors="ignore")
    page = tables_page("Held-out structures", {"Errors and gaps": shown.set_index("structure").T.reset_index()})
    with together(out.parent, last=out.name) as folder:
        (folder / out.name).write_text(content.to_csv(index=False))
        (folder / out.with_suffix(".html").name).write_text(page)


@command("table", argument("summary", help="file that `summary` wrote, results/summary.csv"))
def print_table(summary: Path) -> None:
    """Print a summary as a table."""
    content = read_table(summary)
    columns = {
        "mae_mev": "MAE meV", "baseline_mae_mev": "reference", "mae_mev_onsite": "onsite", "mae_mev_offsite": "offsite",
        "eigenvalue_mae_mev_occupied": "occupied eig. meV", "gap_dft_ev": "gap DFT eV", "gap_predicted_ev": "predicted",
        "false_states": "false", "random_kpoints": "of k", "dft_seconds": "DFT s", "prediction_seconds": "prediction s",
    }  # fmt: skip
    for name in ("dft", "predicted"):
        gaps, metals = content[f"gap_{name}_ev"].map("{:.3f}".format), content[f"metal_{name}"].astype(bool)
        content[f"gap_{name}_ev"] = gaps.mask(metals, "metal")
    shown = content[["material", "model", "structure", *columns]].rename(columns=columns)
    print(shown.to_string(index=False, float_format=lambda x: f"{x:.3f}"))


@command(
    "verify",
    argument("paths", nargs="+", metavar="FILE_OR_FOLDER", help="files, model folders, or folders that hold such"),
    argument(
        "--sandbox",
        action="store_true",
        help="read in a process with limits of memory and time: for files of strangers, which may crash a library",
    ),
)
def verify_files(paths: list[Path], sandbox: bool) -> int:
    """Verify files, model folders, or all of them in a folder: that they are whole, mean something, and belong together.

    Prints a line for each that is, and one on standard error for each that is not; the exit code is then 1.
    """
    from ..verify import artefacts, mixed, verify, verify_in_sandbox

    wrong, found = [], []
    for path in paths:
        try:
            if sandbox:
                print(verify_in_sandbox(path), end="")
                continue
            inner = list(artefacts(path))
        except ValueError as error:
            wrong.append(str(error))
            continue
        if not inner:
            wrong.append(f"{path}: holds no file of hamscale.")
        for one in inner:
            try:
                found.append(verify(one))
                print(f"{one}: {found[-1].kind}, whole, {found[-1].identity}")
            except (ValueError, OSError) as error:
                wrong.append(" ".join(str(error).split()))
    wrong += mixed(found)
    for line in wrong:
        log.error(line)
    return 1 if wrong else 0


@command("init", argument("folder", help="what to make; new, or empty"))
def begin(folder: Path) -> None:
    """Begin a project in a new folder: configuration, an example, profiles of clusters, and a Snakefile."""
    from ..project import create_project

    create_project(folder)
    print(f"{folder}: cd {folder}; snakemake --cores 2 makes the example, config/materials/silicon.yaml, in some minutes")
