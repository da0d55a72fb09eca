"""Make the tables of a structure that need no DFT (its atoms, their owners and |H| as an image), and those of figure 8."""

import numpy as np
import pandas as pd

from ..graph.neighbours import edges_within
from ..operators import Operators
from ..partition import METHODS, partition
from ..units import hartree_to_mev

PARTS, PIXELS, FLOOR_MEV = 8, 150, 1e-3


def view_tables(operators: Operators, parts: int = PARTS, pixels: int = PIXELS) -> dict[str, pd.DataFrame]:
    """Return the tables atoms, parts and image."""
    atoms, cutoff = operators.atoms, float(operators.attributes["cutoff_angstrom"])
    parts = min(parts, len(atoms))
    edges = edges_within(atoms, cutoff)
    table = pd.DataFrame(atoms.positions, columns=["x_angstrom", "y_angstrom", "z_angstrom"])
    table.insert(0, "element", atoms.get_chemical_symbols())
    quality = []
    for method in METHODS:
        result = partition(atoms, [(edges[:, 0], edges[:, 1])], cutoff, parts, method)
        table[f"owner_{method.replace('-', '_')}"] = result.owner
        quality.append({"method": method, "parts": parts, "cutoff_angstrom": cutoff} | result.quality())
    return {"atoms": table, "parts": pd.DataFrame(quality), "image": image_table(operators, pixels)}


def image_table(operators: Operators, pixels: int = PIXELS) -> pd.DataFrame:
    """Return log10 of the largest |H| (meV) under each pixel, over all cells R.

    Rows and columns are those of the upper triangle, because H is Hermitian. Orbitals are in the order of the atoms; |H| below
    1e-3 meV counts as 1e-3 meV.
    """
    n = operators.n_orbitals
    pixels = min(pixels, n)
    start = np.concatenate([[0], np.cumsum(operators.orbitals)])
    largest, hamiltonian = np.zeros(pixels * pixels), np.abs(np.atleast_2d(operators.hamiltonian)).max(0)  # of both spins
    for z_i, z_j, blocks, places in operators.groups():
        n_i, n_j = operators.basis[z_i].n_orbitals, operators.basis[z_j].n_orbitals
        i, j = operators.pairs[blocks, :2].T
        row = ((start[i][:, None] + np.repeat(np.arange(n_i), n_j)) * pixels) // n
        column = ((start[j][:, None] + np.tile(np.arange(n_j), n_i)) * pixels) // n
        np.maximum.at(largest, (row * pixels + column).ravel(), np.abs(places.take(hamiltonian)).ravel())
    row, column = np.triu_indices(pixels)
    values = hartree_to_mev(largest.reshape(pixels, pixels)[row, column])
    return pd.DataFrame({"row": row, "column": column, "log10_h_mev": np.log10(np.maximum(values, FLOOR_MEV)).round(2)})
