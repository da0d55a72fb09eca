"""What the documentation shows works as shown."""

import re
from pathlib import Path

import numpy as np
import yaml

from hamscale.basis import material_basis
from hamscale.config import Config, Material, load_material, validate
from hamscale.operators import write_operators
from hamscale.structures import build_structures
from helpers import hafnia, model_hamiltonian

DOCS = Path(__file__).parents[1] / "docs"


def _blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.S)


def test_the_example_material_is_a_material(tmp_path):
    first, runs, extension = _blocks("new_material.md", "yaml")
    (tmp_path / "mgo.yaml").write_text(first)
    (tmp_path / "mgo_few.yaml").write_text(extension)
    assert load_material(tmp_path / "mgo_few.yaml").identifiers("train") == ["train-000", "train-001", "train-002"]
    material, config = yaml.safe_load(first), yaml.safe_load(runs)
    material = validate("docs/new_material.md", material, Material)
    assert validate("docs/new_material.md", config, Config).runs[0].material == "mgo"
    assert len(build_structures(material)["device-000"]) == 64 * len(build_structures(material)["test-000"])
    assert material_basis(material)[12].n_orbitals > 0


def test_the_reader_reads(tmp_path, szv):
    operators = model_hamiltonian(hafnia(), szv)
    write_operators(tmp_path / "a.h5", operators)
    (code,) = _blocks("files.md", "python")
    scope = {}
    exec(code.replace("results/hfo2/operators/test-000.h5", str(tmp_path / "a.h5")), scope)
    np.testing.assert_allclose(scope["H"], operators.at_k((0, 0, 0))[0], atol=1e-12)
