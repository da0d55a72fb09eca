"""Read runs of CP2K that were not made here: a user's folder, whatever its files are called."""

import logging
from pathlib import Path

import numpy as np
from ase import Atoms

from ..basis import Basis
from ..dft.geometry import run_atoms
from ..dft.outputs import check_eigenvalues, read_run
from ..graph.placement import exchanged_images, overlap_deviations, placed_by_overlap
from ..operators import Operators
from ..runs import snapshot
from ..structures import POSITION_DECIMALS, check_distances, wrap_as_cp2k

log = logging.getLogger(__name__)

# Largest accepted differences: of eigenvalues of H(k), S(k) from those CP2K printed, and of S from two-centre integrals.
# hamscale's own runs agree to 1e-10, those at CP2K's default EPS_PPNL to 3e-5 Ha (docs/conventions.md). Other structures,
# other basis sets, and cells that are counted wrongly give 1e-2 and more.
EIGENVALUE_TOLERANCE_HARTREE = 1e-4
OVERLAP_TOLERANCE = 1e-3
CLOSE_HARTREE, CLOSE_OVERLAP = 1e-6, 1e-5  # a larger difference is told


def read_structure(path: str | Path) -> Atoms:
    """Return the structure of a run, wrapped as CP2K wraps it. path: a folder with one structure, or a file of H.

    Raises ValueError as `dft.geometry.run_atoms` does, and if two atoms are too close.
    """
    run = snapshot(path)
    atoms = run_atoms(run)
    check_distances(str(run), atoms)
    atoms = wrap_as_cp2k(atoms)
    atoms.positions = np.round(atoms.positions, POSITION_DECIMALS)
    return atoms


def read(path: str | Path, basis: Basis, atoms: Atoms | None = None, attributes: dict | None = None) -> Operators:
    """Read H and S of a run, and check them.

    path: a folder with one structure, or a file of H. atoms: those of its structure file.
    Eigenvalues of H(k), S(k) are compared with those that CP2K printed, if it did, and S with two-centre integrals of the
    basis: a difference that rounding and screening explain is told in a warning, a larger one is refused.

    Raises ValueError as `dft.outputs.read_run` does, and for such a difference.
    """
    where = str(snapshot(path))
    operators = placed_by_overlap(read_run(path, read_structure(path) if atoms is None else atoms, basis, attributes))
    check_images(where, operators)
    _check_eigenvalues(where, operators)
    return operators


def check_images(where: str, operators: Operators, tolerance: float = OVERLAP_TOLERANCE) -> None:
    """Check that S is that of two-centre integrals of the basis, and that every image of H belongs to that of S.

    A difference of S beyond CLOSE_OVERLAP is told. Raises ValueError for one beyond the tolerance, and for an image R whose H
    is that of another image (`graph.placement.exchanged_images`).
    """
    if (overlap := float(overlap_deviations(operators).max())) > tolerance:
        raise ValueError(
            f"{where}: S differs from the two-centre integrals of the basis by {overlap:.1e}, expected at most "
            f"{tolerance:.0e}. Are positions, cell and basis those of the run? Keep its input and "
            "NAME-pos-1.xyz beside the log, and NAME-1.cell (&MOTION &PRINT &CELL) where the cell changes."
        )
    if overlap > CLOSE_OVERLAP:
        log.warning(
            f"{where}: S differs from the two-centre integrals of the basis by {overlap:.1e}: EPS_DEFAULT is large, or "
            "positions or cell are rounded."
        )
    if exchanged := exchanged_images(operators):
        R, other = exchanged[0]
        raise ValueError(
            f"{where}: H of the image R = {R} is that of R = {other}, by its S. Were files of matrices renamed, or the table "
            "of images in the log changed? Run CP2K again."
        )


def _check_eigenvalues(where: str, operators: Operators) -> None:
    if operators.orbital_energies is None:
        log.warning(f"{where}: no orbital energies were printed, so H was checked by nothing. Set &PRINT &MO ON with ENERGIES.")
        return
    rounding = 10.0 ** -operators.attributes["orbital_energy_decimals"]
    deviation = check_eigenvalues(where, operators, EIGENVALUE_TOLERANCE_HARTREE + rounding)
    if deviation > CLOSE_HARTREE + rounding:
        log.warning(
            f"{where}: eigenvalues of H(k), S(k) differ from those CP2K printed by {deviation:.1e} Ha. EPS_PPNL, by default "
            "the root of EPS_DEFAULT, does that; set it to EPS_DEFAULT (docs/conventions.md)."
        )
