"""Read Gaussian basis sets: shells per element from CP2K's own basis and potential files, and the orbital order.

Orbitals of an atom are ordered by set, then l, then shell, then m = -l..l, with real spherical harmonics that carry no
Condon-Shortley sign: p = (y, z, x), d = (xy, yz, 3z2-r2, xz, x2-y2). See docs/conventions.md.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from cp2k_input_tools.basissets.cp2k import BasisSetData
from cp2k_input_tools.pseudopotentials.cp2k import PseudopotentialData

from .config import Material
from .units import bohr_to_angstrom

SHELLS_ONLY = "l ="
HIGHEST_L = 6
LARGEST_FILE = 1 << 26  # bytes; the largest of CP2K's own has 3 MB

# a line of anything but numbers, behind which a table of basis sets may name shells (6s 7s), or a title with the number of
# core corrections
OTHER_LINE = re.compile(r"^(?!(?:[-+.0-9eE \t\r]*(?:[ \t]+\d[spdfgh])*|[ \t]*NLCC[ \t]+\d+)[ \t\r]*$).*$", re.M)
Entry = TypeVar("Entry", BasisSetData, PseudopotentialData)


def shells_only(l: list[int]) -> str:
    """Return the text of a basis of which only the angular momenta of the shells are known."""
    return " ".join([SHELLS_ONLY, *map(str, l)])


@dataclass(frozen=True)
class ElementBasis:
    """The contracted Gaussian shells of one element.

    text: the basis set in CP2K's own format, from which everything else follows, so that a file that holds it needs no
    CP2K. For data of another code it is the text of `shells_only`: the angular momenta without radial functions.
    potential, valence: name of the pseudopotential, and the number of valence electrons it leaves, zero if that is not
    known.
    """

    element: str
    name: str
    text: str
    potential: str
    valence: int

    @property
    def has_functions(self) -> bool:
        """Tell whether the basis has radial functions, from which S of any structure follows."""
        return not self.text.startswith(SHELLS_ONLY)

    @cached_property
    def shells(self) -> tuple[tuple[int, np.ndarray, np.ndarray], ...]:
        """Return (l, exponents in 1/Bohr^2, contraction coefficients) of each shell, in CP2K's order.

        Raises ValueError for a basis without radial functions, and as `parse_basis_set` does.
        """
        if not self.has_functions:
            raise ValueError(
                f"basis {self.name} of {self.element} has shells {list(self.l)} but no radial functions, expected a basis set "
                "of CP2K: S of a new structure cannot be computed from it. Operators that hold S can be trained on and "
                "exported."
            )
        shells = []
        for block in parse_basis_set(self.text.splitlines()).blocks:
            table = np.array(block.coefficients, dtype=float)  # (exponents, 1 + shells)
            column = 1
            for l, count in block.l:
                for _ in range(count):
                    shells.append((l, table[:, 0], table[:, column]))
                    column += 1
        return tuple(shells)

    @cached_property
    def l(self) -> tuple[int, ...]:  # noqa: E743
        """Return the angular momentum of each shell. Raises ValueError if the text says none."""
        if not self.has_functions:
            words = self.text.removeprefix(SHELLS_ONLY).split()
            if not words or not all(re.fullmatch(rf"[0-{HIGHEST_L}]", word) for word in words):
                raise ValueError(f"basis of {self.element} has the shells {self.text!r:.80}, expected l of 0 to {HIGHEST_L}.")
            return tuple(int(l) for l in words)
        return tuple(shell[0] for shell in self.shells)

    @cached_property
    def n_orbitals(self) -> int:
        return sum(2 * l + 1 for l in self.l)

    @cached_property
    def shell_slices(self) -> tuple[slice, ...]:
        """Return the slice of each shell's 2l+1 orbitals among those of the atom."""
        ends = np.cumsum([2 * l + 1 for l in self.l])
        return tuple(slice(int(end) - 2 * l - 1, int(end)) for l, end in zip(self.l, ends))

    @cached_property
    def normalised(self) -> tuple[tuple[int, np.ndarray, np.ndarray], ...]:
        """Return (l, exponents a, coefficients c) of each shell, as CP2K prints them: sum c x^l exp(-a r^2) has norm one."""
        result = []
        for l, exponents, coefficients in self.shells:
            # primitives N r^l exp(-a r^2) of norm one over the angular parts x^l y^0 z^0, as CP2K scales them
            c = coefficients * 2.0**l * (2 / np.pi) ** 0.75 * exponents ** (0.5 * l + 0.75)
            total = np.add.outer(exponents, exponents)
            norm = np.outer(c, c) * (np.pi / total) ** 1.5 * prod(range(1, 2 * l, 2)) / (2 * total) ** l
            result.append((l, exponents, c / np.sqrt(norm.sum())))
        return tuple(result)

    def radius_angstrom(self, threshold: float) -> float:
        """Compute the distance beyond which |c r^l exp(-a r^2)| of every primitive is below a threshold, in Angstrom.

        c is the coefficient in the normalised contracted orbital, r in Bohr: CP2K's radius of an orbital at EPS_PGF_ORB.
        """
        r, largest = np.arange(0.0, 60.0, 0.01), 0.0
        for l, exponents, coefficients in self.normalised:
            for a, of_primitive in zip(exponents, coefficients):
                above = np.flatnonzero(np.abs(of_primitive) * r**l * np.exp(-a * r**2) > threshold)
                largest = max(largest, r[above[-1]] if len(above) else 0.0)
        return bohr_to_angstrom(largest)

    @property
    def number(self) -> int:
        return atomic_numbers[self.element]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Basis(dict[int, ElementBasis]):
    """Mapping from atomic number to ElementBasis, for all elements of a material.

    basis[8].n_orbitals, basis.n_orbitals(atoms.numbers)  # of oxygen; of every atom (A,)
    """

    def __init__(self, elements: Iterable[ElementBasis]) -> None:
        super().__init__(sorted((element.number, element) for element in elements))

    def __missing__(self, number: int) -> NoReturn:
        known = ", ".join(element.element for element in self.values())
        raise ValueError(f"no basis for element {chemical_symbols[number]}; this basis holds {known}.")

    def n_orbitals(self, numbers: Iterable[int]) -> np.ndarray:
        """Return the number of orbitals per atom, (A,)."""
        return np.array([self[int(z)].n_orbitals for z in numbers], dtype=np.int64)

    def n_electrons(self, numbers: Iterable[int]) -> int:
        """Return the number of valence electrons of a neutral structure.

        Raises ValueError if the number of an element is not known.
        """
        if unknown := sorted({self[int(z)].element for z in numbers if not self[int(z)].valence}):
            raise ValueError(f"valence electrons of {', '.join(unknown)} are not known: its basis was imported without them.")
        return sum(self[int(z)].valence for z in numbers)

    @property
    def lmax(self) -> int:
        return max(max(element.l) for element in self.values())

    def difference(self, other: "Basis") -> str:
        """Describe in words how two bases differ for the elements of both; empty if they do not differ."""
        return "; ".join(
            f"{self[z].element}: {self[z].name} ({self[z].sha256[:8]}) against {other[z].name} ({other[z].sha256[:8]})"
            for z in sorted(self.keys() & other.keys())
            if self[z].text != other[z].text
        )


CP2K_BINARIES = ("cp2k.psmp", "cp2k.popt", "cp2k.ssmp", "cp2k")


@lru_cache
def cp2k_data_directory() -> Path:
    """Find the directory of CP2K's basis and potential files.

    It is $CP2K_DATA_DIR if that is set, else the directory with which the binary was built.
    Raises ValueError if neither is found.
    """
    if directory := os.environ.get("CP2K_DATA_DIR"):
        return Path(directory)
    for name in CP2K_BINARIES:
        if binary := shutil.which(name):
            text = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
            # CP2K breaks the list of flags at column 72, also within a word, and indents the next line
            match = re.search(r'__DATA_DIR="([^"]+)"', re.sub(r"\n\s+", "", text))
            for folder in ([Path(match[1])] if match else []) + [Path(binary).resolve().parents[1] / "share/cp2k"]:
                if folder.is_dir():
                    return folder
    raise ValueError(
        "CP2K's basis and potential files were not found: CP2K_DATA_DIR is not set and no cp2k.psmp on PATH names its "
        "folder. Install CP2K (Debian: apt-get install cp2k) or set CP2K_DATA_DIR."
    )


def find_data_file(name: str) -> Path:
    """Find a basis or potential file by path, or by name in CP2K's data directory.

    Raises ValueError if there is no such file.
    """
    for path in (Path(name), cp2k_data_directory() / name):
        if path.is_file():
            return path
    raise ValueError(f"{name}: no such file here or in {cp2k_data_directory()}. Expected a basis or potential file of CP2K.")


def _entries(path: Path, element: str) -> list[tuple[list[str], list[str]]]:
    """Return (names, lines) of all entries of one element, not parsed: files contain kinds of entries that nobody here knows.

    An entry ends before the next line that is not of numbers.
    Raises ValueError if the file is no text.
    """
    content = path.read_bytes()
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path}: {len(content)} bytes, expected a file of at most {LARGEST_FILE}.")
    if b"\0" in content:
        raise ValueError(f"{path}: a binary file, expected text in CP2K's format.")
    text = re.sub(r"[#!].*", "", content.decode(errors="replace"))
    start = re.compile(rf"^[ \t]*{element}[ \t]+\S*[A-Za-z]\S*.*$", re.M)
    entries = []
    for match in start.finditer(text):
        following = OTHER_LINE.search(text, match.end())
        lines = text[match.start() : following.start() if following else None].splitlines()
        entries.append((match[0].split()[1:], [line.strip() for line in lines if line.strip()]))
    return entries


def _parsed(parser: type[Entry], lines: list[str]) -> Entry:
    """Parse an entry. Raises ValueError, in one line, for what is none; the parsers raise exceptions of many types."""
    try:
        entry = parser.from_lines(lines)
    except Exception as error:
        told = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"not in CP2K's format: {told:.200}") from None
    return entry


def _is_number(number: Decimal) -> bool:
    """Tell whether a number has a size and decimals as tables of basis sets have; others would fill the memory as text."""
    return number.is_finite() and number.adjusted() < 12 and int(number.as_tuple().exponent) >= -40


def parse_basis_set(lines: list[str]) -> BasisSetData:
    """Parse a basis set in CP2K's format.

    Raises ValueError if its numbers are not as many as it says, or none of a basis set: exponents are above zero, and every
    shell has a coefficient that is not zero.
    """
    data = _parsed(BasisSetData, lines)
    if not data.blocks or len(lines) != 2 + sum(1 + len(block.coefficients) for block in data.blocks):
        raise ValueError(f"{len(lines)} lines, expected those of {len(data.blocks)} sets and no more.")
    for number, (block, head) in enumerate(zip(data.blocks, _heads(data, lines)), start=1):
        where, shells = f"set {number}", sum(count for _, count in block.l)
        counts = [count for _, count in block.l]
        if not (0 <= head[1] <= head[2] <= HIGHEST_L and len(counts) == head[2] - head[1] + 1 and min(counts) >= 0):
            raise ValueError(f"{where}: {head} is no line of n, lmin, lmax, number of exponents and of the shells of each l.")
        if not (0 < shells <= 100 and 0 < len(block.coefficients) <= 100):
            raise ValueError(f"{where}: {shells} shells of {len(block.coefficients)} exponents, expected 1 to 100 of each.")
        if any(len(row) != 1 + shells for row in block.coefficients):
            raise ValueError(f"{where}: a line without exponent and {shells} coefficients.")
        if not all(_is_number(x) for row in block.coefficients for x in row):
            raise ValueError(f"{where}: a number is not finite, too large, or of more than 40 decimals.")
        if not all(row[0] >= Decimal("1e-6") for row in block.coefficients):
            raise ValueError(f"{where}: an exponent is below 1e-6, expected it above zero.")
        if not all(any(row[1 + shell] for row in block.coefficients) for shell in range(shells)):
            raise ValueError(f"{where}: a shell whose coefficients are all zero.")
    return data


def _heads(data: BasisSetData, lines: list[str]) -> Iterator[list[int]]:
    """Yield the first four numbers of the line before the exponents of every set: n, lmin, lmax, number of exponents."""
    place = 2
    for block in data.blocks:
        yield [int(word) for word in lines[place].split()[:4]]
        place += 1 + len(block.coefficients)


def _parse_potential(element: str, lines: list[str]) -> PseudopotentialData:
    """Parse a pseudopotential. Raises ValueError if it is none, or leaves more electrons than its element has."""
    data = _parsed(PseudopotentialData, lines)
    numbers = [data.local.r, *data.local.coefficients, *(x for part in data.non_local for x in (part.r, *part.coefficients))]
    if not all(map(_is_number, numbers)) or not data.local.r > 0:
        raise ValueError("a number is not finite or too large, or the radius not above zero.")
    if not (min(data.n_el) >= 0 and 0 < sum(data.n_el) <= atomic_numbers[element]):
        raise ValueError(f"{data.n_el} valence electrons, expected 1 to {atomic_numbers[element]}.")
    return data


def read_element_basis(element: str, basis: str, potential: str, basis_file: str, potential_file: str) -> ElementBasis:
    """Look up one element in CP2K's files.

    basis, potential: any of the names given in the files, with or without the suffix -qN for the number of valence
    electrons. Without it, the potential that fits the basis set is taken.
    Raises ValueError that names what the file has instead, or what is wrong with the entry.
    """
    if element not in atomic_numbers or element == "X":
        raise ValueError(f"{element!r} is not a chemical element.")
    basis_path, potential_path = find_data_file(basis_file), find_data_file(potential_file)
    found = _entries(basis_path, element)
    sets = [lines for names, lines in found if basis in names]
    if not sets:
        names = ", ".join(names[0] for names, _ in found) or "no basis set of this element"
        raise ValueError(f"{basis_path}: element {element} has no basis set {basis}; it has {names}.")
    data = _of_file(basis_path, element, basis, sets, parse_basis_set)
    found = _entries(potential_path, element)
    wanted = {potential} | ({f"{potential}-q{data.n_el}"} if data.n_el else set())
    potentials = [lines for names, lines in found if wanted & set(names)]
    if data.n_el:
        potentials = [lines for lines in potentials if _electrons(lines) == data.n_el]
    if not potentials:
        names = ", ".join(names[0] for names, _ in found) or "no potential of this element"
        need = f" for {data.n_el} valence electrons (basis {basis})" if data.n_el else ""
        raise ValueError(f"{potential_path}: element {element} has no potential {potential}{need}; it has {names}.")
    parsed = _of_file(potential_path, element, potential, potentials[:1], lambda lines: _parse_potential(element, lines))
    text = "\n".join(line.rstrip() for line in data.cp2k_format_line_iter())
    name = next((n for n in parsed.identifiers if re.search(r"-q\d+$", n)), parsed.identifiers[0])
    return ElementBasis(element, basis, text, name, int(sum(parsed.n_el)))


def _electrons(lines: list[str]) -> int:
    """Return the number of valence electrons of an entry of a pseudopotential, 0 if its second line does not say it."""
    words = lines[1].split() if len(lines) > 1 else []
    return sum(map(int, words)) if all(re.fullmatch(r"\d{1,3}", word, re.ASCII) for word in words) else 0


def _of_file(path: Path, element: str, name: str, entries: list[list[str]], parse: Callable[[list[str]], Entry]) -> Entry:
    """Return the one entry of a name. Raises ValueError, with the file, if it is none, or if there are several."""
    try:
        first, *others = map(parse, entries)
    except ValueError as error:
        raise ValueError(f"{path}: {name} of {element}: {error}") from None
    if any(other != first for other in others):
        raise ValueError(
            f"{path}: {name} of {element} is there {1 + len(others)} times, with other numbers. Remove all but one."
        )
    return first


def material_basis(material: Material) -> Basis:
    """Build the basis of all species of a material.

    Raises one ValueError that names every species not found.
    """
    elements, errors = [], []
    for element, species in material.species.items():
        try:
            elements.append(
                read_element_basis(
                    element, species.basis, species.potential, material.dft.basis_file, material.dft.potential_file
                )
            )
        except ValueError as error:
            errors.append(f"species.{element}: {error}")
    if errors:
        raise ValueError("\n".join(errors))
    return Basis(elements)
