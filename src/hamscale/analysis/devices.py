"""Cut an open device out of a periodic structure: its leads, and blocks between them of which only neighbours couple.

A lead is the block at an end, repeated for ever. The coupling of a lead's blocks is found in the structure, where the block at
the end stands beside an image of itself: across the end of the cell, if the first and the last block are images of each other,
or else inside, if the block next to it is one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from ..operators import Operators, OperatorsFile
from ..pairs import PairList
from ..structures import as_drawn, given_cells, images_between
from ..units import hartree_to_mev

END_ANGSTROM, END_MEV = 0.05, 25.0  # largest distance of an atom from its image, median difference of onsite energies
PIECE = 1 << 20  # values of H and of S that are read at a time

Source = Operators | OperatorsFile  # matrices in memory, or in a file that is read a piece at a time


@dataclass(frozen=True)
class Device:
    """Atoms of a structure in blocks along an axis, the first and the last of which are the leads.

    cells (A, 3): whole cells by which atoms are moved from where the operators have them. across: the first and the last
    block are images of each other, and couple across the end of the cell as blocks of a lead do; if not, the two blocks at
    either end do. distance_angstrom: of the atom that is farthest from its image.
    """

    axis: int
    cells: np.ndarray
    blocks: list[np.ndarray]
    across: bool
    distance_angstrom: float


def cut(atoms: Atoms, pairs: PairList, axis: int, leads: tuple[int, int]) -> Device:
    """Cut a structure into a device, whose leads are its first and its last atoms along an axis: leads, numbers of atoms.

    The device begins at the corner of the cell of the user's file. Between the leads it has the smallest blocks of which only
    neighbours couple. Raises ValueError if an end does not repeat, or too few atoms are between the leads.
    """
    cells, place = as_drawn(atoms, given_cells(atoms), axis)
    order, (left, right) = np.argsort(place, kind="stable"), leads
    if min(leads) < 1 or left + right >= len(atoms):
        raise ValueError(
            f"leads of {left} and {right} atoms, expected one or more each, and others of the {len(atoms)} between."
        )
    inner = order[left:-right]
    between, distance = _images(atoms, cells, axis, order[:left], order[-right:])
    if across := distance <= END_ANGSTROM:
        begin, end = [order[:left]], [between]
    else:
        second, of_left = _images(atoms, cells, axis, order[:left], order[left : 2 * left])
        last_but_one, of_right = _images(atoms, cells, axis, order[-right:], order[-2 * right : -right])
        if len(inner) < left + right or not max(of_left, of_right) <= END_ANGSTROM:
            raise ValueError(
                f"leads of {left} and {right} atoms do not repeat: the last block {_told(distance)} from the first one, the "
                f"second {_told(of_left)} from the first, the last but one {_told(of_right)} from the last; expected "
                f"{END_ANGSTROM:g} A at most of the first, or of both others. A lead is the number of atoms of one block that "
                "repeats at an end."
            )
        distance = max(of_left, of_right)
        begin, inner, end = [order[:left], second], inner[left : len(inner) - right], [last_but_one, order[-right:]]
    return Device(axis, cells, [*begin, *_between(pairs, axis, cells, begin, inner, end), *end], across, distance)


def _told(distance: float) -> str:
    return f"is {distance:.3f} A" if np.isfinite(distance) else "has other atoms, infinitely far"


def _images(atoms: Atoms, cells: np.ndarray, axis: int, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the image of each atom of a block in another one, moved along the axis, and the distance of the worst.

    Returns `theirs` in the order of `ours`, in cells across the axis that make the two alike: `cells` is changed for that. The
    distance is infinite if the blocks have different atoms; nothing is then changed.
    """
    fractions = atoms.cell.scaled_positions(atoms.positions) + cells
    apart = fractions[theirs] - fractions[ours][:, None]
    apart -= np.eye(3)[axis] * (fractions[theirs].mean(0) - fractions[ours].mean(0))
    found = images_between(atoms, ours, theirs, apart, axis)
    if found is None:
        return theirs, np.inf
    image, moved, distance = found
    cells[theirs[image]] -= moved
    return theirs[image], distance


def _between(
    pairs: PairList, axis: int, cells: np.ndarray, begin: list[np.ndarray], inner: np.ndarray, end: list[np.ndarray]
) -> list[np.ndarray]:
    """Cut the atoms between the leads into the smallest blocks of which only neighbours couple."""
    order = np.concatenate([*begin, inner, *end])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    i, j = pairs[:, 0], pairs[:, 1]
    inside = pairs[:, 2 + axis] + cells[i, axis] == cells[j, axis]
    farthest = np.arange(len(order))  # the last atom that one of the atoms up to each couples with
    np.maximum.at(farthest, rank[i[inside]], rank[j[inside]])
    farthest = np.maximum.accumulate(farthest)
    first = sum(map(len, begin))
    stop, bounds = first + len(inner), [first]
    reach = int(farthest[first - 1]) + 1  # the next block holds all atoms up to here
    while bounds[-1] < stop:
        if reach > stop:  # what is left couples with the last block and with a lead: one block
            bounds = [*bounds[:-1], stop] if len(bounds) > 1 else []
        else:
            bounds.append(max(reach, bounds[-1] + 1))
        if not bounds:
            raise ValueError(
                f"the leads, of {len(begin[0])} and {len(end[-1])} atoms, couple with each other past the {len(inner)} atoms "
                "between them. Make the device longer."
            )
        reach = int(farthest[bounds[-1] - 1]) + 1
    return np.split(order[first:stop], np.array(bounds[1:-1], np.int64) - first)


@dataclass(frozen=True)
class Chain:
    """H and S of a device at a k across its axis: dense blocks, and couplings of each with the next one.

    sizes (N,): orbitals of each block; the last one couples with the first one of the next cell. matrices: all elements of H
    (Hartree) and S, one after another; those of block I begin at starts[I, 0], those of its coupling at starts[I, 1].
    beyond: of H past neighbours, which is left out, the largest element (Hartree), and the share of the sum of all |H|.
    """

    sizes: np.ndarray
    starts: np.ndarray
    matrices: tuple[np.ndarray, np.ndarray]
    across: bool
    beyond: tuple[float, float] = (0.0, 0.0)

    def block(self, I: int, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return H and S of block I (step 0), or of its coupling with the next block (step 1)."""
        shape = int(self.sizes[I]), int(self.sizes[(I + step) % len(self.sizes)])
        begin = self.starts[I, step]
        H, S = (matrix[begin : begin + shape[0] * shape[1]].reshape(shape) for matrix in self.matrices)
        return H, S

    def lead(self, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return H and S of a block of the left (0) or the right lead (1), and those of its coupling with the next block."""
        last = len(self.sizes) - 1
        coupling = last if self.across else (0, last - 1)[side]
        return *self.block((0, last)[side]), *self.block(coupling, 1)

    def end_mismatch(self) -> tuple[float, float]:
        """Return the median and the largest difference (Hartree) of H of the leads from that of their images.

        The median is of onsite energies, which atoms beside the scattering region do not decide.
        """
        last = len(self.sizes) - 1
        found = [(0, last)] if self.across else [(0, 1), (last, last - 1)]
        differences = [np.abs(self.block(a)[0] - self.block(b)[0]) for a, b in found]
        return max(float(np.median(np.diag(d))) for d in differences), max(float(d.max()) for d in differences)


def assemble(source: Source, device: Device, k: np.ndarray, spin: int = 0) -> Chain:
    """Add up H and S of the blocks of a device at a k (3,) across its axis, with a piece of the source in memory at a time.

    Raises ValueError if the onsite energies of an end do not repeat.
    """
    orbitals, N, axis = source.basis.n_orbitals(source.atoms.numbers), len(device.blocks), device.axis
    block, first = np.empty(len(orbitals), np.int64), np.empty(len(orbitals), np.int64)
    for I, atoms in enumerate(device.blocks):
        block[atoms], first[atoms] = I, np.cumsum(orbitals[atoms]) - orbitals[atoms]
    sizes = np.bincount(block, orbitals).astype(np.int64)
    counts = (sizes[:, None] * np.stack([sizes, np.roll(sizes, -1)], 1)).ravel()
    chain = Chain(
        sizes,
        (np.cumsum(counts) - counts).reshape(N, 2),
        (np.zeros(counts.sum(), complex), np.zeros(counts.sum(), complex)),
        device.across,
    )
    largest, left_out, everything = 0.0, 0.0, 0.0
    for span, hamiltonian, overlap in _pieces(source, spin):
        i, j = source.pairs[span, :2].T
        R = source.pairs[span, 2:] + device.cells[i] - device.cells[j]
        step = block[j] + R[:, axis] * N - block[i]
        # between leads of their own kinds nothing couples across the end of the cell
        inside = np.full(len(i), True) if device.across else R[:, axis] == 0
        number, a, b = _elements(orbitals[i], orbitals[j])
        size, near = np.abs(hamiltonian), inside & (step >= 0) & (step <= 1)
        far = size[(inside & (np.abs(step) > 1))[number]]
        largest, left_out = max(largest, far.max(initial=0.0)), left_out + far.sum()
        everything += size[inside[number]].sum()
        width = sizes[(block[i] + step) % N]
        begin = chain.starts[block[i], np.clip(step, 0, 1)] + first[i] * width + first[j]
        phase = np.exp(2j * np.pi * (R * (np.arange(3) != axis)) @ k)
        kept = near[number]
        number, place = number[kept], (begin[number] + a * width[number] + b)[kept]
        for matrix, values in zip(chain.matrices, (hamiltonian, overlap)):
            np.add.at(matrix, place, values[kept] * phase[number])
    chain = replace(chain, beyond=(float(largest), float(left_out / everything)))
    median, most = (hartree_to_mev(difference) for difference in chain.end_mismatch())
    if median > END_MEV:
        raise ValueError(
            f"the leads do not repeat: onsite energies of a block at an end differ from those of its image by {median:.1f} meV "
            f"in the median (elements of H by {most:.0f} at most), expected {END_MEV:g} at most. Are the ends long enough?"
        )
    return chain


def _elements(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each element of matrices (rows[m], columns[m]), one after another: its m, its row and its column."""
    sizes = rows * columns
    number = np.repeat(np.arange(len(sizes)), sizes)
    a, b = np.divmod(np.arange(len(number)) - np.repeat(np.cumsum(sizes) - sizes, sizes), columns[number])
    return number, a, b


def _pieces(source: Source, spin: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (slice of the pairs, H of a spin, S) with at most PIECE values or one pair at a time."""
    begin, offsets = 0, source.offsets
    while begin < len(source.pairs):
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + PIECE, "right")) - 1)
        values = slice(int(offsets[begin]), int(offsets[end]))
        if isinstance(source, Operators):
            hamiltonian, overlap = source.hamiltonian[..., values], source.overlap[values]
        else:
            hamiltonian, overlap = source.read("hamiltonian", values), source.read("overlap", values)
        yield slice(begin, end), np.atleast_2d(hamiltonian)[spin], overlap
        begin = end
