"""Read the log of a CP2K run: its version, periodic images, k-points, orbital energies and structure."""

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

OUTPUT = "run.out"
# Runs of 2023.1, 2025.1, 2025.2 and 2026.2 were compared; according to CP2K's source, the versions between write alike.
OLDEST_VERSION, NEWEST_VERSION = (2023, 1), (2026, 2)
KNOWN_VERSIONS = "2023.1 to 2026.2"


@dataclass
class RunOutput:
    """Content of the log of a run. Energies are in Hartree, kpoints in fractions of the reciprocal lattice.

    periodicity: the directions in which the run is periodic, e.g. "XYZ", or "NONE".
    images (N, 3): cell R of CSR file number n = 1..N; None for a run without k-points, which writes one file.
    kpoints (K, 3): as the log prints them, to five decimals. scheme: "Monkhorst-Pack", "MacDonald", "General" or "Gamma".
    kpoint_grid: divisions of a grid, None for a list of k-points.
    cell (3, 3): rows are cell vectors in Angstrom, to the 3 decimals of the log.
    positions (A, 3): in Angstrom, to the 6 decimals of the log.
    mo_energies (K, n): energies of all orbitals at every k-point, as CP2K computed them.
    """

    version: str
    periodicity: str
    images: np.ndarray | None
    kpoints: np.ndarray
    scheme: str
    kpoint_grid: tuple[int, int, int] | None
    mo_energies: np.ndarray
    fermi_level: float
    total_energy: float
    scf_steps: int
    wall_seconds: float
    elements: list[str]
    positions: np.ndarray
    cell: np.ndarray
    basis_sets: dict[str, tuple[str, int]]


@lru_cache  # a process warns once
def check_version(version: str) -> None:
    """Raise ValueError if a version of CP2K is too old to be read, and warn if it is newer than those that are known.

    A newer version is read, because its matrices are compared with the eigenvalues that it prints (`outputs.eigenvalue_check`).
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else None
    if found and found < OLDEST_VERSION:
        raise ValueError(f"this is CP2K {version}, which is too old; {KNOWN_VERSIONS} are read. Install one of these.")
    if not found or found > NEWEST_VERSION:
        log.warning(
            f"this is CP2K {version}, which nobody has tried here; {KNOWN_VERSIONS} are known. It is taken if the eigenvalues "
            "that it prints are those of the matrices that it writes."
        )


def parse_output(path: str | Path) -> RunOutput:
    """Read the log run.out of a run.

    Raises ValueError, naming the file, if a part is missing, if the version of CP2K is too old, or if the matrices of a
    periodic structure were written with all images folded into one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected the log of a CP2K run.")
    text = path.read_text(errors="replace")

    def find(pattern: str, what: str) -> str:
        match = re.search(pattern, text, re.M)
        if not match:
            raise ValueError(f"{path}: {what} is missing. Expected the complete log of CP2K {KNOWN_VERSIONS}.")
        return match[1]

    version = find(r"CP2K version (\S+)", "CP2K's version").rstrip(".")
    try:
        check_version(version)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    periodicity = find(r"^ CELL\| Periodicity +(\S+)$", "the periodicity of the cell")
    images = _images(path, text, periodicity)
    kpoints = _kpoints(path, text, images is not None)
    scheme = re.search(r"BRILLOUIN\| K-point scheme +(\S+)$", text, re.M)
    grid = re.search(r"BRILLOUIN\| K-Point grid +(\d+) +(\d+) +(\d+)$", text, re.M)
    atoms = re.findall(r"^ +\d+ +\d+ ([A-Z][a-z]?) +\d+((?: +-?\d+\.\d+){3}) +-?\d+\.\d+ +\d+\.\d+$", text, re.M)
    kinds = re.findall(
        r"Atomic kind: (\S+) .*?Orbital Basis Set +(\S+).*?Number of spherical basis functions: +(\d+)", text, re.S
    )
    return RunOutput(
        version,
        periodicity,
        images,
        kpoints,
        scheme[1] if scheme else "Gamma",
        (int(grid[1]), int(grid[2]), int(grid[3])) if grid else None,
        _orbital_energies(path, text, len(kpoints)),
        float(find(r"E\(Fermi\): +(\S+) a\.u\.", "the Fermi level")),
        float(find(r"ENERGY\| Total FORCE_EVAL .*\]:? +(\S+)$", "the total energy")),
        int(find(r"SCF run converged in +(\d+) steps", "'SCF run converged'")),
        float(find(r"^ CP2K +1 .* (\S+)$", "CP2K's table of times")),
        [symbol for symbol, _ in atoms],
        np.array([[float(x) for x in xyz.split()] for _, xyz in atoms]),
        np.array([[float(x) for x in find(rf"^ CELL\| Vector {v} .*?:([^|]*)\|", f"cell vector {v}").split()] for v in "abc"]),
        {element: (name, int(n)) for element, name, n in kinds},
    )


def _images(path: Path, text: str, periodicity: str) -> np.ndarray | None:
    """Return the table of periodic images of H and S; None for a molecule. Raises ValueError as `parse_output` does."""
    of_h, of_s = (image_table(text, name) for name in ("KS", "S"))
    if (of_h is None) != (of_s is None) or (of_h is not None and of_s is not None and not np.array_equal(of_h, of_s)):
        raise ValueError(f"{path}: the image tables of H and S differ. They must belong to one run.")
    if of_h is None and periodicity != "NONE":
        raise ValueError(
            f"{path}: the run is periodic along {periodicity} and has no k-points, so CP2K folded the matrices of all periodic "
            "images into one, from which H(R) cannot be had back. Add &KPOINTS with SCHEME MONKHORST-PACK 1 1 1 (the Gamma "
            "point alone), and REAL_SPACE .TRUE. in &KS_CSR_WRITE and &S_CSR_WRITE, as `hamscale input` does; a molecule needs "
            "PERIODIC NONE in &CELL and &POISSON."
        )
    return of_h


def _kpoints(path: Path, text: str, has_images: bool) -> np.ndarray:
    """Return the k-points (K, 3) that the log lists, the Gamma point if it lists none.

    Raises ValueError as `parse_output` does.
    """
    kpoints = [
        [float(x) for x in line.split()[-3:]] for line in re.findall(r"BRILLOUIN\| +\d+((?: +-?\d\.\d+){4})$", text, re.M)
    ]
    if re.search(r"BRILLOUIN\| +Gamma-point calculation", text):
        kpoints = [[0.0, 0.0, 0.0]]
    if bool(kpoints) != has_images:
        raise ValueError(
            f"{path}: {len(kpoints)} k-points listed and {'an' if has_images else 'no'} image table, expected both "
            "or neither. Run it again with the input of `hamscale input`."
        )
    return np.array(kpoints) if kpoints else np.zeros((1, 3))


def _orbital_energies(path: Path, text: str, n_kpoints: int) -> np.ndarray:
    """Return the energies (K, n) of the orbitals at every k-point.

    Raises ValueError if the number of k-points is another one, or if an energy is not a number.
    """
    blocks = re.findall(r"MO\|  Index +Eigenvalue.*\n((?: MO\| +\d+ +\S+ +\S+ +\S+\n)+)", text)
    if len(blocks) != n_kpoints:
        raise ValueError(
            f"{path}: orbital energies at {len(blocks)} k-points, expected {n_kpoints}. They come from &PRINT &MO, and of "
            "several MPI ranks only with PARALLEL_GROUP_SIZE 0 in &KPOINTS: use `hamscale input`."
        )
    try:
        energies = np.array([[float(line.split()[2]) for line in block.splitlines()] for block in blocks])
    except ValueError:  # CP2K prints stars for a number too wide, or k-points have different numbers of orbitals
        energies = np.array(np.nan)
    if not np.isfinite(energies).all():
        raise ValueError(
            f"{path}: an orbital energy is not a number, or k-points have different numbers of them. Run CP2K again."
        )
    return energies


def image_table(text: str, name: str) -> np.ndarray | None:
    """Return the cells of the CSR files in the order of the table.

    The position in the table counts, because CP2K's own numbers turn to stars above 9999.
    """
    table = re.search(
        rf"^ *{name} CSR write\| *\S+ periodic images *\n *Number +X +Y +Z *\n((?: *\S+ +-?\d+ +-?\d+ +-?\d+ *\n)+)", text, re.M
    )
    return None if table is None else np.array([[int(x) for x in row.split()[-3:]] for row in table[1].splitlines()])
