"""Read the log of a CP2K run: its version, periodic images, k-points, orbital energies and structure."""

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from ase.cell import Cell

log = logging.getLogger(__name__)

OUTPUT = "run.out"
# Runs of 2023.1, 2025.1, 2025.2 and 2026.2 were compared; according to CP2K's source, the versions between write alike.
OLDEST_VERSION, NEWEST_VERSION = (2023, 1), (2026, 2)
KNOWN_VERSIONS = "2023.1 to 2026.2"
# title and rows of a table of orbitals; OT calls them energies before the last step
ORBITALS = r"MO\|(.*)\n MO\|.*\n MO\|  Index +(?:Eigenvalue|Energy).*\n((?: MO\| +\d+ +\S+ +\S+ +\S+\n)+)"
ANGLES = ("alpha", "beta ", "gamma")
CELL_ROUNDING_ANGSTROM = 6e-4  # of the 3 decimals of the log


@dataclass
class Kind:
    """An atomic kind of a run: its element, basis set and pseudopotential.

    shells: (exponents, coefficients) of the function x^l of every shell, normalised, to 6 decimals; empty if not printed.
    """

    element: str
    basis: str
    n_orbitals: int
    potential: str
    shells: list[tuple[np.ndarray, np.ndarray]]


@dataclass
class RunOutput:
    """Content of the log of a run at one of its steps. Energies are in Hartree, kpoints in fractions of the reciprocal lattice.

    input_name: the input file as the log names it.
    periodicity: the directions in which the run is periodic, e.g. "XYZ", or "NONE".
    images (N, 3): cell R of CSR file number n = 1..N; None for a run without k-points, which writes one file.
    kpoints (K, 3): as the log prints them, to five decimals. scheme: "Monkhorst-Pack", "MacDonald", "General" or "Gamma".
    kpoint_grid: divisions of a grid, None for a list of k-points.
    mo_energies (K, n): energies of the n lowest orbitals at every k-point, as CP2K computed them, (2, K, n) of two spins; None
    if it printed none.
    mo_decimals: number of decimals of these energies. fermi_level: None if it was not printed; the higher one if the spins have
    a Fermi level each, as in a run without smearing.
    wall_seconds: of the whole run; zero if the log was cut before CP2K's table of times.
    elements (A), positions (A, 3): as the log lists them before the first step, in Angstrom, to 6 decimals.
    is_first: whether these are the positions of this step.
    first_cell, cell (3, 3): rows are cell vectors in Angstrom, before the first step and at this one. The log prints 3
    decimals; where its lengths and angles, of 6 decimals, belong to a cell in standard orientation, that cell is taken.
    kinds: by their names. n_electrons: electrons beside the cores. charge: of the structure.
    spins: 1, or 2 of a spin-polarised run.
    eps_orbitals: EPS_PGF_ORB, at which CP2K cuts orbitals off; None if it was not printed.
    """

    version: str
    input_name: str
    periodicity: str
    images: np.ndarray | None
    kpoints: np.ndarray
    scheme: str
    kpoint_grid: tuple[int, int, int] | None
    mo_energies: np.ndarray | None
    mo_decimals: int
    fermi_level: float | None
    total_energy: float
    scf_steps: int
    wall_seconds: float
    elements: list[str]
    positions: np.ndarray
    is_first: bool
    first_cell: np.ndarray
    cell: np.ndarray
    kinds: dict[str, Kind]
    n_electrons: int
    charge: int
    spins: int
    eps_orbitals: float | None


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


def parse_output(path: str | Path, step: int = 0) -> RunOutput:
    """Read the log of a run at one of its steps.

    Of several runs that went to one log the last one that has the step counts, and of several evaluations of the energy at a
    step, as a line search makes them, the last one: CP2K overwrites its files likewise.

    Raises ValueError, naming the file, if a part is missing, if the SCF did not converge, if the version of CP2K is too old, or
    if the matrices belong to k-points and not to periodic images.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected the log of a CP2K run.")
    before, text = _at_step(path, path.read_text(errors="replace"), step)
    whole = before + text

    def find_all(pattern: str, what: str, within: str) -> list[str]:
        if found := re.findall(pattern, within, re.M):
            return found
        raise ValueError(f"{path}: {what} is missing. Expected the complete log of CP2K {KNOWN_VERSIONS}.")

    def find(pattern: str, what: str, within: str = text) -> str:
        return find_all(pattern, what, within)[-1]

    def number(pattern: str) -> float | None:
        found = re.findall(pattern, whole, re.M)
        return float(found[-1]) if found else None

    try:
        check_version(version := find(r"CP2K\| version string: +CP2K version (\S+)", "CP2K's version", whole).rstrip("."))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if "SCF run NOT converged" in text:
        raise ValueError(f"{path}: the SCF did not converge{f' at step {step}' if step else ''}. Run it with a larger MAX_SCF.")
    spins = int(number(r"^ DFT\| Number of spin states +(\d)$") or 1)
    images = _images(path, text)
    kpoints = _kpoints(path, whole, images is not None)
    scheme = re.search(r"BRILLOUIN\| K-point scheme +(\S+)$", whole, re.M)
    grid = re.search(r"BRILLOUIN\| K-Point grid +(\d+) +(\d+) +(\d+)$", whole, re.M)
    kinds, elements, positions = _atoms(whole)
    levels = re.findall(r"E\(Fermi\): +(\S+) a\.u\.", text)
    electrons = find_all(r"^ Number of electrons: +(\d+)$", "the number of electrons", whole)
    return RunOutput(
        version,
        find(r"^ CP2K\| Input file name +(\S+)$", "the name of the input", whole),
        find(r"^ CELL\| Periodicity +(\S+)$", "the periodicity of the cell", whole),
        images,
        kpoints,
        scheme[1] if scheme else "Gamma",
        (int(grid[1]), int(grid[2]), int(grid[3])) if grid else None,
        *_orbital_energies(path, text, len(kpoints), spins),
        max(map(float, levels[-spins:]), default=None),
        float(find(r"ENERGY\| Total FORCE_EVAL .*\]:? +(\S+)$", "the total energy")),
        int(find(r"SCF run converged in +(\d+) steps", "'SCF run converged'")),
        number(r"^ CP2K +1 .* (\S+)$") or 0.0,
        elements,
        positions,
        "ENERGY| Total FORCE_EVAL" not in before,
        _cell(path, whole[: whole.find("ATOMIC COORDINATES IN ANGSTROM")]),
        _cell(path, whole),
        kinds,
        sum(map(int, electrons[:spins])),
        int(find(r"^ DFT\| Charge +(-?\d+)$", "the charge", whole)),
        spins,
        number(r"eps_pgf_orb: +(\S+)$"),
    )


def steps_of(text: str) -> dict[int, tuple[int, int]]:
    """Return where the last energy of every step stands in the log of one run: step -> (first, last) character."""
    ends = [match.end() for match in re.finditer(r"^ ENERGY\| Total FORCE_EVAL.*$", text, re.M)]
    starts = [0, *ends[:-1]]
    dynamics = [int(n) for n in re.findall(r"^ MD\| Step number +(\d+)$", text, re.M)]
    spans, step = {}, 0
    for start, end, following in zip(starts, ends, [*ends[1:], len(text)]):
        if optimisation := re.findall(r"^ OPTIMIZATION STEP: +(\d+)$", text[start:end], re.M):
            step = int(optimisation[-1])
        after = text[end:following]
        if "MD_INI| " in after:
            step = dynamics[0] - 1 if dynamics else 0  # a restart goes on counting
        elif found := re.search(r"^ MD\| Step number +(\d+)$", after, re.M):
            step = int(found[1])
        spans[step] = start, end
    return spans


def _at_step(path: Path, text: str, step: int) -> tuple[str, str]:
    """Return the log of a run before a step, and of this step; the last step is followed by all that ends the log."""
    starts = [match.start() for match in re.finditer(r"^.*PROGRAM STARTED AT", text, re.M)] or [0]
    for start, end in reversed(list(zip(starts, [*starts[1:], len(text)]))):
        run = text[start:end]
        spans = steps_of(run)
        if step in spans:
            first, last = spans[step]
            return run[:first], run[first:] if last == max(end for _, end in spans.values()) else run[first:last]
    if step == 0:
        return "", text[starts[-1] :]  # errors then say what it lacks
    raise ValueError(f"{path}: no energy of step {step}. Expected the log of the run that wrote the matrices of that step.")


def _atoms(text: str) -> tuple[dict[str, Kind], list[str], np.ndarray]:
    """Return the kinds, and of every atom the element and the position (A, 3) in Angstrom."""
    rows = re.findall(r"^ +\d+ +(\d+) ([A-Z][a-z]?) +\d+((?: +-?\d+\.\d+){3}) +-?\d+\.\d+ +\d+\.\d+$", text, re.M)
    element = {number: symbol for number, symbol, _ in rows}
    kinds = {}
    for number, name, part in re.findall(r"^ +(\d+)\. Atomic kind: (\S+)(.*?)(?=^ +\d+\. Atomic kind:|\Z)", text, re.M | re.S):
        basis = re.search(r"Orbital Basis Set +(\S+).*?Number of spherical basis functions: +(\d+)", part, re.S)
        potential = re.search(r"Potential information for +(\S+)", part)
        if basis and number in element:
            kinds[name] = Kind(element[number], basis[1], int(basis[2]), potential[1] if potential else "", _shells(part))
    return kinds, [symbol for _, symbol, _ in rows], np.array([[float(x) for x in xyz.split()] for *_, xyz in rows])


def _shells(part: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `Kind.shells` of what the log prints of a kind. The first function of a shell is the one with x^l."""
    table = re.search(
        r"Orbital Basis Set.*?Normalised Cartesian orbitals:.*?Coefficient *\n(.*?)(?=^ +[A-Z]|\Z)", part, re.M | re.S
    )
    shells: dict[tuple[str, str], list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in table[1].splitlines() if table else ():
        words = line.split()
        if len(words) == 5:
            rows = [] if (words[0], words[1]) in shells else shells.setdefault((words[0], words[1]), [])
        if len(words) in (2, 5):
            rows.append(words[-2:])
    try:
        tables = [np.array(rows, dtype=float).T for rows in shells.values()]
    except ValueError:  # CP2K prints stars for a number too wide
        return []
    return [(exponents, coefficients) for exponents, coefficients in tables]


def _cell(path: Path, text: str) -> np.ndarray:
    """Return the last cell that is printed, (3, 3)."""
    vectors, parameters = [], []
    for name in "abc":
        found = re.findall(rf"^ CELL\| Vector {name} .*?:([^|]*)\|{name}\| = +(\S+)$", text, re.M)
        if not found:
            raise ValueError(f"{path}: cell vector {name} is missing. Expected the complete log of CP2K {KNOWN_VERSIONS}.")
        vectors.append([float(x) for x in found[-1][0].split()])
        parameters.append(float(found[-1][1]))
    parameters += [float(re.findall(rf"^ CELL\| Angle .*{name} +\[degree\]: +(\S+)$", text, re.M)[-1]) for name in ANGLES]
    standard = np.asarray(Cell.fromcellpar(parameters))
    return standard if np.abs(standard - vectors).max() < CELL_ROUNDING_ANGSTROM else np.array(vectors)


def _images(path: Path, text: str) -> np.ndarray | None:
    """Return the table of periodic images of H and S; None if there is none. Raises ValueError as `parse_output` does."""
    of_h, of_s = (image_table(text, name) for name in ("KS", "S"))
    if (of_h is None) != (of_s is None) or (of_h is not None and of_s is not None and not np.array_equal(of_h, of_s)):
        raise ValueError(f"{path}: the image tables of H and S differ. They must belong to one run.")
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
    if kpoints and not has_images:
        raise ValueError(
            f"{path}: the run has {len(kpoints)} k-points and no table of periodic images: CP2K wrote the complex H(k), not "
            "H(R). Set REAL_SPACE .TRUE. in &KS_CSR_WRITE and &S_CSR_WRITE."
        )
    if has_images and not kpoints:
        raise ValueError(f"{path}: an image table and no k-points, expected both or neither. Is the log complete?")
    return np.array(kpoints) if kpoints else np.zeros((1, 3))


def _orbital_energies(path: Path, text: str, n_kpoints: int, spins: int) -> tuple[np.ndarray | None, int]:
    """Return the energies (K, n) of the orbitals at every k-point, or (2, K, n) of both spins, and how many decimals they have.

    CP2K may print them at every SCF step; the last ones count, those of the matrices that it writes. None if it printed none.

    Raises ValueError if the number of k-points is another one, or if an energy is not a number.
    """
    blocks = {}
    for title, rows in re.findall(ORBITALS, text):
        point = re.search(r"FOR K POINT +(\d+)", title)
        blocks["BETA" in title, int(point[1]) if point else 1] = [line.split()[1:3] for line in rows.splitlines()]
    if not blocks:
        return None, 0
    if len(blocks) != n_kpoints * spins:
        raise ValueError(
            f"{path}: orbital energies at {len(blocks) // spins} k-points, expected {n_kpoints}. Several MPI ranks print all "
            "of them only with PARALLEL_GROUP_SIZE 0 in &KPOINTS: use `hamscale input`."
        )
    if blocks[min(blocks)][0][0] != "1":
        raise ValueError(
            f"{path}: orbital energies begin at number {blocks[min(blocks)][0][0]}. Leave MO_INDEX_RANGE out of &MO."
        )
    values = [[energy for _, energy in blocks[point]] for point in sorted(blocks)]
    try:
        energies = np.array(values, dtype=float)
    except ValueError:  # CP2K prints stars for a number too wide, or k-points have different numbers of orbitals
        energies = np.array(np.nan)
    if not np.isfinite(energies).all():
        raise ValueError(
            f"{path}: an orbital energy is not a number, or k-points have different numbers of them. Run CP2K again."
        )
    if spins == 2:
        energies = energies.reshape(2, n_kpoints, -1)
    return energies, len(values[0][0].partition(".")[2])


def image_table(text: str, name: str) -> np.ndarray | None:
    """Return the cells of the CSR files in the order of the table.

    The position in the table counts, because CP2K's own numbers turn to stars above 9999.
    """
    table = re.search(
        rf"^ *{name} CSR write\| *\S+ periodic images *\n *Number +X +Y +Z *\n((?: *\S+ +-?\d+ +-?\d+ +-?\d+ *\n)+)", text, re.M
    )
    return None if table is None else np.array([[int(x) for x in row.split()[-3:]] for row in table[1].splitlines()])
