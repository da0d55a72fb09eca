"""Write CP2K inputs and parse them again with cp2k-input-tools, so that a wrong value is found before CP2K runs."""

import io
from functools import lru_cache

import numpy as np
from ase import Atoms
from cp2k_input_tools.generator import CP2KInputGenerator
from cp2k_input_tools.parser import CP2KInputParser

from ..basis import Basis, find_data_file
from ..config import Material
from ..structures import kpoint_counts, wrap_as_cp2k

PROJECT = "run"


def cp2k_input(atoms: Atoms, material: Material, basis: Basis) -> str:
    """Return the input of one energy run that writes H and S as binary CSR and all orbital energies.

    H and S are resolved by periodic image. A periodic structure gets a Monkhorst-Pack grid even for the Gamma point alone (1 1
    1), because without one CP2K folds all images into one matrix. A molecule has one image and gets no grid.

    Raises ValueError if the structure is periodic along some directions only, if it is not wrapped as CP2K would wrap it, if it
    has an odd number of electrons, or if CP2K's own grammar refuses the input.
    """
    if atoms.pbc.any() and not atoms.pbc.all():
        raise ValueError(
            f"periodic along {atoms.pbc.tolist()}, expected all three directions or none. Give a slab vacuum and pbc along all "
            "three."
        )
    if not np.allclose(wrap_as_cp2k(atoms).positions, atoms.positions, atol=1e-9):
        raise ValueError(
            "atoms are not wrapped to fractions in [-1/2, 1/2], from where CP2K counts the cells of H(R). "
            "Build structures with `hamscale structure`, or wrap them with structures.wrap_as_cp2k."
        )
    if basis.n_electrons(atoms.numbers) % 2:
        raise ValueError(
            f"{basis.n_electrons(atoms.numbers)} valence electrons, expected an even number: runs are spin-restricted. "
            "Add or remove an atom, or double the cell."
        )
    tree = _tree(atoms, material, basis)
    generator, parser = _grammar()
    text = "\n".join(generator.line_iter(tree)) + "\n"
    try:
        back = parser.parse(io.StringIO(text))
    except Exception as error:  # the parser raises many kinds of exceptions, at times another one while it reports a mistake
        raise ValueError(f"CP2K's grammar refuses the generated input: {error.__context__ or error}") from None
    if (difference := _difference(tree, back)) is not None:
        raise ValueError(f"the generated CP2K input reads back differently at {difference}.")
    return text.replace("ELPA_KERNEL AUTO", f"ELPA_KERNEL {material.dft.elpa_kernel}")


@lru_cache
def _grammar() -> tuple[CP2KInputGenerator, CP2KInputParser]:
    """Return the generator and the parser.

    Each reads 28 MB of CP2K's grammar, which takes seconds, so both are made once per process.
    """
    return CP2KInputGenerator(), CP2KInputParser()


def _scf(atoms: Atoms, material: Material, basis: Basis) -> dict:
    """Build the section SCF: all orbitals are kept, so that the unoccupied levels are printed too."""
    dft = material.dft
    occupied = basis.n_electrons(atoms.numbers) // 2
    scf = {
        "scf_guess": "ATOMIC",
        "eps_scf": dft.eps_scf,
        "max_scf": dft.max_scf,
        "added_mos": int(basis.n_orbitals(atoms.numbers).sum()) - occupied,
        "+diagonalization": {"_": True, "algorithm": "STANDARD"},
        "+mixing": {"_": True, "method": "BROYDEN_MIXING", "alpha": dft.mixing_alpha, "nbuffer": 8},
        "+print": {"+restart": {"_": "OFF"}},
    }
    if dft.smearing:
        scf["+smear"] = {
            "_": True,
            "method": dft.smearing.method.upper(),
            "electronic_temperature": dft.smearing.temperature_kelvin,
        }
    return scf


def _subsys(atoms: Atoms, basis: Basis) -> dict:
    """Build the section SUBSYS: cell, coordinates (A) and kinds."""
    cell = {name: tuple(float(x) for x in vector) for name, vector in zip("abc", np.asarray(atoms.cell))}
    return {
        "+cell": cell | {"periodic": "XYZ" if atoms.pbc.all() else "NONE"},
        "+coord": {
            "*": [
                f"{symbol} " + " ".join(f"{x:.14f}" for x in position)
                for symbol, position in zip(atoms.get_chemical_symbols(), atoms.positions)
            ]
        },
        "+kind": [
            {"_": element.element, "basis_set": [element.name], "potential": element.potential}
            for element in basis.values()
            if element.number in atoms.numbers
        ],
    }


def _tree(atoms: Atoms, material: Material, basis: Basis) -> dict:
    dft, periodic = material.dft, bool(atoms.pbc.all())
    csr = {"_": "ON", "threshold": dft.csr_threshold, "upper_triangular": False, "binary": True, "real_space": True}
    section = {
        "basis_set_file_name": [_file(dft.basis_file)],
        "potential_file_name": _file(dft.potential_file),
        # CP2K's default for EPS_PPNL is the square root of EPS_DEFAULT. It makes same-atom blocks of H(k) asymmetric (by
        # 2e-7 Ha where EPS_DEFAULT is 1e-10), and the H(R) that CP2K writes is then not quite the H(k) that it diagonalises.
        # The value of EPS_DEFAULT avoids this and costs nothing.
        "+qs": {"method": "GPW", "eps_default": dft.eps_default, "eps_ppnl": dft.eps_default},
        "+mgrid": {"cutoff": dft.cutoff_ry, "rel_cutoff": dft.rel_cutoff_ry},
        "+poisson": {"periodic": "XYZ"} if periodic else {"periodic": "NONE", "poisson_solver": "WAVELET"},
        "+xc": {"+xc_functional": {"_": dft.functional}},
        "+scf": _scf(atoms, material, basis),
        "+print": {
            "+ks_csr_write": dict(csr),
            "+s_csr_write": dict(csr),
            "+mo": {
                "_": "ON",
                "energies": True,
                "occupation_numbers": True,
                "ndigits": 12,
                "+each": {"qs_scf": 0},
            },
        },
    }
    if periodic:
        section["+kpoints"] = {
            "scheme": (
                "MONKHORST-PACK",
                *map(str, kpoint_counts(atoms, dft.kpoints, dft.kpoint_length_angstrom)),
            ),  # a tuple, because a string with blanks would be quoted
            "symmetry": False,
            "full_grid": False,
            # All ranks work on each k-point: groups of ranks that share the k-points would print only the energies of their own
            # k-points (cp2k issue 4396).
            "parallel_group_size": 0,
        }
    settings: dict = {"project_name": PROJECT, "run_type": "ENERGY", "print_level": "MEDIUM"}
    if dft.elpa_kernel != "AUTO":
        settings["elpa_kernel"] = "AUTO"  # replaced after the check, whose grammar is that of a CP2K without ELPA
    if max(max(basis[z].l) for z in atoms.numbers.tolist()) > 2:
        settings["+grid"] = {"backend": "CPU"}  # that of CUDA is wrong for f shells; without a GPU it is the default
    return {
        "+global": settings,
        "+force_eval": [
            {
                "method": "QUICKSTEP",
                "+dft": section,
                "+subsys": _subsys(atoms, basis),
            }
        ],
    }


def _file(name: str) -> str:
    """Return the name of a file of CP2K's data folder as it is, and a path to a user's file as an absolute path.

    A run has a folder of its own, from which a relative path would lead elsewhere.
    """
    path = find_data_file(name)
    return str(path.resolve()) if "/" in name else name


def _difference(a: object, b: object, where: str = "") -> str | None:
    """Return a description of where two input trees differ, or None if they do not.

    Numbers are compared by value, words without regard to case, and repeated sections in any order.
    """
    # a single value may be parsed as a list of one
    a, b = (x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x for x in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(a.keys() ^ b.keys())}"
        return next((d for key in a if (d := _difference(a[key], b[key], f"{where}/{key}")) is not None), None)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} entries against {len(b)}"
        if a and isinstance(a[0], dict):  # the parser returns repeated sections in reverse
            a, b = (sorted(x, key=lambda s: str(s.get("_"))) for x in (a, b))
        return next((d for k, (x, y) in enumerate(zip(a, b)) if (d := _difference(x, y, f"{where}[{k}]")) is not None), None)
    same = str(a).upper() == str(b).upper() or (
        isinstance(a, (int, float)) and isinstance(b, (int, float)) and np.isclose(a, b)
    )
    return None if same else f"{where}: {a!r} against {b!r}"
