"""Write CP2K inputs and parse them again with cp2k-input-tools, so that a wrong value is found before CP2K runs."""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from ase import Atoms
from cp2k_input_tools.generator import CP2KInputGenerator
from cp2k_input_tools.parser import CP2KInputParser

from ..basis import Basis, find_data_file
from ..config import Material
from ..structures import charge_of, kpoint_counts, multiplicity_of, periodicity, wrap_as_cp2k

PROJECT = "run"
# By the number of periodic directions. Of two: ANALYTIC of CP2K 2023.1 is wrong by 0.1 Ha (mended in 2023.2 by pull request
# 2757); MT gives the same in all versions, and in later ones the same as ANALYTIC. Of one direction there is ANALYTIC alone.
POISSON_SOLVERS = {0: "WAVELET", 1: "ANALYTIC", 2: "MT"}
# vacuum beside twice the extent of a flat sheet with which H of MT is converged to 1e-5 Ha (8 A: 3e-4 Ha)
VACUUM_ANGSTROM = 10.0


def cp2k_input(atoms: Atoms, material: Material, basis: Basis, restart: Path | None = None) -> str:
    """Return the input of one energy run that writes H and S as binary CSR and all orbital energies.

    H and S are resolved by periodic image. A periodic structure gets a Monkhorst-Pack grid even for the Gamma point alone (1 1
    1), because without one CP2K folds all images into one matrix. A molecule has one image and gets no grid.
    restart: file with the density matrix to begin from (`export.cp2k_restart`); default: superposed densities of atoms.

    Raises ValueError if the cell of a slab or a wire is one for which CP2K's Poisson solver is wrong, if the structure is not
    wrapped as CP2K would wrap it, if its electrons cannot have its multiplicity, or if CP2K's own grammar refuses the input.
    """
    if atoms.pbc.any():
        _check_open_vectors(atoms)
    if not np.allclose(wrap_as_cp2k(atoms).positions, atoms.positions, atol=1e-9):
        raise ValueError(
            "atoms are not wrapped to fractions in [-1/2, 1/2], from where CP2K counts the cells of H(R). "
            "Build structures with `hamscale structure`, or wrap them with structures.wrap_as_cp2k."
        )
    tree = _tree(atoms, material, basis)
    if restart is not None:
        if not restart.is_file():
            raise ValueError(f"{restart}: no such file. Expected one as `hamscale export --to cp2k-restart` writes it.")
        section = tree["+force_eval"][0]["+dft"]
        section["wfn_restart_file_name"] = str(restart.resolve())  # a run has a folder of its own
        section["+scf"]["scf_guess"] = "RESTART"
    generator, parser = _grammar()
    text = "\n".join(generator.line_iter(tree)) + "\n"
    try:
        back = parser.parse(io.StringIO(text))
    except Exception as error:  # the parser raises many kinds of exceptions, at times another one while it reports a mistake
        raise ValueError(f"CP2K's grammar refuses the generated input: {error.__context__ or error}") from None
    if (difference := _difference(tree, back)) is not None:
        raise ValueError(f"the generated CP2K input reads back differently at {difference}.")
    return text.replace("ELPA_KERNEL AUTO", f"ELPA_KERNEL {material.dft.elpa_kernel}")


def _check_open_vectors(atoms: Atoms) -> None:
    """Raise ValueError if an open cell vector is not along its axis, or shorter than twice the atoms' extent plus 10 A.

    CP2K takes the length of the cell from the diagonal of its matrix, and cuts the Coulomb interaction off at half of it.
    """
    cell = np.asarray(atoms.cell)
    for n in np.flatnonzero(~atoms.pbc):
        name, axis = "abc"[n], "xyz"[n]
        others = np.delete(np.concatenate([cell[n], cell[:, n]]), [n, 3 + n])
        if np.abs(others).max() > 1e-6:
            raise ValueError(
                f"periodic along {periodicity(atoms)}: the open cell vector {name} is {np.round(cell[n], 3).tolist()} A, "
                f"expected one along {axis}, and the others perpendicular to it. Turn the structure, or change the order of "
                "its axes."
            )
        needed = 2 * np.ptp(atoms.positions[:, n]) + VACUUM_ANGSTROM
        if cell[n, n] < needed:
            raise ValueError(
                f"periodic along {periodicity(atoms)}: the open cell vector {name} is {cell[n, n]:.2f} A long, expected "
                f"{needed:.2f} A at least, twice the extent of the atoms plus {VACUUM_ANGSTROM:g} A. Build the structure with "
                "`hamscale structure`, which sees to it, or give it more vacuum."
            )


@lru_cache
def _grammar() -> tuple[CP2KInputGenerator, CP2KInputParser]:
    """Return the generator and the parser.

    Each reads 28 MB of CP2K's grammar, which takes seconds, so both are made once per process.
    """
    return CP2KInputGenerator(), CP2KInputParser()


def electrons_by_spin(atoms: Atoms, material: Material, basis: Basis) -> tuple[int, ...]:
    """Return the number of electrons of spin up and of spin down at the start of a run, or of both in a restricted one.

    The multiplicity is that of the structure. If it has none, the moment is the sum of dft.spin.magnetization, or the nearest
    that the number of electrons allows. Raises ValueError if there is no such number of electrons.
    """
    electrons = basis.n_electrons(atoms.numbers) - charge_of(atoms)
    spin, multiplicity = material.dft.spin, multiplicity_of(atoms)
    if not spin:
        if electrons % 2 or (multiplicity or 1) > 1:
            raise ValueError(
                f"{electrons} valence electrons, expected an even number and multiplicity 1: the run is spin-restricted. Set "
                "dft.spin (docs/howto/spin.md), add or remove an atom, or double the cell."
            )
        return (electrons // 2,)
    if multiplicity:
        moment = multiplicity - 1
    else:
        wanted = abs(sum(spin.magnetization.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols()))
        moment = min(range(electrons % 2, electrons + 1, 2), key=lambda m: abs(m - wanted))
    up, odd = divmod(electrons + moment, 2)
    if odd or up > electrons or up > basis.n_orbitals(atoms.numbers).sum():
        parity = "even" if electrons % 2 else "odd"
        raise ValueError(
            f"{electrons} valence electrons cannot have multiplicity {moment + 1}, expected an {parity} one that the orbitals "
            "hold. Correct structures.SET.multiplicity or charge, or dft.spin.magnetization."
        )
    return up, electrons - up


def _scf(atoms: Atoms, material: Material, basis: Basis) -> dict:
    """Build the section SCF: all orbitals are kept, so that the unoccupied levels are printed too."""
    dft = material.dft
    added = [int(basis.n_orbitals(atoms.numbers).sum()) - n for n in electrons_by_spin(atoms, material, basis)]
    # Broyden mixing of two densities may go astray in a box: of one oxygen molecule it converged with alpha 0.2 and 0.3, not
    # with 0.1 and 0.4. Mixing of density matrices with DIIS, CP2K's default, took 13 steps.
    method = "DIRECT_P_MIXING" if dft.spin and not atoms.pbc.any() else "BROYDEN_MIXING"
    scf: dict[str, object] = {
        "scf_guess": "ATOMIC",
        "eps_scf": dft.eps_scf,
        "max_scf": dft.max_scf,
        "added_mos": added,
        "+diagonalization": {"_": True, "algorithm": "STANDARD"},
        "+mixing": {"_": True, "method": method, "alpha": dft.mixing_alpha, "nbuffer": 8},
        "+print": {"+restart": {"_": "OFF"}},
    }
    if dft.smearing:
        smear: dict[str, object] = {
            "_": True,
            "method": dft.smearing.method.upper(),
            "electronic_temperature": dft.smearing.temperature_kelvin,
        }
        if dft.spin and (multiplicity := multiplicity_of(atoms)):  # else the moment follows from one Fermi level of both spins
            if atoms.pbc.any():
                raise ValueError(
                    f"multiplicity {multiplicity} with dft.smearing and k-points: CP2K cannot hold the moment there. Leave "
                    "multiplicity out and let the moment follow, from dft.spin.magnetization at the start."
                )
            smear["fixed_magnetic_moment"] = float(multiplicity - 1)
        scf["+smear"] = smear
    return scf


def _subsys(atoms: Atoms, basis: Basis, moments: dict[str, float]) -> dict:
    """Build the section SUBSYS: cell, coordinates (A) and kinds, with the moments (Bohr magnetons) at the start."""
    cell = {name: tuple(float(x) for x in vector) for name, vector in zip("abc", np.asarray(atoms.cell))}
    return {
        "+cell": cell | {"periodic": periodicity(atoms)},
        "+coord": {
            "*": [
                f"{symbol} " + " ".join(f"{x:.14f}" for x in position)
                for symbol, position in zip(atoms.get_chemical_symbols(), atoms.positions)
            ]
        },
        "+kind": [
            {"_": element.element, "basis_set": [element.name], "potential": element.potential}
            | ({"magnetization": moments[element.element]} if element.element in moments else {})
            for element in basis.values()
            if element.number in atoms.numbers
        ],
    }


def _tree(atoms: Atoms, material: Material, basis: Basis) -> dict:
    dft, solver = material.dft, POISSON_SOLVERS.get(int(atoms.pbc.sum()))
    csr = {"_": "ON", "threshold": dft.csr_threshold, "upper_triangular": False, "binary": True, "real_space": True}
    section: dict[str, object] = {
        "basis_set_file_name": [_file(dft.basis_file)],
        "potential_file_name": _file(dft.potential_file),
        # CP2K's default for EPS_PPNL is the square root of EPS_DEFAULT. It makes same-atom blocks of H(k) asymmetric (by
        # 2e-7 Ha where EPS_DEFAULT is 1e-10), and the H(R) that CP2K writes is then not quite the H(k) that it diagonalises.
        # The value of EPS_DEFAULT avoids this and costs nothing.
        "+qs": {"method": "GPW", "eps_default": dft.eps_default, "eps_ppnl": dft.eps_default},
        "+mgrid": {"cutoff": dft.cutoff_ry, "rel_cutoff": dft.rel_cutoff_ry},
        "+poisson": {"periodic": periodicity(atoms)} | ({} if atoms.pbc.all() else {"poisson_solver": solver}),
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
    if atoms.pbc.any():
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
    if charge := charge_of(atoms):
        section["charge"] = charge
    if dft.spin:
        by_spin = electrons_by_spin(atoms, material, basis)
        section |= {"uks": True, "multiplicity": by_spin[0] - by_spin[1] + 1}
    settings: dict[str, object] = {"project_name": PROJECT, "run_type": "ENERGY", "print_level": "MEDIUM"}
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
                "+subsys": _subsys(atoms, basis, dft.spin.magnetization if dft.spin else {}),
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
