"""Define the commands that predict H and S, and convert them to and from the formats of other codes."""

import json
import warnings
from pathlib import Path

from .. import config
from ..files import write_table
from .commands import ONE_PASS, OUT, STRUCTURE, THRESHOLD, argument, command, ranks
from .training import EXCHANGE, FRAME


@command(
    "predict",
    argument("model", help="folder of the model, results/MATERIAL/models/NAME or one of resources/models"),
    STRUCTURE,
    FRAME,
    argument("--material", help="whose k-grid states are computed on; default: 20 A over |a|"),
    OUT,
    argument(
        "--overlap",
        metavar="FILE",
        help="S of the structure, where the basis of imported data gives none: a file of H and S, or a folder of a DeepH data "
        "set, with or without H",
    ),
    argument("--reference-only", action="store_true", help="the reference without the network: the baseline"),
    argument(
        "--self-consistent",
        action="store_true",
        help="charges of the atoms must follow from the predicted states; default: if the model was trained for it "
        "(docs/howto/charges.md)",
    ),
    ONE_PASS,
    argument("--not-lifted", action="store_true", help="leave states along directions that S nearly misses where they are"),
    argument("--sandbox", action="store_true", help="first verify the model as `hamscale verify --sandbox` does"),
    EXCHANGE,
)
def write_prediction(
    model: Path,
    structure: Path,
    frame: int | None,
    material: Path | None,
    out: Path,
    overlap: Path | None,
    reference_only: bool,
    self_consistent: bool,
    one_pass: bool,
    not_lifted: bool,
    sandbox: bool,
    exchange: str,
) -> None:
    """Predict H, with exact S, of a structure. On many ranks each rank writes a shard, and OUT reads as all of them."""
    from ..export import read_data
    from ..predict import K_GRID, predict
    from ..structures import read_structure_file

    if self_consistent and one_pass:
        raise ValueError("--self-consistent and --one-pass exclude each other. Give one of them.")
    analysis = config.load_material(material).analysis if material else K_GRID
    if sandbox:
        from ..verify import verify_in_sandbox

        verify_in_sandbox(model)
    with ranks() as world:
        atoms = read_structure_file(structure, frame)
        prediction = predict(
            model,
            atoms,
            reference_only,
            world=world,
            exchange=exchange,
            lifted=not not_lifted,
            overlap=read_data(overlap, overlap_alone=True) if overlap else None,
            self_consistent=self_consistent if self_consistent or one_pass else None,
            analysis=analysis,
        )
        prediction.write(out, world, analysis)


@command(
    "export",
    argument("operators", help="file of H and S, of DFT or predicted"),
    argument("--to", type=str, required=True, metavar="FORMAT", help=", ".join(config.EXPORTS)),
    OUT,
    argument(
        "--transport",
        type=str,
        metavar="AXIS",
        help="quatrex, tbtrans: an open device along a, b or c, in blocks; default: the cell as it is",
    ),
    argument("--repeat", type=int, metavar="N", help="copies of the structure along the axis; default 1"),
    argument(
        "--origin",
        type=float,
        metavar="FRACTION",
        help="where the device begins along the axis, in fractions of the cell; default 0, the corner of the user's cell",
    ),
    argument("--allow-mismatch", action="store_true", default=None, help="also a device whose ends do not repeat"),
    argument("--blocks", type=int, metavar="N", help="blocks along the axis; default: the most without a loss"),
    argument("--kgrid", type=int, nargs=3, metavar="N", help="cp2k-restart: Monkhorst-Pack grid of the run"),
)
def export_operators(operators: Path, to: str, out: Path, **options: object) -> None:
    """Write H and S for another code: quatrex, sisl, TBtrans, Siesta, DeepH, DeePTB, CP2K CSR, MatrixMarket (docs/files.md)."""
    from ..export import export

    for line in export(operators, to, out, **{name: value for name, value in options.items() if value is not None}):
        print(f"{out}: {line}")


@command(
    "import",
    argument("source", type=str, help="folder of a DeepH data set or of runs of CP2K, or a pattern of folders of runs"),
    argument("--material", help="of runs of CP2K: its species name the basis sets of the runs"),
    OUT,
)
def import_operators(source: str, material: Path | None, out: Path) -> None:
    """Turn a DeepH data set, or runs of CP2K, into operators: one structure into the file OUT, many into OUT/NAME.h5."""
    from ..basis import material_basis
    from ..export import import_data

    for path in import_data(source, out, material_basis(config.load_material(material)) if material else None):
        print(path)


@command(
    "dos",
    argument("operators", help="file of H and S, of DFT or predicted"),
    argument("--clusters", type=int, default=40, help="default 40; the error falls as the root of their number"),
    argument("--radius", type=float, default=10.0, help="Angstrom, of a cluster; default 10; more is slower and cuts less"),
    argument("--core", type=float, default=4.0, help="Angstrom; atoms so near the centre count; default 4"),
    argument("--width", type=float, default=0.2, help="eV, standard deviation of a level; default 0.2"),
    argument("--window", type=float, default=10.0, help="eV, either side of the Fermi level; default 10"),
    THRESHOLD,
    argument(
        "--exact",
        action="store_true",
        help="small systems: also from all eigenvalues at the Gamma point, to see how far the clusters are from it",
    ),
    OUT,
)
def write_dos(
    operators: Path,
    clusters: int,
    radius: float,
    core: float,
    width: float,
    window: float,
    overlap_threshold: float | None,
    exact: bool,
    out: Path,
) -> None:
    """Compute the density of states of a large structure from clusters cut out around some of its atoms.

    OUT is a csv with standard errors. The band edges are stored in OPERATORS, a prediction, if it has none from a k-grid.
    """
    from ..analysis.regions import dos_table
    from ..operators import store_levels

    content, about, levels, suspects = dos_table(
        operators, clusters, radius, core, width, window, exact, overlap_threshold or 0.0
    )
    write_table(out, content, **about)
    if sentence := suspects.sentence("clusters"):
        warnings.warn(f"{operators}: {sentence}", stacklevel=2)
    stored = store_levels(operators, levels.attributes() | suspects.attributes())
    print(json.dumps(about | {"stored": stored}))


@command(
    "transmission",
    argument("operators", help="file of H and S, of DFT or predicted"),
    argument("--axis", choices=["a", "b", "c"], default="c", help="cell vector along which the current flows; default c"),
    argument(
        "--leads",
        type=int,
        nargs=2,
        metavar="N",
        help="an open device: atoms of the block at its left and at its right end that its leads repeat; default: the cell "
        "itself repeats for ever",
    ),
    argument(
        "--kgrid",
        type=int,
        nargs=3,
        metavar="N",
        help="divisions of the grid of k along a, b and c; default: 40 A over |a| across the axis, 640 A along it",
    ),
    argument("--window", type=float, default=2.0, help="eV, beyond the band edges, or either side of a Fermi level; default 2"),
    argument("--points", type=int, help="number of energies; default 1000, of a device 200"),
    argument("--temperature", type=float, default=300.0, help="K, at which T(E) is smeared; default 300"),
    OUT,
)
def write_transmission(
    operators: Path,
    axis: str,
    leads: list[int] | None,
    kgrid: list[int] | None,
    window: float,
    points: int | None,
    temperature: float,
    out: Path,
) -> None:
    """Compute the transmission T(E) of a periodic structure, from its bands, or of a device between two leads.

    OUT is a csv. Prints a line with the gap, the smeared T (the conductance in 2 e^2/h) at the band edges and between them, and
    what was looked at before.
    """
    from ..analysis import greens, transmission
    from ..operators import open_operators, read_operators
    from ..units import hartree_to_ev

    for name, value in (
        ("window", window),
        ("points", points or 2),
        ("temperature", temperature),
        ("kgrid", min(kgrid or [1])),
    ):
        if not value > 0:
            raise ValueError(f"--{name} is {value}, expected more than zero.")
    grid = (kgrid[0], kgrid[1], kgrid[2]) if kgrid else None
    if leads:
        with open_operators(operators) as file:
            found = greens.of_device(file, axis, (leads[0], leads[1]), grid, window, points, temperature)
            small = file.basis.n_orbitals(file.atoms.numbers).sum() <= transmission.LARGEST_DENSE
        looked_at = transmission.checks(read_operators(operators), found.levels) if small else {}
    else:
        whole = read_operators(operators)
        found = transmission.of_bands(whole, axis, grid, window, points, temperature)
        looked_at = transmission.checks(whole, found.levels)
    about = {"gap_ev": hartree_to_ev(found.levels.gap), "zero_ev": hartree_to_ev(found.levels.fermi_level)} | looked_at
    write_table(out, found.table(), **found.about, **about, file=operators.name)
    print(json.dumps(found.conductances() | about | found.about))
