"""The models of resources/models are those whose errors resources/raw quotes."""

from pathlib import Path

import pytest

from hamscale.analysis.spectra import eigenvalues, gap, k_grid
from hamscale.config import load_material
from hamscale.files import read_table
from hamscale.predict import predict
from hamscale.structures import build_structure, kpoint_counts
from hamscale.units import hartree_to_ev

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "structure"), [("hfo2", "test-000"), ("gst124", "test_28-000")])
def test_a_shipped_model_gives_the_gap_of_its_table(name, structure):
    material = load_material(ROOT / f"config/materials/{name}.yaml")
    operators = predict(ROOT / "resources/models" / name, build_structure(material, structure)).operators()
    counts = kpoint_counts(operators.atoms, material.analysis.kgrid, material.analysis.kgrid_length_angstrom)
    found = hartree_to_ev(gap(eigenvalues(operators, k_grid(counts)[0]), operators.n_electrons // 2))
    table = read_table(ROOT / f"resources/raw/evaluation_{name}.csv").set_index("structure")
    assert found == pytest.approx(table.loc[structure, "gap_predicted_ev"], abs=1e-3)
