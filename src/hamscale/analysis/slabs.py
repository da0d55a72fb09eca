"""Compute mean potentials along a structure, which show errors of long wavelength that errors of blocks hide.

The potential of an atom is the component of its onsite block along S, u_i = <H_ii, S_ii> / <S_ii, S_ii>: an electrostatic
potential V that varies slowly adds V S_ij to all blocks there, so it shifts u_i by V. A false potential of long wavelength
shifts all states of one part of a structure against those of another, and the mean error of H hardly shows it.
"""

import numpy as np
import pandas as pd

from ..operators import Operators
from ..units import hartree_to_ev


def atom_potentials(operators: Operators) -> np.ndarray:
    """Return the potential u_i of every atom, (A,), in Hartree; of two spins, the mean of both."""
    if operators.spins == 2:
        return np.mean([atom_potentials(channel) for channel in operators.channels], axis=0)
    result = np.empty(len(operators.atoms))
    for b in np.flatnonzero(operators.pairs.onsite).tolist():
        H, S = (operators.block(values, b) for values in (operators.hamiltonian, operators.overlap))
        result[operators.pairs[b, 0]] = (H * S).sum() / (S * S).sum()
    return result


def slab_table(dft: Operators, predicted: Operators, baseline: Operators, slab_angstrom: float) -> pd.DataFrame:
    """Return the mean potential of the atoms of each slab along the longest periodic cell vector, one row per slab.

    Columns: slab, distance_angstrom (of the middle of the slab from the corner of the cell), atoms, dft_ev, predicted_ev,
    baseline_ev. Slabs have equal thickness, and their number, at least one, makes it come nearest to slab_angstrom; a molecule
    is one slab. DFT's mean over the atoms of each element is subtracted from all three potentials, and those of the prediction
    and the reference are shifted by their mean difference from DFT, so that neither the energy zero nor the composition of a
    slab counts. A slab without atoms has NaN.
    """
    atoms, numbers = dft.atoms, dft.atoms.numbers
    lengths = atoms.cell.lengths() * (atoms.pbc if atoms.pbc.any() else 1)
    axis = int(np.argmax(lengths))
    count = max(1, round(lengths[axis] / slab_angstrom)) if atoms.pbc.any() else 1
    slab = np.zeros(len(atoms), int)
    if count > 1:
        slab = (atoms.cell.scaled_positions(atoms.positions)[:, axis] % 1 * count).astype(int) % count
    potentials = [atom_potentials(o) for o in (dft, predicted, baseline)]
    mean = np.array([potentials[0][numbers == z].mean() for z in numbers])
    columns = {}
    for name, u in zip(("dft", "predicted", "baseline"), potentials):
        relative = hartree_to_ev(u - mean - (u - potentials[0]).mean())
        columns[f"{name}_ev"] = [relative[slab == k].mean() if (slab == k).any() else np.nan for k in range(count)]
    return pd.DataFrame(
        {
            "slab": np.arange(count),
            "distance_angstrom": (np.arange(count) + 0.5) * lengths[axis] / count,
            "atoms": np.bincount(slab, minlength=count),
        }
        | columns
    )


def slab_errors(slabs: pd.DataFrame) -> dict[str, float]:
    """Return the largest error (eV) of a slab's mean potential, of the prediction and of the reference.

    Both are NaN if there is only one slab.
    """
    if len(slabs) < 2:
        return {"slab_error_ev": np.nan, "baseline_slab_error_ev": np.nan}
    worst = lambda name: float((slabs[f"{name}_ev"] - slabs["dft_ev"]).abs().max())  # noqa: E731
    return {"slab_error_ev": worst("predicted"), "baseline_slab_error_ev": worst("baseline")}
