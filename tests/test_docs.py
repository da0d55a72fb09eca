"""Run the examples of the documentation, compare them with the code, and follow its links."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from hamscale.angular import edge_rotations
from hamscale.basis import material_basis
from hamscale.building import build_structures
from hamscale.cli import _parser
from hamscale.config import Config, Material, load_material, validate
from hamscale.graph.codec import BlockCodec
from hamscale.graph.coupling import pair_coupling
from hamscale.graph.reference import fit_reference
from hamscale.operators import write_operators
from helpers import hafnia, model_hamiltonian

DOCS = Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))
from reference import commands, generated_pages  # noqa: E402

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def _blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.S)


def test_the_example_material_is_a_material(tmp_path):
    first, runs, extension = _blocks("new_material.md", "yaml")
    (of_runs,) = _blocks("howto/own_runs.md", "yaml")
    (slab,) = _blocks("howto/slabs.md", "yaml")
    (tmp_path / "mgo.yaml").write_text(first)
    (tmp_path / "mgo_few.yaml").write_text(extension)
    assert load_material(tmp_path / "mgo_few.yaml").identifiers("train") == ["train-000", "train-001", "train-002"]
    material, config = yaml.safe_load(first), yaml.safe_load(runs)
    material = validate("docs/new_material.md", material, Material)
    assert validate("docs/new_material.md", config, Config).runs[0].material == "mgo"
    assert len(build_structures(material)["device-000"]) == 64 * len(build_structures(material)["test-000"])
    assert material_basis(material)[12].n_orbitals > 0
    wide = build_structures(validate("docs/howto/slabs.md", yaml.safe_load(slab), Material))["wide-000"]
    assert (len(wide), wide.pbc.tolist()) == (64 * 16, [True, True, False])
    for path in ("runs/md_600K/a", "runs/md_900K/a", "runs/relax_1/final/b"):
        for step in range(6):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{path}-KS_SPIN_1_R_1-1_{step}.csr").touch()
    of_runs = yaml.safe_load(of_runs.replace("runs/", f"{tmp_path}/runs/"))
    material = validate("docs/howto/own_runs.md", of_runs, Material)
    assert [len(material.identifiers(split)) for split in ("train", "validation", "test")] == [6, 5, 6]


def test_the_reader_reads(tmp_path, szv):
    operators = model_hamiltonian(hafnia(), szv)
    write_operators(tmp_path / "a.h5", operators)
    (code,) = _blocks("files.md", "python")
    scope = {}
    exec(code.replace("results/hfo2/operators/test-000.h5", str(tmp_path / "a.h5")), scope)
    np.testing.assert_allclose(scope["H"], operators.at_k((0, 0, 0))[0], atol=1e-12)


def _listing():
    """The function of docs/method.md that encodes one block, at most 15 lines long."""
    (code,) = _blocks("method.md", "python")
    assert len(code.splitlines()) <= 15
    scope = {}
    exec(code, scope)
    return lambda *arguments: np.concatenate([*scope["encode"](*arguments)])


def test_the_listing_encodes_blocks_as_training_graphs_do(szv):
    """Every offsite block within the cutoff: gauge, reference, coupling and edge frame."""
    structures, encode = [model_hamiltonian(hafnia(seed), szv) for seed in range(2)], _listing()
    reference = fit_reference(structures, 5.0)
    for operators in structures:
        graph, numbers = BlockCodec(reference).encode(operators), operators.atoms.numbers
        mu, shifts = graph.attributes["gauge_hartree"], {}
        assert abs(mu) > 1e-3
        for z, blocks in graph.crystal_field.items():
            shifts |= dict(zip(graph.atoms_of(z), reference.crystal_field.shifts(z, blocks)))
        blocks, rows = operators.pairs.find(graph.edges), graph.edges.place_in_elements
        assert (blocks >= 0).all()
        for edge, ((i, j, *_), block, row) in enumerate(zip(graph.edges, blocks, rows)):
            key = int(numbers[i]), int(numbers[j])
            pair, two_centre = reference.coupling[key], reference.offsite(*key, graph.edges.distances[[edge]])[0]
            by_degree = [two_centre[pair.slot_degree == L] for L in range(max(pair.slots) + 1)]
            H, S = (operators.block(values, block) for values in (operators.hamiltonian, operators.overlap))
            shells = szv[key[0]].l, szv[key[1]].l
            target = encode(H, S, mu, shifts[i], shifts[j], by_degree, graph.edges.vectors[edge], *shells)
            np.testing.assert_allclose(target, graph.offsite[key][row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("vector", [(0, 0, 1.9), (0, 0, -1.9), (1.9, 0, 0), (-0.4, 1.2, -0.7)])
def test_the_listing_has_the_edge_frames_of_the_codec(szv, vector):
    """The poles, where one polar angle is a matter of choice, among them."""
    pair, vector = pair_coupling(szv, 72, 8), np.array(vector, float)
    n_i, n_j = szv[72].n_orbitals, szv[8].n_orbitals
    H, nothing = np.random.default_rng(0).normal(size=(n_i, n_j)), np.zeros((n_i, n_j))
    coupled = H.reshape(1, -1) @ pair.transform
    expected = pair.rotate(coupled, edge_rotations(vector[None], max(pair.slots)))[0]
    shifts, no_table = (np.zeros((n_i, n_i)), np.zeros((n_j, n_j))), np.zeros(max(pair.slots) + 1)
    found = _listing()(H, nothing, 0.0, *shifts, no_table, vector, szv[72].l, szv[8].l)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_layers_are_those_that_are_checked():
    contract = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    checked = [name for layer in contract["layers"] for name in re.findall(r"hamscale\.(\w+)", layer)]
    table = (DOCS.parent / "CONTRIBUTING.md").read_text().split("| layer |")[1].split("\n\n")[0]
    shown = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    assert [name for row in shown for name in row] == checked


def _anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


GENERATED = {(DOCS / name).resolve(): text for name, text in generated_pages().items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        if path.resolve() in GENERATED:
            text = GENERATED[path.resolve()]
            assert not anchor or f" {{#{anchor}}}\n" in text, f"{target}#{anchor}"
            continue
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("CHANGELOG.md", "SECURITY.md")], ids=lambda page: page.name
)
def test_lines_are_at_most_120_columns_wide(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


# programs that are not ours, and words of the shell
OTHERS = {
    *(
        "cat",
        "cd",
        "cp",
        "done",
        "export",
        "for",
        "git",
        "head",
        "here=",
        "ls",
        "mine()",
        "mpirun",
        "pip",
        "pre-commit",
        "pytest",
    ),
    *("python3", "quatrex", "rsync", "source", "squeue", "srun", "ssh", "tail", "tbtrans", "tmux", "uenv"),
}
TARGETS = set(re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text(), re.M)) | {"hfo2", "gst"}


def _shell_lines(page: Path) -> list[str]:
    """The commands of the blocks without a language, comments taken away, and lines that go on joined."""
    blocks = [body for of, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.M | re.S) if of == ""]
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines()) if line]


def _files(page: Path) -> dict[str, str]:
    """The files that a page shows: each block of YAML says in its first line which it is."""
    return {re.match(r"# (\S+\.yaml)", text)[1]: text for text in _blocks(str(page), "yaml")}


def _check_command(line: str, files: set[str]) -> None:
    """Fail if a line of the shell names a command, option, file or target of this project that does not exist."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *arguments = words
    if "hamscale" in words and program in ("hamscale", "torchrun", "mpirun", "srun"):
        _parser().parse_args(words[words.index("hamscale") + 1 :])
    elif program == "snakemake":
        for option, value in zip(arguments, arguments[1:]):
            assert option not in ("--profile", "--configfile") or (ROOT / value).exists() or value in files, value
    elif program == "make":
        assert {word for word in arguments if "=" not in word and not word.startswith("-")} <= TARGETS
    elif program == "python":
        assert arguments[0] == "-c" or (ROOT / arguments[0]).is_file(), arguments[0]
    else:
        assert program in OTHERS or program.startswith("here="), program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_shows_exist(page):
    files = set(_files(page))
    for line in _shell_lines(page):
        try:
            _check_command(line, files)
        except SystemExit:
            pytest.fail(f"{page.name}: not a command line of hamscale: {line}")
    for name in re.findall(r"`hamscale ([a-z][\w-]*)", page.read_text()):
        assert name in {*commands(), "container"}  # the first words of a protected file


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in page.read_text()], ids=lambda page: page.name)
def test_files_that_a_page_shows_are_read(page, tmp_path):
    for name, text in _files(page).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, text in _files(page).items():
        if not name.startswith("config/materials"):
            validate(name, yaml.safe_load(text), Config)
        elif page.name not in ("own_runs.md", "deeph.md"):  # whose runs and data other tests make
            load_material(tmp_path / name)
