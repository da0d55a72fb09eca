"""The models of resources/models are those whose errors resources/raw quotes."""

from pathlib import Path

import numpy as np
import pytest

from hamscale.analysis.slabs import atom_potentials
from hamscale.analysis.spectra import find_levels
from hamscale.building import build_structure
from hamscale.config import load_material
from hamscale.files import read_table
from hamscale.predict import predict
from hamscale.units import hartree_to_ev

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "structure"), [("hfo2", "test-000"), ("gst124", "test_28-000")])
def test_a_shipped_model_gives_the_gap_of_its_table(name, structure):
    material = load_material(ROOT / f"config/materials/{name}.yaml")
    operators = predict(ROOT / "resources/models" / name, build_structure(material, structure)).operators()
    found = hartree_to_ev(find_levels(operators, material.analysis).gap)
    table = read_table(ROOT / f"resources/raw/evaluation_{name}.csv").set_index("structure")
    assert found == pytest.approx(table.loc[structure, "gap_predicted_ev"], abs=1e-3)


@pytest.mark.parametrize("structure", ["test_1x1x3-000", "test_1x1x6-000"])
def test_a_long_structure_has_no_false_potential(structure):
    """Mean potentials of slabs, with each element's own mean subtracted, stay within 0.16 eV of DFT's.

    The training cells are 5 and 10 A long.
    """
    atoms = build_structure(load_material(ROOT / "config/materials/hfo2.yaml"), structure)
    u = hartree_to_ev(atom_potentials(predict(ROOT / "resources/models/hfo2", atoms).operators()))
    table = read_table(ROOT / "resources/raw/evaluation_hfo2_slabs.csv")
    dft = table[table["structure"] == structure]["dft_ev"].to_numpy()
    assert np.ptp(dft) > 0.5
    slab = (atoms.get_scaled_positions()[:, 2] % 1 * len(dft)).astype(int)
    u -= np.array([u[atoms.numbers == z].mean() for z in atoms.numbers])
    np.testing.assert_allclose([u[slab == k].mean() for k in range(len(dft))], dft, atol=0.16)
