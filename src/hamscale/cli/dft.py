"""Define the commands from a configuration to parsed operators: structures, inputs, runs of CP2K."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import config
from ..config import check_configuration, load_config
from ..files import write_text
from .commands import MATERIAL, OUT, STRUCTURE, argument, command

if TYPE_CHECKING:
    from ..basis import Basis

# largest difference of the eigenvalues of parsed H(k), S(k) from those CP2K printed; the project's runs give 1e-10 or less
EIGENVALUE_TOLERANCE_HARTREE = 5e-8
# largest difference of S from two-centre integrals of the basis; the project's runs give 1e-6 or less
OVERLAP_TOLERANCE = 1e-4


@command("check", argument("config", help="list of runs, e.g. config/config.yaml"))
def check_files(config: Path) -> None:
    """Validate a configuration with every material and model that it names."""
    check_configuration(load_config(config))
    print(f"{config}: good")


@command(
    "schema",
    argument("--kind", choices=["material", "model", "config"], default="material", help="which file; default material"),
)
def print_schema(kind: str) -> None:
    """Print the JSON schema of a configuration file, for editors."""
    print(json.dumps(getattr(config, kind.title()).model_json_schema(), indent=2))


@command(
    "structure",
    MATERIAL,
    argument("--id", type=str, required=True, metavar="SET-NNN", help="which structure"),
    argument("--tile", help="file of the structure it is a tile of; default: built again"),
    OUT,
)
def write_structure(material: Path, id: str, tile: Path | None, out: Path) -> None:
    """Build one structure of a material, or take it from a run of CP2K or data of another code, and write it as extxyz."""
    from ..structures import read_structure_file, write_structure_file

    settings = config.load_material(material)
    if run := settings.run(id):
        from ..export import cp2k_runs
        from ..runs import first_file

        write_structure_file(out, cp2k_runs.read_structure(first_file(run)))
    elif source := settings.imported(id):
        from ..export import read_data

        write_structure_file(out, read_data(source, overlap_alone=True).atoms)
    else:
        from ..building import build_structure

        write_structure_file(out, build_structure(settings, id, read_structure_file(tile) if tile else None))


@command(
    "input",
    MATERIAL,
    STRUCTURE,
    argument("--restart", help="begin the run from this file of `export --to cp2k-restart`"),
    OUT,
)
def write_input(material: Path, structure: Path, restart: Path | None, out: Path) -> None:
    """Write the CP2K input of a structure."""
    from ..basis import material_basis

    settings = config.load_material(material)
    _write_input(structure, settings, material_basis(settings), out, restart)


def _write_input(structure: Path, settings: config.Material, basis: "Basis", out: Path, restart: Path | None = None) -> None:
    """Write the CP2K input of a structure file. Raises ValueError, naming the file, as `dft.inputs.cp2k_input` does."""
    from ..dft.inputs import cp2k_input
    from ..structures import read_structure_file

    try:
        write_text(out, cp2k_input(read_structure_file(structure), settings, basis, restart))
    except ValueError as error:
        raise ValueError(f"{structure}: {error}") from None


@command(
    "prepare",
    MATERIAL,
    argument("--out", required=True, metavar="DIR", help="folder of the structures and inputs"),
)
def prepare(material: Path, out: Path) -> None:
    """Write what `structure` and `input` write of every structure of a material, in one process: OUT/ID.extxyz and OUT/ID.inp.

    Structures that take long, of melt and quench, and tiles of others are left to these two; those that no DFT is of, split
    predict, get no input. CP2K's grammar, which takes seconds to read, is read once.
    """
    from ..basis import material_basis
    from ..building import build_structure
    from ..structures import write_structure_file

    settings = config.load_material(material)
    basis = material_basis(settings)
    quick, with_dft = set(settings.quick_sets()), settings.identifiers("train", "validation", "test")
    for identifier in settings.identifiers():
        if identifier.rsplit("-", 1)[0] in quick:
            structure = out / f"{identifier}.extxyz"
            write_structure_file(structure, build_structure(settings, identifier))
            if identifier in with_dft:
                _write_input(structure, settings, basis, structure.with_suffix(".inp"))


COMMAND = argument("--command", type=str, help="CP2K, e.g. 'mpirun -n 4 cp2k.psmp'; default: $HAMSCALE_CP2K, else PATH")


@command("dft", argument("input", help="CP2K input, as `input` writes it"), OUT, COMMAND)
def run_dft(input: Path, out: Path, command: str | None) -> None:
    """Run CP2K in a scratch folder; a run that is accepted is moved to OUT at once."""
    from ..dft.run import run_cp2k

    run_cp2k(input, out, command)


@command(
    "batch",
    argument("inputs", nargs="+", help="CP2K inputs, as `input` writes them"),
    argument("--store", required=True, metavar="DIR", help="folder of accepted runs"),
    argument("--at-once", type=int, default=1, help="runs side by side"),
    argument(
        "--command",
        type=str,
        help="CP2K, as of `dft`; e.g. 'srun --exact --ntasks=8 cp2k.psmp' for steps of a Slurm job",
    ),
    OUT,
)
def run_many(inputs: list[Path], store: Path, at_once: int, command: str | None, out: Path) -> None:
    """Run CP2K on many inputs in one job; OUT records the refused runs and why they were refused.

    Runs that were accepted before are not repeated.
    """
    from ..dft.run import run_batch

    errors = run_batch(inputs, store, at_once, command)
    write_text(out, json.dumps({"runs": [path.stem for path in inputs], "errors": errors}, indent=2) + "\n")


@command(
    "collect",
    argument("input", help="CP2K input of the run"),
    argument("--store", required=True, metavar="DIR", help="folder of accepted runs, that of `batch`"),
    argument("--record", required=True, help="OUT of the `batch` that the run is of"),
    OUT,
)
def collect_run(input: Path, store: Path, record: Path, out: Path) -> None:
    """Take an accepted run of `hamscale batch` from its store."""
    from ..dft.run import collect

    collect(input, store, record, out)


@command(
    "operators",
    MATERIAL,
    argument("structure", help="file of the structure that the run is of"),
    argument("run", help="folder of a run, a file of H of a run that was not made here, or data of another code"),
    OUT,
)
def parse_operators(material: Path, structure: Path, run: Path, out: Path) -> None:
    """Parse H and S of a CP2K run, or import those of another code; find band edges and charges of atoms.

    Band edges are those on the k-grid of the analysis, charges those on the grid round(20 A / |a|).
    """
    from ..analysis.density import with_charges
    from ..analysis.spectra import find_levels
    from ..basis import material_basis
    from ..container import MADE_OF, identity
    from ..dft.outputs import check_eigenvalues, read_run
    from ..export import cp2k_runs, read_data
    from ..operators import write_operators
    from ..structures import read_structure_file

    settings = config.load_material(material)
    atoms, basis = read_structure_file(structure), material_basis(settings)
    if settings.imported(structure.stem):
        result = read_data(run)
    elif run.is_file():
        result = cp2k_runs.read(run, basis, atoms)
    else:
        result = read_run(run, atoms, basis, {"config_sha256": config.sha256(settings.dft)})
        cp2k_runs.check_images(str(run), result, OVERLAP_TOLERANCE)
        check_eigenvalues(str(run), result, EIGENVALUE_TOLERANCE_HARTREE)
    if result.counts_electrons:
        result.attributes |= find_levels(result, settings.analysis).attributes()
    result.attributes[MADE_OF] = json.dumps({"structure": [identity(structure)]})
    write_operators(out, with_charges(result))
