"""Every shell line of README.md, docs/howto/usual.md and docs/new_material.md, in order, as a new user types it.

The lines run in a copy, without an active environment.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
import yaml
from ase.spacegroup import crystal

from hamscale.cli import main
from hamscale.config import load_material
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import write_graph
from hamscale.graph.reference import fit_reference, write_reference
from helpers import TOY, hafnia, model_hamiltonian

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# what would take long, or would run these tests, is planned or made small; all else is run as it stands
INSTEAD = [
    (r"^make (\w+)", r"make -n \1"),
    (r"^snakemake --report \S+", "snakemake -n"),
    (r"^snakemake(?!.* -n)(.*)", r"snakemake -n\1"),
    (r"--nproc-per-node 4", "--nproc-per-node 2"),
    (r"--parts 128", "--parts 4"),
    (r"--kgrid 2 2 (16|1)\b", "--points 5 --kgrid 1 1 4"),
    # the model is not there: the material is found, and its test structures are named
    (r"^(hamscale evaluate .*)", r"\1 2>&1 | grep 'no DFT of test-000, test-001'"),
]


def shell_lines(path: Path) -> list[str]:
    """The commands of the blocks without a language, comments taken away."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks(path, "") for line in block.splitlines()]
    return [line for line in lines if line]


def blocks(path: Path, language: str) -> list[str]:
    return [body for of, body in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S) if of == language]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of what is tracked, with the environment that `make` makes."""
    folder = tmp_path / "hamscale"
    left_out = shutil.ignore_patterns(".git", ".venv", ".snakemake", "results", "logs", "__pycache__", "data", "*cache*")
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / ".venv").symlink_to(BIN.parent)
    return folder


def run(folder: Path, lines: list[str]):
    """Run lines in one shell that has no environment; raises with the line that failed."""
    script = ["set -e"]
    for line in lines:
        for pattern, instead in INSTEAD:
            line = re.sub(pattern, instead, line)
        script += [f"echo '+ {line.replace(chr(39), '')}'", line]
    others = [path for path in os.environ["PATH"].split(":") if Path(path) != BIN]
    plain = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    result = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=plain | {"PATH": ":".join(others)},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_the_lines_of_the_readme_and_of_the_usual_commands(clone, szv):
    lines = shell_lines(ROOT / "README.md")
    assert len(lines) == 3
    lines += shell_lines(ROOT / "docs/howto/usual.md")
    assert len(lines) > 15
    entered = lines.index("source .venv/bin/activate")
    assert not any(re.match("snakemake|hamscale|torchrun", line) for line in lines[:entered])
    # a device of hafnia, six cells long, and what a training takes
    cell = crystal(["Hf", "O"], [(0, 0, 0), (0.25, 0.25, 0.25)], spacegroup=225, cellpar=[5.08] * 3 + [90] * 3)
    device = cell.repeat((1, 1, 6))
    device.positions += 0.3
    ase.io.write(clone / "any_structure.extxyz", device)
    model = {"network": {"layers": 1, "channels": 4, "hidden": 4}, "training": {"steps": 3, "validate_every": 3}}
    (clone / "MODEL.yaml").write_text(yaml.safe_dump(model))
    structures = [model_hamiltonian(hafnia(seed), szv) for seed in range(2)]
    reference = fit_reference(structures, 5.0)
    write_reference(clone / "REFERENCE.h5", reference)
    for name, operators in zip("AB", structures):
        write_graph(clone / f"{name}.h5", BlockCodec(reference).encode(operators))
    run(clone, lines)
    for name in (
        "h.h5",
        "reference.h5",
        "device/hamiltonian.h5",
        "dataset/info.json",
        "operators.h5",
        "DIR/config.json",
        "parts.h5",
    ):
        assert (clone / name).is_file()
    # the lines of Python that follow read what was predicted
    (code,) = blocks(ROOT / "docs/howto/usual.md", "python")
    result = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_lines_of_the_how_to(clone):
    """With the files of its YAML blocks, where they say they are."""
    how_to = ROOT / "docs/new_material.md"
    for block in blocks(how_to, "yaml"):
        (clone / re.match(r"# (\S+\.yaml)", block)[1]).write_text(block)
    lines = shell_lines(how_to)
    assert lines[0] == "source .venv/bin/activate"
    planned = run(clone, lines)
    assert re.search(r"^dft +14$", planned, re.M)  # ten training structures, two of validation, two of test; none of the device


def test_prepare_writes_what_structure_and_input_write(tmp_path):
    """Of every structure that is built, byte for byte; no input without DFT, and nothing of melt and quench or of a tile."""
    material = tmp_path / "toy.yaml"
    quenched = "  quenched: {<<: *crystal, split: test, melt_quench: {melt_kelvin: 2000}}\n"
    material.write_text(TOY.replace("graph:", f"{quenched}graph:"))
    assert main(["prepare", str(material), "--out", str(tmp_path / "prepared")]) == 0
    written = {path.name for path in (tmp_path / "prepared").iterdir()}
    alone = tmp_path / "alone"
    settings = load_material(material)
    for identifier in settings.identifiers():
        if identifier.startswith(("tiled", "quenched")):
            continue
        structure = alone / f"{identifier}.extxyz"
        assert main(["structure", str(material), "--id", identifier, "--out", str(structure)]) == 0
        if identifier in settings.identifiers("train", "validation", "test"):
            assert main(["input", str(material), str(structure), "--out", str(alone / f"{identifier}.inp")]) == 0
    assert written == {path.name for path in alone.iterdir()}
    for name in written:
        assert (tmp_path / "prepared" / name).read_bytes() == (alone / name).read_bytes(), name
