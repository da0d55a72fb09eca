"""Density, radial distribution and coordination."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write

from hamscale.analysis.disorder import coordination, density_g_cm3, radial_distribution
from hamscale.cli import main
from hamscale.files import facts, read_table


def salt(rattle=0.0):
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(2)
    atoms.positions += np.random.default_rng(0).normal(0, rattle, atoms.positions.shape)
    return atoms


def test_rock_salt_has_its_density_and_coordination():
    atoms = salt()
    assert density_g_cm3(atoms) == pytest.approx(2.163, abs=2e-3)
    g = radial_distribution([atoms])
    unlike = g[g["pair"] == "Na-Cl"]
    assert unlike.loc[unlike["g"].idxmax(), "distance_angstrom"] == pytest.approx(2.82, abs=0.02)
    numbers = coordination([atoms], g)
    of = {(r.centre, r.neighbour): (r.number, r.share) for r in numbers.itertuples()}
    assert of["Na", "Cl"] == of["Cl", "Na"] == (6, 1)
    assert of["Na", "Na"] == of["Cl", "Cl"] == (12, 1)


def test_the_integral_of_the_distribution_counts_neighbours():
    """4 pi n_b times the integral of g r^2 over a shell is what the plain count of pairs gives."""
    atoms = salt(0.1)
    g = radial_distribution([atoms, atoms])
    part = g[(g["pair"] == "Na-Cl") & (g["distance_angstrom"] < 3.9)]
    density = 32 / atoms.get_volume()
    integral = 4 * np.pi * density * (part["g"] * part["distance_angstrom"] ** 2).sum() * 0.02
    d = atoms.get_all_distances(mic=True)[atoms.numbers == 11][:, atoms.numbers == 17]
    assert integral == pytest.approx((d < 3.9).sum() / 32, rel=2e-3)


def test_a_gas_has_none_of_either():
    atoms = Atoms("Na200Cl200", np.random.default_rng(1).uniform(0, 40, (400, 3)), cell=[40] * 3, pbc=True)
    keep = [0]
    for i in range(400):
        if (atoms.get_distances(i, keep, mic=True) > 0.6).all():
            keep.append(i)
    g = radial_distribution([atoms[keep]])
    assert g[g["distance_angstrom"] > 4]["g"].mean() == pytest.approx(1, abs=0.1)


def test_the_verb_writes_tables_and_a_picture(tmp_path):
    write(tmp_path / "a.extxyz", salt(0.05))
    assert main(["quality", str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "out")]) == 0
    assert facts(tmp_path / "out/distribution.csv")["density_g_cm3"] == [pytest.approx(2.163, abs=2e-3)]
    shares = read_table(tmp_path / "out/coordination.csv").groupby(["centre", "neighbour"])["share"].sum()
    np.testing.assert_allclose(shares, 1)
    assert (tmp_path / "out/quality.png").stat().st_size > 10_000
    assert (tmp_path / "out/quality.pdf").is_file()
