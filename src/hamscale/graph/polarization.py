"""Compute the electrostatics of polarizable ions: the potential at an atom due to atoms beyond any cutoff.

The atoms carry Gaussian charge distributions (width WIDTH_ANGSTROM), with charge q_b on an atom of element b. Their field
induces dipoles at the atoms, and the potential and field of the dipoles follow in the same way:

    phi_i = sum_k w_k S_k exp(i k r_i),  w_k = 4 pi / (V k^2) exp(-k^2 width^2 / 2),  S_k = sum_j q_j exp(-i k r_j)
    E = -grad phi;    of dipoles E_j at the atoms j of element a:  S^a_k = sum_{j in a} (-i k . E_j) exp(-i k r_j)

Only charges that make the structure neutral are allowed (`neutral_charges`). The charges of one element alone, in a
neutralising background, have a potential that grows without bound with the wavelength of a displacement, as 1 / k, which
does not occur in a solid. A crystal of one element has no neutral charge distribution at all. The size of the charges and
the screening by dipoles are coefficients that a fit determines. The difference to the potential of a point charge, erfc(r)
/ r, is short-ranged and is represented by a sum over near neighbours.

As in every Ewald sum, the waves are those of wider Gaussians (SPLIT_ANGSTROM), and the difference to the Gaussians of
WIDTH_ANGSTROM is summed over the atoms near by. There are 45 times fewer waves than without it. The number of waves follows
the volume of the cell; where most of that is vacuum, as around a molecule in a periodic box, the Gaussians are made so much
wider that it follows the number of atoms (`_split_angstrom`), which changes no result. The sums over k are non-uniform
Fourier transforms, which cost N log N in the number of atoms. A rank makes those of all atoms, whose number is small, and
the sums near by for its own atoms alone; the fields that induce dipoles are put together from all ranks.

A slab or a wire has no images along its open directions. Its waves are those of a cell of their own, and the Coulomb
interaction 1 / r, of which w_k are the waves, ends at a distance R, half of the open cell vectors, so that images are not felt.
With q and p the lengths of the components of k along the periodic and the open directions, w_k has the factor

    slab   1 - exp(-q R) cos(p R)                                      interaction up to the height R
    wire   1 + p R J_1(p R) K_0(q R) - q R J_0(p R) K_1(q R)           interaction up to the distance R across the wire
           1 - J_0(p R) where q = 0, which sets the potential of a charged line to zero at R: a neutral wire feels no difference

R is as large as the atoms and their Gaussians need, so the sums are exact.
References: P. P. Ewald, Ann. Phys. 369, 253 (1921); B. G. Dick, A. W. Overhauser, Phys. Rev. 112, 90 (1958) for the ions;
C. A. Rozzi et al., Phys. Rev. B 73, 205119 (2006) for slabs and wires;
A. H. Barnett, J. F. Magland, L. af Klinteberg, SIAM J. Sci. Comput. 41, C479 (2019) for the transforms (finufft).
"""

from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement

import finufft
import numpy as np
import scipy.sparse as sp
from ase import Atoms
from scipy.linalg import null_space
from scipy.special import erf, j0, j1, k0, k1

from ..structures import with_vacuum
from ..units import angstrom_to_bohr
from .neighbours import Neighbourhood

WIDTH_ANGSTROM = 0.7
SPLIT_ANGSTROM = 2.5  # the least; wider where there would be more waves than the two numbers below allow
FEWEST_WAVES, WAVES_PER_ATOM = 8192, 1000  # solids have 5 to 30 waves per atom
REACH = 6.5  # largest |k| times the width, and largest distance over it: weights below exp(-21) are left out
ACCURACY = 1e-10
FROM_XYZ = [1, 2, 0]  # takes (x, y, z) into the order of L = 1: y, z, x


def neutral_charges(counts: np.ndarray) -> np.ndarray:
    """Find the charges of the elements that make every structure neutral.

    counts (S, n): number of atoms of each element in each structure.
    Returns orthonormal columns q (n, m) with counts q = 0. m is 0 if there are none, as in a crystal of one element.
    """
    return null_space(np.unique(counts, axis=0).astype(float))


def potential_count(n: int, m: int) -> int:
    """Return the number of potentials of m charge distributions over n elements.

    These are the potentials of the distributions, and those of the dipoles of each element in each field.
    """
    return m + n * m


def potentials(
    atoms: Atoms,
    elements: list[int],
    charges: np.ndarray,
    owned: np.ndarray | None = None,
    gather: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the potentials and fields at some atoms, of m charge distributions over n elements, in atomic units.

    charges (n, m): the charge of each element in each distribution.
    owned (O,): these atoms, ascending; all atoms by default.
    gather: function that returns the fields of charges at all atoms, (A, 3, m), from those at the owned atoms, (O, 3, m), by
    asking other ranks. Without it they are computed here, since the dipoles of all atoms are felt.
    Returns the potentials (O, m + n m): phi_f of every distribution, then that of the dipoles of each element a in each
    field E_f; the squares E_f . E_g with f <= g, (O, m (m+1) / 2); and the fields (O, 3, m + n m), with components ordered
    as L = 1 and columns in the order of the potentials.
    An element that the structure lacks contributes zero.
    """
    m, owned = charges.shape[1], np.arange(len(atoms)) if owned is None else owned
    if not m:
        return np.empty((len(owned), 0)), np.empty((len(owned), 0)), np.empty((len(owned), 3, 0))
    sums = _Sums(atoms, elements, owned)
    phi, fields = sums.of_charges(charges)
    if gather is not None:
        everywhere = gather(fields)
    elif len(owned) == len(atoms):
        everywhere = fields
    else:
        everywhere = _Sums(atoms, elements, np.arange(len(atoms))).of_charges(charges)[1]
    induced, of_dipoles = sums.of_dipoles(everywhere)
    squares = [(fields[:, :, f] * fields[:, :, g]).sum(1) for f, g in combinations_with_replacement(range(m), 2)]
    return (
        np.concatenate([phi, induced], 1),
        np.stack(squares, 1),
        np.concatenate([fields, of_dipoles], 2)[:, FROM_XYZ],
    )


class AtomicCharges:
    """Potentials of charges on the atoms of a periodic structure, which are computed again and again.

    V_i = sum_j,R q_j erf(r / 2^0.5 w) / r, r = |r_j + R - r_i|, w = WIDTH_ANGSTROM, with j = i, R = 0 and, if the charges do
    not add up to zero, in a neutralising background. The sums over the atoms near by are made once.

    felt = AtomicCharges(atoms)
    felt(charges)  # (A,), Hartree per elementary charge
    """

    def __init__(self, atoms: Atoms) -> None:
        self.sums = _Sums(atoms, [], np.arange(len(atoms)))
        self.near = sp.csr_matrix((len(atoms), len(atoms)))
        for pairs in self.sums.near.tables(onsite=True):
            values = _short_range(np.linalg.norm(angstrom_to_bohr(pairs.vectors), axis=1), self.sums.split)[0]
            self.near += sp.csr_matrix((values, (pairs[:, 0], pairs[:, 1])), self.near.shape)  # images are added up

    def __call__(self, charges: np.ndarray) -> np.ndarray:
        return self.sums.waves.potential(charges) + self.near @ charges - self.sums.mean * charges.sum()


class _Sums:
    """Potentials and fields at some atoms, due to all atoms and their images: a sum over waves and one over near atoms."""

    def __init__(self, atoms: Atoms, elements: list[int], owned: np.ndarray) -> None:
        self.atoms, self.owned = atoms, owned
        self.split = _split_angstrom(atoms)
        self.waves = _Waves(atoms, self.split, owned)
        self.near = Neighbourhood(atoms, REACH * self.split, owned)
        self.mean = 0.0  # of the near potentials of a charge, which the sum over waves, that has none of length zero, lacks
        if atoms.pbc.all():
            volume = angstrom_to_bohr(angstrom_to_bohr(angstrom_to_bohr(atoms.get_volume())))
            widths = angstrom_to_bohr(self.split) ** 2 - angstrom_to_bohr(WIDTH_ANGSTROM) ** 2
            self.mean = 2 * np.pi / volume * widths
        self.of = [(atoms.numbers == z).astype(float) for z in elements]
        self.kind = np.full(len(atoms), len(elements))
        for kind, z in enumerate(elements):
            self.kind[atoms.numbers == z] = kind

    def of_charges(self, charges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum over charges (n, m) of the elements: potentials (O, m) and fields (O, 3, m)."""
        of_atoms = [sum(q * mask for q, mask in zip(column, self.of)) for column in charges.T]
        phi, fields = (np.stack(parts, -1) for parts in zip(*map(self.waves.of_charges, of_atoms)))
        phi -= self.mean * np.array([q.sum() for q in of_atoms])
        for rows, _, vectors, (h, slope, _), add in self._near_atoms():
            phi[rows] += add(h) @ charges
            fields[rows] += np.stack([add(slope * v) for v in vectors.T], 1) @ charges
        return phi, fields

    def of_dipoles(self, dipoles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum over dipoles (A, 3, m), for the dipoles of each element: potentials (O, n m) and fields (O, 3, n m)."""
        m = dipoles.shape[2]
        far = [self.waves.of_dipoles(mask[:, None] * dipoles[:, :, f]) for mask in self.of for f in range(m)]
        phi, fields = (np.stack(parts, -1) for parts in zip(*far))
        for rows, sources, vectors, (_, slope, bend), add in self._near_atoms():
            for f in range(m):
                p = dipoles[sources, :, f]
                along = (p * vectors).sum(1)
                phi[rows, f::m] += add(slope * along)
                for x in range(3):
                    fields[rows, x, f::m] += add(slope * p[:, x] + bend * along * vectors[:, x])
        return phi, fields

    def _near_atoms(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
        """Yield the near atoms of some owned atoms at a time.

        Each item is the rows of these among the owned atoms, the sources j (E,) and their vectors (E, 3) in Bohr,
        `_short_range` of their distances, and a function that sums values (E,) over the sources of each element, (rows, n).
        """
        first, n = 0, len(self.of)
        for pairs in self.near.tables(onsite=True):
            vectors, row = angstrom_to_bohr(pairs.vectors), np.searchsorted(self.owned, pairs[:, 0]) - first
            rows, index = int(row[-1]) + 1, row * (n + 1) + self.kind[pairs[:, 1]]

            def add(values: np.ndarray) -> np.ndarray:
                return np.bincount(index, values, rows * (n + 1)).reshape(rows, n + 1)[:, :n]  # noqa: B023

            values = _short_range(np.linalg.norm(vectors, axis=1), self.split)
            yield slice(first, first + rows), pairs[:, 1], vectors, values, add
            first += rows


def _short_range(r: np.ndarray, split_angstrom: float) -> np.ndarray:
    """Compute h, h'/r and (h'' - h'/r) / r^2, (3, E), of h(r) = erf(r / 2^0.5 w) / r - erf(r / 2^0.5 W) / r.

    h is the potential of a Gaussian of width w less that of one of width W, `split_angstrom`. r (E,) is in Bohr, and so are the
    results; r may be zero.
    """
    own, result = r == 0, np.zeros((3, len(r)))
    r = np.where(own, 1.0, r)
    for sign, s in ((1, angstrom_to_bohr(WIDTH_ANGSTROM)), (-1, angstrom_to_bohr(split_angstrom))):
        potential, g = erf(r / (2**0.5 * s)) / r, (2 / np.pi) ** 0.5 / s * np.exp(-(r**2) / (2 * s**2))
        values = potential, (g - potential) / r**2, (3 * potential - 3 * g - g * r**2 / s**2) / r**4
        at_zero = (2 / np.pi) ** 0.5 * np.array([1 / s, -1 / (3 * s**3), 1 / (5 * s**5)])
        result += sign * np.where(own, at_zero[:, None], values)
    return result


def _split_angstrom(atoms: Atoms) -> float:
    """Return the width of the Gaussians whose waves are summed, in Angstrom.

    It is SPLIT_ANGSTROM, or, where there would be more than WAVES_PER_ATOM of each atom and FEWEST_WAVES in all, as much more
    as leaves no more. The atoms within its reach then number no more than some hundreds for an atom, since most of the cell is
    empty, unless the atoms lie together in it.
    """
    width, most = SPLIT_ANGSTROM, max(FEWEST_WAVES, WAVES_PER_ATOM * len(atoms))
    while np.prod(2.0 * _highest(_in_cell_of_waves(atoms, width), width) + 1) > most:
        width *= 1.25
    return width


def _highest(atoms: Atoms, width_angstrom: float) -> np.ndarray:
    """Return the highest order of the waves along each cell vector up to the reach of Gaussians of a width, (3,)."""
    return np.ceil(REACH / width_angstrom * atoms.cell.lengths() / (2 * np.pi)).astype(int)


class _Waves:
    """Plane waves of a cell up to the reach of Gaussians of a width, and sums over them at some atoms, all by default."""

    def __init__(self, atoms: Atoms, width_angstrom: float = WIDTH_ANGSTROM, owned: np.ndarray | None = None) -> None:
        open_directions = None if atoms.pbc.all() else ~atoms.pbc
        atoms = _in_cell_of_waves(atoms, width_angstrom)
        cell = angstrom_to_bohr(np.asarray(atoms.cell))
        width = angstrom_to_bohr(width_angstrom)
        reach = REACH / width
        self.points = [np.ascontiguousarray(2 * np.pi * x) for x in (atoms.get_scaled_positions() - 0.5).T]
        self.places = self.points if owned is None else [np.ascontiguousarray(x[owned]) for x in self.points]
        highest = _highest(atoms, width_angstrom)
        self.shape = tuple(int(m) for m in 2 * highest + 1)
        reciprocal = 2 * np.pi * np.linalg.inv(cell).T
        orders = np.meshgrid(*(np.arange(-m, m + 1) for m in highest), indexing="ij", sparse=True)
        self.k = [sum(m * b for m, b in zip(orders, column)) for column in reciprocal.T]
        square = sum(k**2 for k in self.k)
        inner = (square > 0) & (square < reach**2)
        # the points are shifted by half a cell in both transforms, so that the shift cancels
        self.weight = np.zeros(self.shape)
        self.weight[inner] = 4 * np.pi / abs(np.linalg.det(cell)) * np.exp(-square[inner] * width**2 / 2) / square[inner]
        if open_directions is not None:
            self.weight[inner] *= _cut_off(np.stack(np.broadcast_arrays(*self.k), -1)[inner], cell, open_directions)

    def of_charges(self, charges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._felt(self._structure_factor(charges))

    def potential(self, charges: np.ndarray) -> np.ndarray:
        """Compute the potential of charges (A,) alone, (O,)."""
        return self._there(self.weight * self._structure_factor(charges))

    def of_dipoles(self, dipoles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._felt(sum(-1j * k * self._structure_factor(p) for k, p in zip(self.k, dipoles.T)))

    def _structure_factor(self, strengths: np.ndarray) -> np.ndarray:
        # one thread: with more, the order of summation and hence the last bits of a sum would be random
        c = strengths.astype(complex)
        return finufft.nufft3d1(*self.points, c, self.shape, eps=ACCURACY, isign=-1, nthreads=1)

    def _felt(self, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute the potential (O,) and the field (O, 3) at the chosen atoms."""
        waves = self.weight * factor
        return self._there(waves), np.stack([self._there(-1j * k * waves) for k in self.k], 1)

    def _there(self, waves: np.ndarray) -> np.ndarray:
        """Sum waves at the chosen atoms, (O,)."""
        return finufft.nufft3d2(*self.places, waves, eps=ACCURACY, isign=1, nthreads=1).real


def _in_cell_of_waves(atoms: Atoms, width_angstrom: float) -> Atoms:
    """Return the atoms of a slab or a wire in a periodic cell with room for an interaction that ends; others as they are.

    Its open vectors are perpendicular to the periodic ones and to each other, and of equal length L. The interaction ends at
    L/2, beyond the farthest atom and its Gaussian, and the nearest image of that atom lies beyond L/2 too.
    """
    if atoms.pbc.all():
        return atoms
    cell, is_open = with_vacuum(atoms, 1.0).cell.array, ~atoms.pbc
    normals = cell[is_open] / np.linalg.norm(cell[is_open], axis=1, keepdims=True)
    extent = np.linalg.norm(np.ptp(atoms.positions @ normals.T, axis=0))
    cell[is_open] = 2 * (extent + REACH * width_angstrom) * normals
    return Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=True)


def _cut_off(k: np.ndarray, cell: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """Compute the factor of the weight of each wave (N, 3) that ends the interaction at half of the open cell vectors, (N,)."""
    lengths = np.linalg.norm(cell[is_open], axis=1)
    across = k @ (cell[is_open] / lengths[:, None]).T
    along = k @ np.linalg.qr(cell[~is_open].T)[0]
    radius, q, p = lengths[0] / 2, np.linalg.norm(along, axis=1), np.linalg.norm(across, axis=1)
    if len(lengths) == 1:
        return 1 - np.exp(-q * radius) * np.cos(p * radius)
    factor, waves = 1 - j0(p * radius), q > 1e-8  # the shortest wave of any cell is longer
    q, p = q[waves] * radius, p[waves] * radius
    factor[waves] = 1 + p * j1(p) * k0(q) - q * j0(p) * k1(q)
    return factor
