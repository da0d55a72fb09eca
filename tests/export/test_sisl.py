"""sisl reads what was written through it: the same bands; its orbitals are ours with Siesta's signs."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import sisl

from hamscale.angular import real_spherical_harmonics
from hamscale.export import export, siesta
from hamscale.export.stream import stored
from hamscale.units import HARTREE_IN_EV
from helpers import KPOINTS, bands_hartree, written


def bands_ev(hamiltonian):
    return np.array([hamiltonian.eigh(k) for k in KPOINTS])


def test_bands_of_sisl_are_ours(solid, tmp_path):
    with stored(written(tmp_path, solid)) as file:
        hamiltonian = siesta.hamiltonian(file)
    assert not hamiltonian.orthogonal
    assert hamiltonian.geometry.na == len(solid.atoms)
    np.testing.assert_allclose(hamiltonian.geometry.xyz, solid.atoms.positions)
    assert hamiltonian.geometry.atoms.Z.tolist() == solid.atoms.numbers.tolist()
    assert np.abs(bands_ev(hamiltonian) - bands_hartree(solid) * HARTREE_IN_EV).max() < 1e-8


@pytest.mark.parametrize(
    ("target", "name", "reader"),
    [
        ("tbtrans", "hamiltonian.nc", sisl.io.siesta.ncSileSiesta),
        ("tshs", "hamiltonian.TSHS", sisl.io.siesta.tshsSileSiesta),
        ("sisl", "by_suffix.nc", sisl.io.siesta.ncSileSiesta),
        ("sisl", "by_suffix.TSHS", sisl.io.siesta.tshsSileSiesta),
        ("tbtrans", "no_suffix", sisl.io.siesta.ncSileSiesta),
    ],
)
def test_files_read_back_by_sisl_have_our_bands(solid, tmp_path, target, name, reader):
    path = written(tmp_path, solid)
    export(path, target, tmp_path / name)
    back = reader(tmp_path / name).read_hamiltonian()
    assert np.abs(bands_ev(back) - bands_hartree(solid) * HARTREE_IN_EV).max() < 1e-8
    # lengths pass through Bohr of another CODATA year and back
    np.testing.assert_allclose(back.geometry.xyz, solid.atoms.positions, atol=1e-9)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, path.name])


def test_the_zero_of_netcdf_is_the_fermi_level_of_the_file(solid, tmp_path):
    """sisl and TBtrans subtract the Fermi level as they read; TSHS, into which sisl writes none, keeps the zero of the file."""
    solid = replace(solid, attributes=solid.attributes | {"fermi_level_hartree": 0.2})
    path = written(tmp_path, solid)
    for name, zero in (("hamiltonian.nc", 0.2), ("hamiltonian.TSHS", 0.0)):
        export(path, "sisl", tmp_path / name)
        back = sisl.get_sile(tmp_path / name).read_hamiltonian()
        assert np.abs(bands_ev(back) - (bands_hartree(solid) - zero) * HARTREE_IN_EV).max() < 1e-8


def test_a_molecule_has_the_energies_it_has_here(water, tmp_path):
    export(written(tmp_path, water), "tshs", tmp_path / "water.TSHS")
    back = sisl.get_sile(tmp_path / "water.TSHS").read_hamiltonian()
    assert back.geometry.nsc.tolist() == [1, 1, 1]
    assert np.abs(back.eigh() - bands_hartree(water)[0] * HARTREE_IN_EV).max() < 1e-8


def test_orbitals_are_those_of_sisl_with_its_signs(dft, tmp_path):
    """The value of sisl's orbital at a point is (-1)^m times ours and a positive factor; H is turned into them."""
    points = np.random.default_rng(0).normal(size=(40, 3))
    radius = np.linalg.norm(points, axis=1)
    radial = np.linspace(0, 10, 200)
    for l in range(4):
        ours = real_spherical_harmonics(l, points)
        shell = sisl.SphericalOrbital(l, (radial, np.exp(-radial)), R=10.0)
        for m in range(-l, l + 1):
            theirs = shell.psi(points, m=m)
            ratio = theirs * np.exp(radius) / ours[:, l + m]
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-2)
            assert np.sign(ratio[0]) == (-1) ** m
    with stored(written(tmp_path, dft)) as file:
        hamiltonian = siesta.hamiltonian(file)
    orbitals = [orbital for atom in hamiltonian.geometry.atoms for orbital in atom]
    signs = np.array([(-1) ** orbital.m for orbital in orbitals])
    b = int(np.flatnonzero(dft.pairs.onsite)[0])
    n = dft.orbitals[0]
    ours = dft.block(dft.hamiltonian, b) * HARTREE_IN_EV
    theirs = hamiltonian.tocsr(0)[:n, :n].toarray()
    np.testing.assert_allclose(theirs, ours * np.outer(signs[:n], signs[:n]), atol=1e-12)
    assert [orbital.l for orbital in orbitals[:n]] == [l for l in dft.basis[dft.atoms.numbers[0]].l for _ in range(2 * l + 1)]


def test_radii_of_orbitals_make_sisl_see_every_pair(dft, tmp_path):
    """What sisl calls close, within the radii of two atoms together, are all pairs of the file."""
    export(written(tmp_path, dft), "tshs", tmp_path / "out.TSHS")
    with stored(written(tmp_path, dft)) as file:
        geometry = siesta.hamiltonian(file).geometry
    for i in range(geometry.na):
        seen = set()
        for atom in geometry.close(i, R=2 * geometry.maxR()):
            j, R = int(geometry.asc2uc(atom)), geometry.a2isc(atom)
            if geometry.rij(i, atom) < geometry.atoms[i].maxR() + geometry.atoms[j].maxR():
                seen.add((i, j, *np.ravel(R).tolist()))
        assert {tuple(pair) for pair in dft.pairs[dft.pairs[:, 0] == i].tolist()} <= seen


@pytest.mark.parametrize("name", ["device.TBT.nc", "a.TBT.Proj.nc", "Rho.grid.nc"])
def test_names_that_sisl_takes_for_results_are_refused(dft, tmp_path, name):
    path = written(tmp_path, dft)
    with pytest.raises(ValueError, match=f"{name}: sisl and the tools on it take a file of this name for .*, such as"):
        export(path, "tbtrans", tmp_path / name)
    assert list(tmp_path.iterdir()) == [path]


def test_another_suffix_and_a_missing_sisl_are_told(dft, tmp_path, monkeypatch):
    path = written(tmp_path, dft)
    with pytest.raises(ValueError, match="suffix is '.txt', expected .nc"):
        export(path, "sisl", tmp_path / "out.txt")
    monkeypatch.setitem(sys.modules, "sisl", None)  # what an import finds where it is not installed
    with pytest.raises(ValueError, match="sisl is not installed, expected it for the targets sisl, tbtrans and tshs"):
        export(path, "tbtrans", tmp_path / "out.nc")
    assert list(tmp_path.iterdir()) == [path]
