"""Read the files of a CP2K run as block-sparse H and S: of a run of ours, or of a step of a user's own.

docs/conventions.md has the facts about the formats, the same in all versions of log.KNOWN_VERSIONS. The table that says
which file belongs to which periodic image stands in the log alone; images count from the wrapped atoms; matrices are in
Hartree, and both triangles are written. A spin-polarised run writes H of spin up, H of spin down and one S.
"""

import logging
import re
from itertools import product
from pathlib import Path

import numpy as np
from ase import Atoms
from scipy.linalg import LinAlgError

from ..basis import SHELLS_ONLY, Basis, ElementBasis
from ..operators import Operators
from ..pairs import PairList
from ..runs import Snapshot, snapshot
from ..structures import charge_of, periodicity, plane_distances
from ..units import angstrom_to_bohr
from ..workers import eigh
from .csr import image_files, read_blocks
from .geometry import input_file, run_geometry, run_output
from .log import OUTPUT, Kind, RunOutput

log = logging.getLogger(__name__)

CELL_TOLERANCE_ANGSTROM = 1e-3  # the log prints 3 decimals
POSITION_TOLERANCE_ANGSTROM = 1e-5  # the log prints 6 decimals
EPS_ORBITALS = 1e-5  # CP2K's default of EPS_PGF_ORB, at its default of EPS_DEFAULT
KPOINT_ROUNDING = 6e-6  # the log prints 5 decimals of k-points
HERMITICITY_TOLERANCE = 1e-7  # Hartree for H, 1 for S


def read_run(path: str | Path, atoms: Atoms, basis: Basis, attributes: dict | None = None) -> Operators:
    """Read H and S of a run as block-sparse operators. path: a folder with one structure, or a file of H.

    They have every block in which H or S has an element. Onsite blocks are symmetrised: CP2K's differ from their transpose by
    up to 1e-7 Ha, and CP2K diagonalises one triangle. `atoms` are those of the run, each at its own place or in another cell.

    Raises ValueError, naming the file, for all that makes the matrices doubtful: another basis or structure than given, files
    that do not fit the image table, NaN, an element outside the matrix, a block without its transpose or different from it, or
    a missing diagonal element (a file cut short loses it first, where the transpose cannot tell); and if the images of a
    periodic structure were folded into one matrix and its cell is too small to tell them apart.
    """
    run = snapshot(path)
    log_file, output = run_output(run)
    moved = _cells_from_run(run, log_file, output, atoms)
    _check_kinds(log_file, output, atoms, basis)
    files = image_files(run, output.images, output.spins)
    cells = np.zeros((1, 3), np.int64) if output.images is None else output.images
    folded = output.images is None and output.periodicity != "NONE"
    pairs, values = read_blocks(files, cells, basis.n_orbitals(atoms.numbers), None if folded else moved)
    if folded:
        pairs = unfold(str(run), PairList(atoms, pairs), basis, output.eps_orbitals)
    printed = output.mo_energies
    operators = Operators(
        atoms,
        basis,
        PairList(atoms, pairs),
        values["KS"] if output.spins == 1 else np.stack([values["KS"], values["KS_DOWN"]]),
        values["S"],
        {
            "source": "dft",
            "code": f"CP2K {output.version}",
            "total_energy_hartree": output.total_energy,
            "scf_steps": output.scf_steps,
            "wall_seconds": output.wall_seconds,
            "orbital_energy_decimals": output.mo_decimals,
        }
        | ({} if output.fermi_level is None else {"cp2k_fermi_level_hartree": output.fermi_level})
        | _threshold(input_file(log_file, output))
        | (attributes or {}),
        None if printed is None else (exact_kpoints(input_file(log_file, output), output, np.asarray(atoms.cell)), printed),
    )
    _check_diagonal(run, operators)
    _make_hermitian(run, operators)
    return operators


def exact_kpoints(path: Path, output: RunOutput, cell: np.ndarray) -> np.ndarray:
    """Return the k-points of a run without the log's rounding to five decimals, (K, 3), in fractions of the reciprocal lattice.

    path: the input of the run.
    A grid of n divisions has k = (2 r - n - 1) / (2 n) + shift along each vector, r = 1..n (H. J. Monkhorst, J. D. Pack, Phys.
    Rev. B 13, 5188 (1976); with a shift A. H. MacDonald, Phys. Rev. B 18, 5897 (1978)): n stands in the log, the shift in the
    run's input. A list of k-points is that of the input, in its units. cell (3, 3): rows are cell vectors in Angstrom. Without
    an input the k-points of a shifted grid or of a list are those of the log. Raises ValueError if the exact k-points are not
    those of the log.
    """
    text = path.read_text(errors="replace") if path.is_file() else ""
    shifted = re.search(r"^ *SCHEME +MACDONALD +\S+ +\S+ +\S+ +(\S+) +(\S+) +(\S+) *$", text, re.M | re.I)
    listed = re.findall(r"^ *KPOINT +(\S+) +(\S+) +(\S+)", text, re.M | re.I)
    if output.kpoint_grid and (shifted or output.scheme == "Monkhorst-Pack"):
        shift = np.array(shifted.groups(), dtype=float) if shifted else np.zeros(3)
        twice = 2 * np.array(output.kpoint_grid)
        exact = np.round((output.kpoints - shift) * twice) / twice + shift
    elif output.scheme == "General" and len(listed) == len(output.kpoints):
        units = re.search(r"^ *UNITS +(\S+)", text, re.M | re.I)
        per_length = {"B_VECTOR": None, "CART_ANGSTROM": cell, "CART_BOHR": angstrom_to_bohr(cell)}
        vectors = per_length.get(units[1].upper() if units else "B_VECTOR")
        exact = np.array(listed, dtype=float)
        if vectors is not None:
            exact = exact @ vectors.T / (2 * np.pi)
    else:
        return output.kpoints
    if (difference := np.abs(exact - output.kpoints).max()) > KPOINT_ROUNDING:
        raise ValueError(
            f"{path}: its k-points differ from those of {OUTPUT} by {difference:.1e}, expected at most the rounding of the "
            f"log, {KPOINT_ROUNDING:.0e}. Was the input changed after the run? Run it again."
        )
    return exact


def _threshold(path: Path) -> dict[str, float]:
    """Return eps_threshold, the |element| below which CP2K wrote none, as the run's own input says; empty without an input."""
    found = re.findall(r"^ *THRESHOLD +(\S+)", path.read_text(errors="replace"), re.M) if path.is_file() else []
    return {"eps_threshold": max(map(float, found))} if found else {}


def _cells_from_run(run: Snapshot, log: Path, output: RunOutput, atoms: Atoms) -> np.ndarray:
    """Return the number of cells between every atom and the place from where CP2K counts the images of the run, (A, 3).

    CP2K counts from fractions f - ANINT(f). All atoms may be shifted together. Raises ValueError if the atoms are others.
    """
    others = ValueError(
        f"{log}: atoms of the run ({len(output.elements)}) are not those of the structure ({len(atoms)} "
        "atoms). Was the structure changed after the run? Run it again."
    )
    if output.elements != atoms.get_chemical_symbols():
        raise others
    if output.periodicity != periodicity(atoms):
        raise ValueError(
            f"{log}: the run is periodic along {output.periodicity}, the structure along {periodicity(atoms)}. Run it again, "
            "or set pbc of the structure to what was run."
        )
    positions, cell = run_geometry(run, log, output)
    moved, apart = np.zeros((len(atoms), 3), np.int64), positions - atoms.positions
    if output.periodicity != "NONE":  # the cell of a molecule is a box that does not affect its matrices
        if np.abs(cell - np.asarray(atoms.cell)).max() > CELL_TOLERANCE_ANGSTROM:
            raise ValueError(
                f"{log}: the cell of the run is {np.round(cell, 6).tolist()} A, that of the structure "
                f"{np.round(np.asarray(atoms.cell), 6).tolist()} A. Was the structure changed after the run? Run it again."
            )
        fractions = atoms.cell.scaled_positions(positions)
        fractions -= np.where(atoms.pbc, np.trunc(fractions + np.copysign(0.5, fractions)), 0.0)
        difference = atoms.cell.scaled_positions(atoms.positions) - fractions
        together = difference[0] - np.round(difference[0])
        moved = np.where(atoms.pbc, np.round(difference - together), 0).astype(np.int64)
        apart = (difference - together - moved) @ np.asarray(atoms.cell)
        if np.abs(together @ np.asarray(atoms.cell)).max() < POSITION_TOLERANCE_ANGSTROM:
            apart += together @ np.asarray(atoms.cell)
    if np.abs(apart).max() > POSITION_TOLERANCE_ANGSTROM:
        raise others
    return moved


def _check_kinds(log: Path, output: RunOutput, atoms: Atoms, basis: Basis) -> None:
    """Raise ValueError if basis sets, pseudopotentials, electrons or charge of the run are others than expected."""
    if output.charge != charge_of(atoms):
        raise ValueError(
            f"{log}: the run has charge {output.charge}, the structure {charge_of(atoms)}. Was the charge changed after the "
            "run? Run it again."
        )
    if unread := sorted(set(output.elements) - {kind.element for kind in output.kinds.values()}):
        raise ValueError(
            f"{log}: the basis set of {', '.join(unread)} is missing. Expected it under 'Atomic kind' in the log of a run at "
            "PRINT_LEVEL MEDIUM: use `hamscale input`."
        )
    for kind in output.kinds.values():
        expected = next((e for e in basis.values() if e.element == kind.element), None)
        if expected is None or (kind.basis, kind.n_orbitals) != (expected.name, expected.n_orbitals):
            wanted = f"{expected.name} with {expected.n_orbitals}" if expected else "none"
            raise ValueError(
                f"{log}: {kind.element} was run with basis {kind.basis} of {kind.n_orbitals} orbitals, the configuration says "
                f"{wanted}. Run it again, or set species back to what was run."
            )
        if not _same_shells(kind, expected):
            raise ValueError(
                f"{log}: {kind.element} was run with other exponents or coefficients than basis {kind.basis} has now. Was the "
                "file of basis sets changed after the run? Run it again, or take the file that it was run with."
            )
        if kind.potential and _name(kind.potential) != _name(expected.potential):
            raise ValueError(
                f"{log}: {kind.element} was run with potential {kind.potential}, the configuration says {expected.potential}. "
                "Run it again, or set species to what was run."
            )
    electrons = basis.n_electrons(atoms.numbers) - output.charge
    if output.n_electrons != electrons:
        raise ValueError(
            f"{log}: {output.n_electrons} electrons, the pseudopotentials of the configuration leave {electrons} at "
            f"the charge {output.charge}. Expected a run of these potentials."
        )


def _same_shells(kind: Kind, basis: ElementBasis) -> bool:
    """Tell whether the log prints the exponents and coefficients of a basis, to its 6 decimals; also where it prints none."""
    if not kind.shells or basis.text.startswith(SHELLS_ONLY):
        return True
    return len(kind.shells) == len(basis.normalised) and all(
        len(a) == len(exponents) and np.abs(a - exponents).max() < 1e-6 and np.abs(c - coefficients).max() < 2e-6
        for (a, c), (_, exponents, coefficients) in zip(kind.shells, basis.normalised)
    )


def _name(potential: str) -> str:
    """Return the name of a pseudopotential without its number of electrons: runs may name it either way."""
    return re.sub(r"-q\d+$", "", potential)


def _check_diagonal(run: Snapshot, operators: Operators) -> None:
    """Check that every diagonal element of H(R=0) and S(R=0) is there.

    A file that was cut by whole records loses the last one first.
    """
    # pairs are sorted, so the blocks are in the order of atoms
    blocks, orbitals = np.flatnonzero(operators.pairs.onsite), operators.orbitals
    if len(blocks) < len(orbitals):
        bare = int(np.setdiff1d(np.arange(len(orbitals)), operators.pairs[blocks, 0])[0])
        raise ValueError(f"{run}: atom {bare} has no onsite block in H and S. Was a CSR file cut short? Run CP2K again.")
    atom = np.repeat(np.arange(len(orbitals)), orbitals)
    within = np.arange(len(atom)) - (np.cumsum(orbitals) - orbitals)[atom]
    diagonal = operators.offsets[blocks][atom] + within * (orbitals[atom] + 1)
    for name in ("hamiltonian", "overlap"):
        missing = np.flatnonzero((getattr(operators, name)[..., diagonal] == 0).reshape(-1, len(diagonal)).any(0))
        if len(missing):
            raise ValueError(
                f"{run}: {name} lacks {len(missing)} of {len(atom)} diagonal elements, the first of orbital "
                f"{missing[0] + 1}, expected all. Was a CSR file cut short, or dft.csr_threshold large? Run CP2K again."
            )


def _make_hermitian(run: Snapshot, operators: Operators) -> None:
    """Check H = H^+ and S = S^+ block by block, then make both exact; it is the onsite blocks that need it."""
    for name in ("hamiltonian", "overlap"):
        try:
            error = operators.make_hermitian(getattr(operators, name))
        except ValueError as message:
            raise ValueError(f"{run}: {message} Was a CSR file cut short? Run CP2K again.") from None
        if error > HERMITICITY_TOLERANCE:
            raise ValueError(
                f"{run}: {name} differs from its adjoint by {error:.1e}, expected at most {HERMITICITY_TOLERANCE:.0e}. "
                "Was a CSR file cut short? Run CP2K again."
            )


def unfold(where: str, pairs: PairList, basis: Basis, eps_orbitals: float | None) -> np.ndarray:
    """Return the pairs (i, j, R) of a matrix whose periodic images were folded into one, (E, 5), R the nearest image.

    CP2K has a block of H and S where two orbitals reach each other, r_i + r_j, with r the radius beyond which every primitive
    is below EPS_PGF_ORB. If no second image of a pair is within that reach, the folded block is that of the nearest image.

    Raises ValueError with the smallest cell that would do if there is a second image within reach.
    """
    atoms, eps = pairs.atoms, eps_orbitals or EPS_ORBITALS
    radius = np.zeros(max(basis) + 1)
    for z, element in basis.items():
        radius[z] = element.radius_angstrom(eps)
    reach = radius[atoms.numbers[pairs[:, 0]]] + radius[atoms.numbers[pairs[:, 1]]]
    around = np.array(list(product(*(range(-2, 3) if periodic else (0,) for periodic in atoms.pbc))))
    unfolded, nearest, second = np.array(pairs), np.empty(len(pairs)), np.empty(len(pairs))
    wrapped = atoms.cell.scaled_positions(atoms.positions)
    for rows in np.array_split(np.arange(len(pairs)), len(pairs) // 4096 + 1):
        difference = wrapped[pairs[rows, 1]] - wrapped[pairs[rows, 0]]
        home = np.where(atoms.pbc, -np.round(difference), 0).astype(np.int64)
        distances = np.linalg.norm(
            (difference + home)[:, None] @ np.asarray(atoms.cell) + around @ np.asarray(atoms.cell), axis=2
        )
        order = np.argsort(distances, axis=1)[:, :2]
        unfolded[rows, 2:] = home + around[order[:, 0]]
        nearest[rows], second[rows] = np.take_along_axis(distances, order, 1).T
    if (second <= reach).any() or (nearest > reach).any():
        planes, needed = plane_distances(atoms.cell).min(), 2 * reach.max()
        raise ValueError(
            f"{where}: the run is periodic and has no k-points, so CP2K folded the matrices of all periodic images into one, "
            f"and two images of a pair are within the reach of H, {reach.max():.1f} A: H(R) cannot be had back. Expected a "
            f"cell whose planes are more than {needed:.1f} A apart, found {planes:.1f} A. Or add &KPOINTS with SCHEME "
            "MONKHORST-PACK 1 1 1 (the Gamma point alone) and REAL_SPACE .TRUE. in &KS_CSR_WRITE and &S_CSR_WRITE; a "
            "molecule needs PERIODIC NONE in &CELL and &POISSON."
        )
    log.warning(
        f"{where}: the run is periodic and has no k-points: every pair is taken at its nearest image, since H reaches "
        f"{reach.max():.1f} A and no second image is so near. Its density is that of the Gamma point alone."
    )
    return unfolded


def eigenvalue_check(operators: Operators) -> float:
    """Return max |eigenvalues of H(k), S(k) - those CP2K printed|, in Hartree, over all k-points, orbitals and spins.

    Raises ValueError if it printed none, or if S(k) is not positive definite.
    """
    if operators.orbital_energies is None:
        raise ValueError("no orbital energies were printed, expected those of &PRINT &MO ON, as `hamscale input` writes it.")
    kpoints, energies = operators.orbital_energies
    points = operators.points_and_spins(kpoints)
    deviations = []
    for (k, spin), printed in zip(points, energies.reshape(len(points), -1), strict=True):
        try:
            found = eigh(*operators.at_k(k, spin), eigvals_only=True)
        except LinAlgError as error:
            raise ValueError(
                f"k-point {k.tolist()}: H(k), S(k) have no eigenvalues ({error}). Expected S(k) positive definite: was a CSR "
                "file cut short, or dft.csr_threshold large?"
            ) from None
        deviations.append(np.abs(found[: len(printed)] - printed).max())
    return float(np.max(deviations))


def check_eigenvalues(where: str, operators: Operators, tolerance_hartree: float) -> float:
    """Return the deviation of `eigenvalue_check`, which is also told. Raises ValueError if it is larger than a tolerance."""
    deviation = eigenvalue_check(operators)
    log.info(f"{where}: eigenvalues of H(k), S(k) against those CP2K printed: max {deviation:.1e} Ha")
    if deviation > tolerance_hartree:
        raise ValueError(
            f"{where}: eigenvalues of H(k), S(k) differ from those CP2K printed by {deviation:.1e} Ha, expected at most "
            f"{tolerance_hartree:.0e}. Is the run complete, and do its log, its matrices and the structure belong together?"
        )
    return deviation
