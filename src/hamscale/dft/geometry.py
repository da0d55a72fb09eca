"""Find the log and the input of a run by its matrices, and the atoms and the cell of each of its steps."""

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.cell import Cell

from ..runs import Snapshot
from .log import CELL_ROUNDING_ANGSTROM, RunOutput, parse_output

HEAD = 1 << 16  # bytes at the start of a file in which a log has its banner
ENERGY_ROUNDING_HARTREE = 2e-10  # of the 10 decimals of a trajectory


def run_output(run: Snapshot) -> tuple[Path, RunOutput]:
    """Return the log of a run and what it says of the run's step. A log has any name; it names its project itself.

    Of several logs of one project, as restarts make them, that counts which has the step, and of these the one that was
    written last. Raises ValueError if there is none, and as `log.parse_output` does.
    """
    logs = _logs(run.folder)
    mine = [path for path, project in logs if project == run.project] or ([logs[0][0]] if len(logs) == 1 else [])
    if not mine:
        others = ", ".join(f"{path.name} of {project}" for path, project in logs) or "none"
        raise ValueError(
            f"{run}: its log is missing. Expected CP2K's output of project {run.project} beside it; logs there: {others}."
        )
    errors = []
    for path in sorted(mine, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return path, parse_output(path, run.step)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _logs(folder: Path) -> list[tuple[Path, str]]:
    """Return the logs of a folder, each with the name of its project."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".csr" or not path.is_file():
            continue
        with open(path, "rb") as file:
            head = file.read(HEAD).decode(errors="replace")
        if project := re.search(r"^ GLOBAL\| Project name +(\S+)$", head, re.M):
            found.append((path, project[1]))
    return found


def input_file(log: Path, output: RunOutput) -> Path:
    """Return the input that a log names, beside the log; it may be missing."""
    return log.with_name(Path(output.input_name).name)


def run_geometry(run: Snapshot, log: Path, output: RunOutput) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions (A, 3) and the cell (3, 3) of a run at its step, in Angstrom.

    Positions of 10 decimals are those of the frame of NAME-pos-1.xyz that has the energy of the step. Without one they are
    those of the log, of 6 decimals, if they have not moved since; their fractions are kept where the cell has changed. The cell
    is that of NAME-1.cell, of the input or of the log, whichever comes first and is that of the log.

    Raises ValueError if the positions of a later step are in no trajectory.
    """
    cell = _exact_cell(run, log, output, output.cell)
    trajectory = run.folder / f"{run.project}-pos-1.xyz"
    if (positions := _frame(trajectory, output)) is not None:
        return positions, cell
    if not output.is_first:
        raise ValueError(
            f"{run}: its positions are missing. Expected the frame of that step in {trajectory.name}: &MOTION &PRINT "
            "&TRAJECTORY with FORMAT XYZ and the same EACH as &KS_CSR_WRITE."
        )
    if np.abs(output.first_cell - output.cell).max() < CELL_ROUNDING_ANGSTROM:
        return output.positions, cell
    first = _exact_cell(run, log, output, output.first_cell)
    return np.linalg.solve(first.T, output.positions.T).T @ cell, cell


def _frame(trajectory: Path, output: RunOutput) -> np.ndarray | None:
    """Return the positions (A, 3) of the last frame that has the energy of the step; None if there is none."""
    text = trajectory.read_text() if trajectory.is_file() else ""
    frames = [
        match.end()
        for match in re.finditer(r"^ *i = .*E = +(\S+) *$", text, re.M)
        if abs(float(match[1]) - output.total_energy) < ENERGY_ROUNDING_HARTREE
    ]
    if not frames:
        return None
    rows = [line.split() for line in text[frames[-1] :].split("\n", len(output.elements) + 1)[1 : len(output.elements) + 1]]
    if len(rows) < len(output.elements) or min(map(len, rows)) < 4:
        raise ValueError(f"{trajectory}: the frame of energy {output.total_energy} Ha is cut short.")
    return np.array([[float(x) for x in row[1:4]] for row in rows])


def _exact_cell(run: Snapshot, log: Path, output: RunOutput, of_log: np.ndarray) -> np.ndarray:
    """Return the cell with the most decimals that agrees with one of the log to the log's rounding."""
    candidates = []
    variable, restart = run.folder / f"{run.project}-1.cell", run.folder / f"{run.project}-1.restart"
    if variable.is_file():
        table = np.loadtxt(variable, ndmin=2)
        candidates += [row[2:11].reshape(3, 3) for row in table[table[:, 0] == run.step]]
    for path in (input_file(log, output), restart):
        if path.is_file() and (found := cell_of_input(path.read_text(errors="replace"))) is not None:
            candidates.append(found)
    return next((cell for cell in candidates if np.abs(cell - of_log).max() < CELL_ROUNDING_ANGSTROM), of_log)


def cell_of_input(text: str) -> np.ndarray | None:
    """Return the cell (3, 3) of the section &CELL of an input, in its units; None if it is not given in numbers."""
    for section in re.findall(r"^ *&CELL *$(.*?)^ *&END", text, re.M | re.S | re.I):  # &PRINT has a section of this name too
        values = {}
        for line in section.splitlines():
            keyword, *words = line.split("!")[0].replace("[angstrom]", "").split() or [""]
            with suppress(ValueError):  # another keyword, a variable, or another unit
                values[keyword.upper()] = [float(word) for word in words]
        if all(len(values.get(name, [])) == 3 for name in "ABC"):
            return np.array([values[name] for name in "ABC"])
        if len(values.get("ABC", [])) == 3:
            return np.asarray(Cell.fromcellpar([*values["ABC"], *values.get("ALPHA_BETA_GAMMA", [90.0, 90.0, 90.0])]))
    return None


def run_atoms(run: Snapshot) -> Atoms:
    """Return the structure of a run at its step, with its positions as they were in the run, not wrapped."""
    log, output = run_output(run)
    positions, cell = run_geometry(run, log, output)
    atoms = Atoms(output.elements, positions, cell=cell, pbc=[axis in output.periodicity for axis in "XYZ"])
    if output.charge:
        atoms.info["charge"] = output.charge
    return atoms
