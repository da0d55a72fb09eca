"""The models of resources/models are those whose errors resources/raw quotes."""

from pathlib import Path

import pytest

from hamscale.analysis.spectra import find_levels
from hamscale.config import load_material
from hamscale.files import read_table
from hamscale.predict import predict
from hamscale.structures import build_structure
from hamscale.units import hartree_to_ev

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "structure"), [("hfo2", "test-000"), ("gst124", "test_28-000")])
def test_a_shipped_model_gives_the_gap_of_its_table(name, structure):
    material = load_material(ROOT / f"config/materials/{name}.yaml")
    operators = predict(ROOT / "resources/models" / name, build_structure(material, structure)).operators()
    found = hartree_to_ev(find_levels(operators, material.analysis).gap)
    table = read_table(ROOT / f"resources/raw/evaluation_{name}.csv").set_index("structure")
    assert found == pytest.approx(table.loc[structure, "gap_predicted_ev"], abs=1e-3)
