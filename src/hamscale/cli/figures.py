"""Define the commands that draw: figures of structures, figures of the method and their tables, pages."""

from pathlib import Path

from .. import config
from ..files import facts, together, write_table, write_text
from .commands import OUT, argument, command


@command("quality", argument("structures", nargs="+", help="files of structures of one set"), OUT)
def measure_quality(structures: list[Path], out: Path) -> None:
    """Measure density, radial distribution and coordination numbers of disordered structures.

    Writes OUT/{distribution, coordination}.csv and OUT/quality.{pdf, png}.
    """
    from ..analysis.disorder import coordination, density_g_cm3, radial_distribution
    from ..figures.structure import draw_quality
    from ..structures import read_structure_file

    atoms = [read_structure_file(path) for path in structures]
    about: dict = {"structures": len(atoms), "density_g_cm3": [round(density_g_cm3(a), 3) for a in atoms]}
    distribution = radial_distribution(atoms)
    numbers = coordination(atoms, distribution)
    with together(out, last="distribution.csv") as folder:
        write_table(folder / "distribution.csv", distribution, **about)
        write_table(folder / "coordination.csv", numbers, **about)
        draw_quality(distribution, numbers, folder / "quality")


@command(
    "plot-structure",
    argument("analysis", help="folder that `analyse` wrote"),
    argument("train_csv", help="train.csv of the model"),
    OUT,
)
def plot_structure(analysis: Path, train_csv: Path, out: Path) -> None:
    """Draw every figure of a structure from its tables: OUT/*.pdf and *.png."""
    from ..figures import draw_all

    draw_all(analysis, train_csv, out)


@command(
    "plot-transmission",
    argument(
        "table", help="transmission.csv that `analyse` wrote, if the analysis of the material asks for T(E), or `transmission`"
    ),
    OUT,
)
def plot_transmission(table: Path, out: Path) -> None:
    """Draw T(E) of DFT, of the prediction and of the reference, or of one file: OUT/transmission.pdf and .png."""
    from ..figures import draw_transmission

    if not table.is_file():
        raise ValueError(
            f"{table}: no such table. Ask for it, `analysis: {{transmission: {{}}}}` of a material, and analyse again."
        )
    draw_transmission(table, out / "transmission")


@command(
    "paper-tables",
    argument("--label", type=str, nargs="+", required=True, help="of the structures, then of the one shown"),
    argument("--analysis", nargs="+", required=True, metavar="DIR", help="what `analyse` wrote of each"),
    argument("--view", required=True, metavar="DIR", help="what `view` wrote of the one shown"),
    OUT,
)
def write_paper_tables(label: list[str], analysis: list[Path], view: Path, out: Path) -> None:
    """Collect the tables of figure 8, OUT/fig8_*.csv, from those of `analyse` and `view`."""
    from ..paper import figure_8_tables

    if len(label) != len(analysis) + 1:
        raise ValueError(f"{len(label)} labels for {len(analysis)} structures and one view: expected one each.")
    about = facts(view / "atoms.csv") | {"label": label[-1]}
    about = {name: about[name] for name in ("label", "cell_angstrom", "orbitals", "model")}
    with together(out, last="fig8_summary.csv") as folder:
        for name, content in figure_8_tables(dict(zip(label, analysis)), view).items():
            write_table(folder / f"fig8_{name}.csv", content, **about)


@command(
    "plot-paper",
    argument("--figure", choices=list(config.PAPER_FIGURES), nargs="*", help="default: all"),
    argument("--raw", default=Path("resources/raw"), metavar="DIR", help="folder of tables; default resources/raw"),
    OUT,
)
def plot_paper(figure: list[str], raw: Path, out: Path) -> None:
    """Draw figures of the paper from raw tables: OUT/figN.pdf and .png."""
    from ..paper import PAPER, draw_paper

    for name in figure or PAPER:
        draw_paper(name, raw, out)


@command(
    "index",
    argument("--results", default=Path("results"), metavar="DIR", help="folder of results"),
    OUT,
)
def write_index(results: Path, out: Path) -> None:
    """Write one page of all materials: structures, partitions, H, errors, bands and densities of states.

    The page needs neither a server nor another file.
    """
    from ..page import index_page

    write_text(out, index_page(results))
