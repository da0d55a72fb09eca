"""Convert to sisl's Hamiltonian, and write through sisl the files that TBtrans and Siesta read: netCDF (nc) and TSHS.

Units are eV and Angstrom. sisl holds one sparse matrix of all cells, so this target alone needs memory for all elements.
Sources in github.com/zerothi/sisl: src/sisl/physics/hamiltonian.py (fromsp), src/sisl/io/siesta/. Siesta's real harmonics carry
the Condon-Shortley sign (-1)^m, those of hamscale do not (sisl/_core/orbital.py, "the choice of these real spherical harmonics
is that of Siesta").
"""

from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from ..files import together
from ..units import hartree_to_ev
from .stream import Stored, write_energies

if TYPE_CHECKING:
    import sisl

SUFFIXES = {"tbtrans": ".nc", "tshs": ".TSHS"}


def _sisl() -> ModuleType:
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
    sisl = _sisl()
    elements = {z: sisl.Atom(z, _orbitals(sisl, stored.basis[z].l)) for z in np.unique(stored.atoms.numbers).tolist()}
    nsc = 2 * np.abs(stored.pairs[:, 2:]).max(0) + 1
    boundaries = ["periodic" if periodic else "open" for periodic in stored.atoms.pbc]
    lattice = sisl.Lattice(np.asarray(stored.atoms.cell), nsc=nsc, boundary_condition=boundaries)
    geometry = sisl.Geometry(stored.atoms.positions, [elements[z] for z in stored.atoms.numbers.tolist()], lattice)
    of_spins = []
    for channel in stored.channels:
        H, S = _matrices(channel, lattice)
        H.data = hartree_to_ev(H.data)
        of_spins.append(H)
    return sisl.Hamiltonian.fromsp(geometry, of_spins[0] if len(of_spins) == 1 else of_spins, S=S)


def _matrices(stored: Stored, lattice: "sisl.Lattice") -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return H of one spin, in Hartree, and S with the columns of all cells of the lattice and Siesta's signs."""
    n = stored.n_orbitals
    matrices: dict[str, list[sp.csr_matrix]] = {"hamiltonian": [], "overlap": []}
    signs = _signs(stored)
    for rows in stored.rows():
        first, last = rows.orbitals
        for name, parts in matrices.items():
            part = sp.csr_matrix((last - first, n * lattice.n_s))
            for R, i, j, x in stored.by_cell(rows, getattr(rows, name)):
                index = (i - first, j + n * int(lattice.sc_index(R)))
                part += sp.csr_matrix((x * signs[i] * signs[j], index), shape=part.shape)
            parts.append(part)
    H, S = (sp.vstack(parts, format="csr") for parts in matrices.values())
    return H, S


def _orbitals(sisl: ModuleType, shells: tuple[int, ...]) -> list["sisl.AtomicOrbital"]:
    """Return orbitals with l, m and zeta, which counts an atom's shells of one l.

    n is the lowest that l allows, because the true one is not known.
    """
    result = []
    for shell, l in enumerate(shells):
        zeta = shells[: shell + 1].count(l)
        result += [sisl.AtomicOrbital(n=l + 1, l=l, m=m, zeta=zeta) for m in range(-l, l + 1)]
    return result


def _signs(stored: Stored) -> np.ndarray:
    """Return (-1)^m of every orbital."""
    of_element = {z: np.concatenate([(-1.0) ** np.arange(-l, l + 1) for l in element.l]) for z, element in stored.basis.items()}
    return np.concatenate([of_element[z] for z in stored.atoms.numbers.tolist()])


def write(stored: Stored, out: str | Path, suffix: str | None = None) -> list[str]:
    """Write the file `out` through sisl, and return lines that say what was written.

    suffix: ".nc" or ".TSHS", by default that of `out`. The Fermi level goes into netCDF; sisl writes none into TSHS, so it
    stands in NAME.energies.json beside the file, with the band edges. Raises ValueError if the suffix is another one or sisl is
    not installed.
    """
    suffix = suffix or Path(out).suffix
    if suffix not in SUFFIXES.values():
        raise ValueError(f"{out}: suffix is {suffix!r}, expected .nc (netCDF, which TBtrans reads) or .TSHS.")
    out, sisl, H = Path(out), _sisl(), hamiltonian(stored)
    with together(out.parent, last=out.name) as folder:
        written = folder / f"hamiltonian{suffix}"  # sisl chooses the format by the suffix, and `out` may have any
        with chdir(folder):  # its Fortran takes names of ASCII alone
            try:
                sisl.get_sile(written.name, "w").write_hamiltonian(H, Ef=stored.energies_ev().get("fermi_level", 0.0))
                # the Fortran says nothing of a full disk
                whole = sisl.get_sile(written.name).read_hamiltonian().nnz == H.nnz
            except (RuntimeError, OSError, sisl.SislError):
                whole = False
        if not whole:
            raise OSError(f"{out}: what sisl wrote does not read back. Is the disk full?")
        written.replace(folder / out.name)
        write_energies(folder / out.with_suffix(".energies.json").name, stored)
    return [f"{H.geometry.na} atoms, {H.geometry.no} orbitals, cells {H.geometry.nsc.tolist()}, eV"]
