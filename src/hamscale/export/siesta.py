"""Convert to sisl's Hamiltonian, and write through sisl the files that TBtrans and Siesta read: netCDF (nc) and TSHS.

Units are eV and Angstrom. sisl holds one sparse matrix of all cells, so this target alone needs memory for all elements.
Sources in github.com/zerothi/sisl: src/sisl/physics/hamiltonian.py (fromsp), src/sisl/io/siesta/. Siesta's real harmonics carry
the Condon-Shortley sign (-1)^m, those of hamscale do not (sisl/_core/orbital.py, "the choice of these real spherical harmonics
is that of Siesta").
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import scipy.sparse as sp
from ase import Atoms

from ..files import together
from ..units import hartree_to_ev
from .device import NAMES
from .stream import Stored, split_by_cell, write_energies

if TYPE_CHECKING:
    import sisl

SUFFIXES = {"tbtrans": ".nc", "tshs": ".TSHS"}
ROUNDING_ANGSTROM = 1e-3  # sisl counts neighbours strictly within the radii, and files of Siesta round
# cells (m, 3), rows, columns, H in Hartree and S of m elements
Elements: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def load_sisl() -> ModuleType:
    try:
        import netCDF4  # noqa: F401  (sisl needs it to write .nc)
        import sisl
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, expected it for the targets sisl, tbtrans and tshs. pip install "
            "'hamscale[export]'."
        ) from None
    return sisl


def hamiltonian(stored: Stored) -> "sisl.Hamiltonian":
    """Return the sisl.Hamiltonian of the file, non-orthogonal: H in eV, orbitals in hamscale's order with Siesta's signs.

    That of a spin-polarised structure has the spin configuration "polarized", with spin up first.
    Energies keep the zero of the file: the Fermi level is not subtracted. Raises ValueError if sisl is not installed.
    """
    nsc = (2 * np.abs(stored.pairs[:, 2:]).max(0) + 1).tolist()

    def elements(channel: Stored) -> Iterator[Elements]:
        for rows in channel.rows():
            yield rows.pairs[rows.pair, 2:], rows.row, rows.column, rows.hamiltonian, rows.overlap

    return assembled(stored, stored.atoms, nsc, elements)


def assembled(
    stored: Stored, atoms: Atoms, nsc: list[int], elements: Callable[[Stored], Iterable[Elements]]
) -> "sisl.Hamiltonian":
    """Return the sisl.Hamiltonian of atoms of a file in nsc cells, from elements in Hartree, which are asked for each spin."""
    sisl = load_sisl()
    species = {z: sisl.Atom(z, _orbitals(sisl, stored, z)) for z in np.unique(atoms.numbers).tolist()}
    boundaries = ["periodic" if periodic else "open" for periodic in atoms.pbc]
    lattice = sisl.Lattice(np.asarray(atoms.cell), nsc=nsc, boundary_condition=boundaries)
    geometry = sisl.Geometry(atoms.positions, [species[z] for z in atoms.numbers.tolist()], lattice)
    signs, of_spins = _signs(stored, atoms.numbers), []
    for channel in stored.channels:
        H, S = _matrices(elements(channel), lattice, signs)
        H.data = hartree_to_ev(H.data)
        of_spins.append(H)
    return sisl.Hamiltonian.fromsp(geometry, of_spins[0] if len(of_spins) == 1 else of_spins, S=S)


def _matrices(elements: Iterable[Elements], lattice: "sisl.Lattice", signs: np.ndarray) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return H of one spin and S with the columns of all cells of the lattice and Siesta's signs, without their zeros."""
    n = len(signs)
    H, S = (sp.csr_matrix((n, n * lattice.n_s)) for _ in NAMES)
    for cells, row, column, hamiltonian, overlap in elements:
        for R, i, j, x in split_by_cell(cells, row, column, hamiltonian, n):
            H += sp.csr_matrix((x * signs[i] * signs[j], (i, j + n * int(lattice.sc_index(R)))), shape=H.shape)
        for R, i, j, x in split_by_cell(cells, row, column, overlap, n):
            S += sp.csr_matrix((x * signs[i] * signs[j], (i, j + n * int(lattice.sc_index(R)))), shape=S.shape)
    return H, S


def _orbitals(sisl: ModuleType, stored: Stored, number: int) -> list["sisl.AtomicOrbital"]:
    """Return the orbitals of an element with l, m, zeta, which counts its shells of one l, and their radius.

    n is the lowest that l allows, because the true one is not known. The radius is half of the longest distance over which the
    element has a block, so that those that sisl takes for neighbours, nearer than their radii together, include all pairs.
    """
    of_element = (stored.atoms.numbers[stored.pairs[:, :2]] == number).any(1)
    radius, shells = stored.pairs.distances[of_element].max() / 2 + ROUNDING_ANGSTROM, stored.basis[number].l
    result = []
    for shell, l in enumerate(shells):
        zeta = shells[: shell + 1].count(l)
        result += [sisl.AtomicOrbital(n=l + 1, l=l, m=m, zeta=zeta, R=radius) for m in range(-l, l + 1)]
    return result


def _signs(stored: Stored, numbers: np.ndarray) -> np.ndarray:
    """Return (-1)^m of every orbital."""
    of_element = {z: np.concatenate([(-1.0) ** np.arange(-l, l + 1) for l in element.l]) for z, element in stored.basis.items()}
    return np.concatenate([of_element[z] for z in numbers.tolist()])


def write(stored: Stored, out: str | Path, suffix: str | None = None) -> list[str]:
    """Write the file `out` through sisl, and return lines that say what was written.

    suffix: ".nc" or ".TSHS", by default that of `out`. The Fermi level goes into netCDF; sisl writes none into TSHS, so it
    stands in NAME.energies.json beside the file, with the band edges. Raises ValueError if the suffix is another one, if sisl
    takes the name for a file of another kind, such as results of TBtrans (NAME.TBT.nc), or if sisl is not installed.
    """
    suffix, sisl = suffix or Path(out).suffix, load_sisl()
    if suffix not in SUFFIXES.values():
        raise ValueError(f"{out}: suffix is {suffix!r}, expected .nc (netCDF, which TBtrans reads) or .TSHS.")
    out, H = Path(out), hamiltonian(stored)
    check_name(sisl, out, suffix)
    with together(out.parent, last=out.name) as folder:
        write_matrix(sisl, H, folder / f"hamiltonian{suffix}", stored)
        (folder / f"hamiltonian{suffix}").replace(folder / out.name)  # `out` may have any suffix
        write_energies(folder / out.with_suffix(".energies.json").name, stored)
    return [f"{H.geometry.na} atoms, {H.geometry.no} orbitals, cells {H.geometry.nsc.tolist()}, eV"]


def check_name(sisl: ModuleType, out: Path, suffix: str) -> None:
    """Raise ValueError if sisl, which tells files by the ends of their names, would read `out` as another kind of file."""
    if not out.suffix:  # sisl knows no such name
        return
    try:
        found, expected = sisl.get_sile_class(out.name), sisl.get_sile_class(f"hamiltonian{suffix}")
    except NotImplementedError:  # nor this one
        return
    if found is not expected:
        raise ValueError(
            f"{out}: sisl and the tools on it take a file of this name for {found.__name__}, expected a name for which they "
            f"take {expected.__name__}, such as {out.name.split('.')[0]}{suffix}."
        )


def write_matrix(sisl: ModuleType, H: "sisl.Hamiltonian", path: Path, stored: Stored) -> None:
    """Write H and S to a file of which sisl knows the suffix; OSError if it does not read back, as on a full disk."""
    with chdir(path.parent):  # its Fortran takes names of ASCII alone
        try:
            sisl.get_sile(path.name, "w").write_hamiltonian(H, Ef=stored.energies_ev().get("fermi_level", 0.0))
            # the Fortran says nothing of a full disk
            whole = sisl.get_sile(path.name).read_hamiltonian().nnz == H.nnz
        except (RuntimeError, OSError, sisl.SislError):
            whole = False
    if not whole:
        raise OSError(f"{path}: what sisl wrote does not read back. Is the disk full?")
