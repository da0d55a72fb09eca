"""Read Gaussian basis sets: shells per element from CP2K's own basis and potential files, and the orbital order.

Orbitals of an atom are ordered by set, then l, then shell, then m = -l..l, with real spherical harmonics that carry no
Condon-Shortley sign: p = (y, z, x), d = (xy, yz, 3z2-r2, xz, x2-y2). See docs/conventions.md.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from cp2k_input_tools.basissets.cp2k import BasisSetData
from cp2k_input_tools.pseudopotentials.cp2k import PseudopotentialData

from .config import Material
from .units import bohr_to_angstrom

SHELLS_ONLY = "l ="


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

    @cached_property
    def shells(self) -> tuple[tuple[int, np.ndarray, np.ndarray], ...]:
        """Return (l, exponents in 1/Bohr^2, contraction coefficients) of each shell, in CP2K's order.

        Raises ValueError for a basis without radial functions.
        """
        if self.text.startswith(SHELLS_ONLY):
            raise ValueError(
                f"basis {self.name} of {self.element} has shells {list(self.l)} but no radial functions, expected a basis set "
                "of CP2K: S of a new structure cannot be computed from it. Operators that hold S can be trained on and "
                "exported."
            )
        shells = []
        for block in BasisSetData.from_lines(self.text.splitlines()).blocks:
            table = np.array(block.coefficients, dtype=float)  # (exponents, 1 + shells)
            column = 1
            for l, count in block.l:
                for _ in range(count):
                    shells.append((l, table[:, 0], table[:, column]))
                    column += 1
        return tuple(shells)

    @cached_property
    def l(self) -> tuple[int, ...]:  # noqa: E743
        """Return the angular momentum of each shell."""
        if self.text.startswith(SHELLS_ONLY):
            return tuple(int(l) for l in self.text.removeprefix(SHELLS_ONLY).split())
        return tuple(shell[0] for shell in self.shells)

    @cached_property
    def n_orbitals(self) -> int:
        return sum(2 * l + 1 for l in self.l)

    @cached_property
    def shell_slices(self) -> tuple[slice, ...]:
        """Return the slice of each shell's 2l+1 orbitals among those of the atom."""
        ends = np.cumsum([2 * l + 1 for l in self.l])
        return tuple(slice(int(end) - 2 * l - 1, int(end)) for l, end in zip(self.l, ends))

    def radius_angstrom(self, threshold: float) -> float:
        """Compute the distance beyond which |c r^l exp(-a r^2)| of every primitive is below a threshold, in Angstrom.

        c is the coefficient in the normalised contracted orbital, r in Bohr: CP2K's radius of an orbital at EPS_PGF_ORB.
        """
        r, largest = np.arange(0.0, 60.0, 0.01), 0.0
        for l, exponents, coefficients in self.shells:
            # primitives N r^l exp(-a r^2) of norm one over the angular parts x^l y^0 z^0, as CP2K scales them
            c = coefficients * 2.0**l * (2 / np.pi) ** 0.75 * exponents ** (0.5 * l + 0.75)
            total = np.add.outer(exponents, exponents)
            norm = np.outer(c, c) * (np.pi / total) ** 1.5 * prod(range(1, 2 * l, 2)) / (2 * total) ** l
            for a, of_primitive in zip(exponents, c / np.sqrt(norm.sum())):
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


def _entries(
    path: Path, element: str, parser: type[BasisSetData] | type[PseudopotentialData]
) -> Iterator[BasisSetData | PseudopotentialData]:
    """Yield all entries of one element.

    Each entry is parsed by itself, because files contain kinds of entries that the library does not know.
    """
    text = re.sub(r"[#!].*", "", path.read_text())
    start = re.compile(rf"^[ \t]*{element}[ \t]+\S*[A-Za-z]\S*.*$", re.M)
    any_start = re.compile(r"^[ \t]*[A-Z][a-z]?[ \t]+\S*[A-Za-z]\S*.*$", re.M)
    for match in start.finditer(text):
        following = any_start.search(text, match.end())
        lines = text[match.start() : following.start() if following else None].splitlines()
        yield parser.from_lines([line for line in lines if line.strip()])


def read_element_basis(element: str, basis: str, potential: str, basis_file: str, potential_file: str) -> ElementBasis:
    """Look up one element in CP2K's files.

    basis, potential: any of the names given in the files, with or without the suffix -qN for the number of valence
    electrons. Without it, the potential that fits the basis set is taken.
    Raises ValueError that names what the file has instead.
    """
    if element not in atomic_numbers:
        raise ValueError(f"{element!r} is not a chemical element.")
    basis_path, potential_path = find_data_file(basis_file), find_data_file(potential_file)
    found = list(_entries(basis_path, element, BasisSetData))
    sets = [entry for entry in found if basis in entry.identifiers]
    if not sets:
        names = ", ".join(entry.identifiers[0] for entry in found) or "no basis set of this element"
        raise ValueError(f"{basis_path}: element {element} has no basis set {basis}; it has {names}.")
    found = list(_entries(potential_path, element, PseudopotentialData))
    wanted = {potential} | {f"{potential}-q{entry.n_el}" for entry in sets[:1] if entry.n_el}
    potentials = [entry for entry in found if wanted & set(entry.identifiers)]
    if sets[0].n_el:
        potentials = [entry for entry in potentials if sum(entry.n_el) == sets[0].n_el]
    if not potentials:
        names = ", ".join(entry.identifiers[0] for entry in found) or "no potential of this element"
        need = f" for {sets[0].n_el} valence electrons (basis {basis})" if sets[0].n_el else ""
        raise ValueError(f"{potential_path}: element {element} has no potential {potential}{need}; it has {names}.")
    text = "\n".join(line.rstrip() for line in sets[0].cp2k_format_line_iter())
    name = next((n for n in potentials[0].identifiers if re.search(r"-q\d+$", n)), potentials[0].identifiers[0])
    return ElementBasis(element, basis, text, name, int(sum(potentials[0].n_el)))


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
