"""DeepH data sets: written and read by the documented rules (hamscale/export/deeph.py), and trained on."""

import json
from dataclasses import replace

import ase.io
import h5py
import numpy as np
import pytest
import yaml

import hamscale.cli
from hamscale.angular import real_spherical_harmonics
from hamscale.config import load_material
from hamscale.evaluate import evaluate, summarise
from hamscale.export import deeph, export, import_data
from hamscale.graph.overlap import overlap_table
from hamscale.operators import read_operators
from hamscale.structures import read_structure_file
from hamscale.units import HARTREE_IN_EV
from helpers import bands_hartree, bands_of_cells, hafnia, model_hamiltonian, written

# the orders of Wikipedia's table of real harmonics and of OpenMX's manual (table 9), as polynomials up to a positive factor
WIKIPEDIA = {
    0: ["1 + 0*x"],
    1: ["y", "z", "x"],
    2: ["x*y", "y*z", "3*z**2 - r**2", "x*z", "x**2 - y**2"],
    3: [
        "y*(3*x**2 - y**2)", "x*y*z", "y*(5*z**2 - r**2)", "z*(5*z**2 - 3*r**2)", "x*(5*z**2 - r**2)", "z*(x**2 - y**2)",
        "x*(x**2 - 3*y**2)",
    ],
}  # fmt: skip
OPENMX = {
    0: ["1 + 0*x"],
    1: ["x", "y", "z"],
    2: ["3*z**2 - r**2", "x**2 - y**2", "x*y", "x*z", "y*z"],
    3: [
        "z*(5*z**2 - 3*r**2)", "x*(5*z**2 - r**2)", "y*(5*z**2 - r**2)", "z*(x**2 - y**2)", "x*y*z", "x*(x**2 - 3*y**2)",
        "y*(3*x**2 - y**2)",
    ],
}  # fmt: skip


def read_blocks(path) -> dict:
    """The reader of docs/key_concepts.md: (R1, R2, R3, i, j) -> block."""
    with h5py.File(path) as file:
        pairs, bounds, shapes, entries = (file[n][:] for n in ("atom_pairs", "chunk_boundaries", "chunk_shapes", "entries"))
    return {tuple(p): entries[a:b].reshape(shape) for p, a, b, shape in zip(pairs.tolist(), bounds, bounds[1:], shapes)}


def dense_cells(blocks: dict, orbitals: np.ndarray) -> dict:
    start = np.concatenate([[0], np.cumsum(orbitals)])
    cells = {}
    for (*R, i, j), block in blocks.items():
        matrix = cells.setdefault(tuple(R), np.zeros((start[-1],) * 2))
        matrix[start[i] : start[i + 1], start[j] : start[j + 1]] = block
    return cells


def same(ours, back, order):
    """The operators `back`, whose atom a is ours[order[a]], are ours."""
    assert np.array_equal(back.atoms.numbers, ours.atoms.numbers[order])
    np.testing.assert_allclose(back.pairs.vectors[:5], _vectors(ours, order, back.pairs[:5]), atol=1e-9)
    rows = {tuple(pair): b for b, pair in enumerate(ours.pairs.tolist())}
    assert len(back.pairs) == len(ours.pairs)
    for b, (i, j, *R) in enumerate(back.pairs.tolist()):
        ours_b = rows[(int(order[i]), int(order[j]), *R)]
        np.testing.assert_allclose(back.block(back.hamiltonian, b), ours.block(ours.hamiltonian, ours_b), atol=1e-13)
        np.testing.assert_allclose(back.block(back.overlap, b), ours.block(ours.overlap, ours_b), atol=1e-13)


def _vectors(ours, order, pairs):
    i, j = order[pairs[:, 0]], order[pairs[:, 1]]
    return ours.atoms.positions[j] + pairs[:, 2:] @ np.asarray(ours.atoms.cell) - ours.atoms.positions[i]


def test_our_orbitals_are_deephs():
    points = np.random.default_rng(0).normal(size=(50, 3))
    x, y, z = points.T
    names = {"x": x, "y": y, "z": z, "r": np.linalg.norm(points, axis=1)}
    for l, polynomials in WIKIPEDIA.items():
        ours = real_spherical_harmonics(l, points)
        for m, polynomial in enumerate(polynomials):
            ratio = eval(polynomial, {}, names) / names["r"] ** l / ours[:, m]
            np.testing.assert_allclose(ratio, ratio[0])
            assert ratio[0] > 0
        assert [OPENMX[l][index] for index in deeph._from_openmx([l])] == polynomials


def test_what_is_written_is_what_the_rules_say(solid, tmp_path):
    out = tmp_path / "0"
    solid = replace(solid, attributes={"fermi_level_hartree": 0.25})
    export(written(tmp_path, solid), "deeph", out)
    assert sorted(p.name for p in out.iterdir()) == ["POSCAR", "energies.json", "hamiltonian.h5", "info.json", "overlap.h5"]
    info, poscar = json.loads((out / "info.json").read_text()), ase.io.read(out / "POSCAR", format="vasp")
    symbols = poscar.get_chemical_symbols()
    assert info["atoms_quantity"] == len(symbols)
    assert info["orbits_quantity"] == solid.n_orbitals
    assert not info["spinful"]
    assert not info["orthogonal_basis"]
    assert abs(info["fermi_energy_eV"] - 0.25 * HARTREE_IN_EV) < 1e-12
    assert len(set(symbols)) == sum(a != b for a, b in zip(symbols, ["", *symbols]))  # grouped by element
    orbitals = np.array([sum(2 * l + 1 for l in info["elements_orbital_map"][s]) for s in symbols])
    H, S = (read_blocks(out / f"{name}.h5") for name in ("hamiltonian", "overlap"))
    assert list(H) == list(S)
    assert (
        np.abs(bands_of_cells(dense_cells(H, orbitals), dense_cells(S, orbitals)) - bands_hartree(solid) * HARTREE_IN_EV).max()
        < 1e-8
    )
    # a block between two atoms, found by where they are
    order = [int(np.argmin(np.linalg.norm(solid.atoms.positions - p, axis=1))) for p in poscar.positions]
    rows = {tuple(pair): b for b, pair in enumerate(solid.pairs.tolist())}
    for (*R, i, j), block in H.items():
        ours = solid.block(solid.hamiltonian, rows[(order[i], order[j], *R)])
        np.testing.assert_allclose(block, ours * HARTREE_IN_EV, atol=1e-12)


def test_what_was_written_is_read_back(solid, tmp_path):
    solid = replace(solid, attributes={"fermi_level_hartree": 0.25})
    export(written(tmp_path, solid), "deeph", tmp_path / "0")
    back = deeph.read(tmp_path / "0")
    same(solid, back, np.argsort(solid.atoms.numbers, kind="stable"))
    assert {z: e.l for z, e in back.basis.items()} == {z: e.l for z, e in solid.basis.items()}
    assert abs(back.attributes["fermi_level_hartree"] - 0.25) < 1e-12
    assert back.atoms.pbc.all()


def test_a_molecule_comes_back_as_one(water, tmp_path):
    export(written(tmp_path, water), "deeph", tmp_path / "0")
    back = deeph.read(tmp_path / "0")
    assert not back.atoms.pbc.any()
    assert np.abs(bands_hartree(back) - bands_hartree(water)).max() < 1e-10


def write_pack(folder, operators, shells):
    """A data set in DeepH-pack's layout and OpenMX's order, from the names of the orbitals."""
    folder.mkdir()
    np.savetxt(folder / "lat.dat", np.asarray(operators.atoms.cell).T)
    np.savetxt(folder / "site_positions.dat", operators.atoms.positions.T)
    np.savetxt(folder / "element.dat", operators.atoms.numbers, fmt="%d")
    lines = ["  ".join(map(str, shells[z])) for z in operators.atoms.numbers.tolist()]
    (folder / "orbital_types.dat").write_text("\n".join(lines) + "\n")
    (folder / "info.json").write_text(json.dumps({"isspinful": False, "fermi_level": -1.5}))
    index = {}
    for z, of_element in shells.items():
        index[z], start = [], 0
        for l in of_element:
            index[z] += [start + WIKIPEDIA[l].index(name) for name in OPENMX[l]]
            start += 2 * l + 1
    for name, values in (("hamiltonians", operators.hamiltonian * HARTREE_IN_EV), ("overlaps", operators.overlap)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for b, (i, j, *R) in enumerate(operators.pairs.tolist()):
                z_i, z_j = operators.atoms.numbers[[i, j]].tolist()
                block = operators.block(values, b)[np.ix_(index[z_i], index[z_j])]
                if np.abs(block).max() > 1e-6 or name == "overlaps":  # H has fewer blocks than S
                    file[str([*R, i + 1, j + 1])] = block


def test_the_layout_of_deeph_pack_is_read(dft, tmp_path):
    write_pack(tmp_path / "0", dft, {z: e.l for z, e in dft.basis.items()})
    back = deeph.read(tmp_path / "0")
    assert np.array_equal(back.pairs, dft.pairs)
    np.testing.assert_allclose(back.overlap, dft.overlap, atol=1e-13)
    np.testing.assert_allclose(back.hamiltonian, dft.hamiltonian, atol=1e-6 / HARTREE_IN_EV)
    assert np.count_nonzero(back.hamiltonian) < np.count_nonzero(dft.hamiltonian)
    assert abs(back.attributes["fermi_level_hartree"] + 1.5 / HARTREE_IN_EV) < 1e-12


def test_atoms_outside_the_cell_are_wrapped_with_their_cells(dft, tmp_path):
    """Atom a moved by n_a cells and the cells of its blocks by as much: the same crystal, and the same file."""
    write_pack(tmp_path / "0", dft, {z: e.l for z, e in dft.basis.items()})
    moved = np.array([[1, 0, -2], [0, 3, 0], [-1, 0, 0]])
    np.savetxt(tmp_path / "0" / "site_positions.dat", (dft.atoms.positions + moved @ np.asarray(dft.atoms.cell)).T)
    for name in ("hamiltonians", "overlaps"):
        with h5py.File(tmp_path / "0" / f"{name}.h5", "a") as file:
            blocks = {key: file[key][:] for key in file}
            for key in blocks:
                del file[key]
            for key, block in blocks.items():
                *R, i, j = json.loads(key)
                R = np.array(R) + moved[i - 1] - moved[j - 1]
                file[str([*R.tolist(), i, j])] = block
    back = deeph.read(tmp_path / "0")
    assert np.array_equal(back.pairs, dft.pairs)
    np.testing.assert_allclose(back.atoms.positions, dft.atoms.positions, atol=1e-9)
    np.testing.assert_allclose(back.overlap, dft.overlap, atol=1e-13)


def spoil_info(**changes):
    def spoil(folder):
        info = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps(info | changes))

    return spoil


def spoil_h5(name, change):
    def spoil(folder):
        with h5py.File(folder / name, "a") as file:
            change(file)

    return spoil


def spoil_set(name, dataset, change):
    def replace_it(file):
        values = file[dataset][:]
        del file[dataset]
        file[dataset] = change(values)

    return spoil_h5(name, replace_it)


def spoil_pairs(change):
    """The same change in both files."""

    def spoil(folder):
        for name in ("hamiltonian.h5", "overlap.h5"):
            spoil_set(name, "atom_pairs", change)(folder)

    return spoil


def link_to_a_file(file):
    del file["entries"]
    file["entries"] = h5py.ExternalLink("hamiltonian.h5", "entries")


def put_elsewhere(file):
    del file["entries"]
    file.create_dataset("entries", (10,), float, external=[("/etc/passwd", 0, 80)])


def declare_more(file):
    del file["entries"]
    file.create_dataset("entries", (10**11,), float, chunks=(100,))


def map_itself(file):
    del file["entries"]
    layout = h5py.VirtualLayout((10,), float)
    layout[:] = h5py.VirtualSource(".", "entries", (10,))
    file.create_virtual_dataset("entries", layout)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_info(spinful=True), "info.json: spinful, expected one spin"),
        (spoil_info(elements_orbital_map={"Hf": [0, 1], "O": [0, 1]}), "orbits_quantity is .*the shells say"),
        (spoil_info(elements_orbital_map={"Hf": [0, 1], "O": [0, 1]}, orbits_quantity=12), "the shells of its atoms say"),
        (spoil_info(elements_orbital_map={"Hf": [0, 1]}), "O. Expected a data set of DeepH"),
        (lambda folder: (folder / "overlap.h5").unlink(), "No such file or directory"),
        (lambda folder: (folder / "info.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "POSCAR").write_text("x\n1.0\n"), "not a POSCAR"),
        (spoil_h5("hamiltonian.h5", lambda f: f["entries"].__setitem__(0, np.nan)), "hamiltonian holds NaN"),
        (spoil_h5("hamiltonian.h5", lambda f: f["entries"].__setitem__(1, 7.0)), "differs from its adjoint"),
        (spoil_h5("overlap.h5", lambda f: f["atom_pairs"].__setitem__((4, 0), 9)), "atom_pairs .* differ"),
        (spoil_h5("overlap.h5", lambda f: f["atom_pairs"].__setitem__((4, 3), 9)), "a block of atom 9, expected atoms 0 to 2"),
        (spoil_h5("overlap.h5", lambda f: f["chunk_boundaries"].__setitem__(4, 9)), "chunk_boundaries do not fit"),
        (lambda folder: (folder / "info.json").write_text("[1, 2]"), "info.json: a list, expected an object"),
        (lambda folder: (folder / "info.json").write_text("[" * 100_000), "info.json: not JSON"),
        (lambda folder: (folder / "info.json").write_bytes(b"\xff{}"), "info.json: not JSON"),
        (spoil_info(elements_orbital_map=[0, 1]), "elements_orbital_map is no mapping"),
        (spoil_info(elements_orbital_map={"Hf": [0, 1.5], "O": [0, 1]}), "shells of Hf are .*expected a list of their l"),
        (spoil_info(elements_orbital_map={"Hf": [0, 1], "O": [7, 1]}), "shells of O are .*expected l of 0 to 6"),
        (spoil_info(elements_orbital_map={"Hf": [0, 0, 2, 1], "O": [0, 1]}), "overlap of atoms .* couples other m"),
        (spoil_info(elements_orbital_map={"Hf": [0, 0, 1, 2], "O": [1, 0]}), "overlap of atoms .* couples other m"),
        (spoil_info(fermi_energy_eV="low"), "info.json: the Fermi level is 'low', expected a number"),
        (spoil_info(fermi_energy_eV=float("nan")), "info.json: the Fermi level is nan"),
        (spoil_info(atoms_quantity=4), "atoms_quantity is 4, POSCAR and the shells say 3"),
        (spoil_info(orthogonal_basis=True), "orthogonal_basis, expected orbitals of atoms"),
        (spoil_set("overlap.h5", "atom_pairs", lambda p: p[:, :4]), r"atom_pairs has the shape .*expected \(n, 5\)"),
        (spoil_set("overlap.h5", "atom_pairs", lambda p: p.astype(float)), "atom_pairs are float64, expected integers"),
        (spoil_set("hamiltonian.h5", "entries", lambda e: e + 0j), "entries are complex128, expected real numbers"),
        (spoil_set("hamiltonian.h5", "entries", lambda e: e.reshape(1, -1)), r"entries has the shape .*expected \(n,\)"),
        (spoil_set("hamiltonian.h5", "entries", lambda e: e * 1e8), "element of .* Hartree, expected at most 1e.05"),
        (spoil_set("hamiltonian.h5", "chunk_shapes", lambda s: s[:-1]), "chunk_shapes of .* atom_pairs, expected one"),
        (spoil_set("overlap.h5", "entries", lambda e: e * 1.1), "1.0e-01 off, expected one on its diagonal"),
        (spoil_pairs(lambda p: np.where(p == 0, p, -p) * [1, 1, 1, -1, -1]), "overlap of atoms .* couples other m"),
        (spoil_pairs(lambda p: p * [10**6, 1, 1, 1, 1]), "a cell R of a pair is .*no orbitals reach it"),
        (spoil_pairs(lambda p: p * [20, 20, 20, 1, 1]), "A apart, expected at most 100"),
        (spoil_pairs(lambda p: p * [0, 1, 1, 1, 1]), "a pair of atoms is there twice"),
        (spoil_h5("overlap.h5", link_to_a_file), "entries is a link, expected what it leads to in this file"),
        (spoil_h5("overlap.h5", put_elsewhere), "entries is virtual or lies in another file"),
        (spoil_h5("overlap.h5", declare_more), "entries declares 800000000000 bytes in a file of"),
        (spoil_h5("overlap.h5", map_itself), "entries is virtual or lies in another file"),
    ],
)
def test_a_data_set_that_is_doubtful_is_refused_with_its_name(dft, tmp_path, spoil, message):
    export(written(tmp_path, dft), "deeph", tmp_path / "0")
    spoil(tmp_path / "0")
    with pytest.raises(ValueError, match=message) as error:
        deeph.read(tmp_path / "0")
    assert str(tmp_path / "0") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_structure_is_told(tmp_path):
    with pytest.raises(ValueError, match="no info.json in it or below"):
        deeph.data_folders(tmp_path)
    with pytest.raises(ValueError, match="no file NAME-KS_SPIN_1.*KS_CSR_WRITE ON"):
        import_data(tmp_path, tmp_path / "out")


def test_a_material_of_imported_structures_needs_no_species(dft, tmp_path, monkeypatch):
    """Its structures, H and S come from the data set by the verbs that the workflow calls."""
    for number in range(3):
        export(written(tmp_path, dft), "deeph", tmp_path / "data" / str(number))
    monkeypatch.chdir(tmp_path)
    sets = {"train": {"operators": "data/[01]", "split": "train"}, "test": {"operators": "data/2", "split": "test"}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"structures": sets}, sort_keys=False))
    material = load_material("m.yaml")
    assert material.identifiers() == ["train-000", "train-001", "test-000"]
    assert str(material.imported("train-001")) == "data/1"
    for arguments in (
        ("structure", "m.yaml", "--id", "train-001", "--out", "train-001.extxyz"),
        ("operators", "m.yaml", "train-001.extxyz", "data/1", "--out", "o.h5"),
    ):
        assert hamscale.cli.main(list(arguments)) == 0
    found, expected = read_operators("o.h5"), deeph.read("data/1")
    assert np.array_equal(found.hamiltonian, expected.hamiltonian)
    assert np.isfinite(found.attributes["fermi_level_hartree"])
    np.testing.assert_allclose(read_structure_file("train-001.extxyz").positions, expected.atoms.positions, atol=1e-7)
    built = {"split": "test", "builder": {"name": "bulk"}}
    for change, message in (
        ({"other": built}, "species are missing, expected those of structures.other"),
        ({"again": {"operators": "data/0", "split": "test"}}, "data/0 feeds the splits test, train"),
        ({"none": {"operators": "elsewhere/*", "split": "test"}}, "elsewhere/.*: no folder of a DeepH data set"),
        (
            {"moved": {"operators": "data/2", "split": "test", "strain": 0.1}},
            "has operators and strain, expected split",
        ),
        ({"more": {"operators": "data/2", "split": "test", "count": 2}}, "data/2: 1 structures, but count is 2"),
    ):
        (tmp_path / "n.yaml").write_text(yaml.safe_dump({"structures": sets | change}))
        with pytest.raises(ValueError, match=message):
            load_material("n.yaml").imported("more-001")


def check_with_overlap(run, capsys, folder, szv):
    """A structure of which S alone is known: its prediction has that S; that of another structure is refused."""
    ours = model_hamiltonian(hafnia(3), szv)
    export(written(folder, ours), "deeph", folder / "s")
    (folder / "s" / "hamiltonian.h5").unlink()
    assert run("predict", "model", "s/POSCAR", "--overlap", "s", "--out", "p.h5") == 0
    predicted = read_operators(folder / "p.h5")
    order = np.argsort(ours.atoms.numbers, kind="stable")
    rows = {tuple(pair): b for b, pair in enumerate(predicted.pairs.tolist())}
    for b, (i, j, *R) in enumerate(ours.pairs.tolist()):
        row = rows[(int(np.flatnonzero(order == i)[0]), int(np.flatnonzero(order == j)[0]), *R)]
        np.testing.assert_allclose(predicted.block(predicted.overlap, row), ours.block(ours.overlap, b), atol=1e-13)
    assert predicted.n_electrons == ours.n_electrons
    assert np.isfinite(predicted.attributes["mid_gap_hartree"]) or predicted.attributes["metal"] == 1
    capsys.readouterr()
    for refused, message in (
        (("operators/0.h5",), "S is of another structure: atom"),
        (("operators/none.h5",), "none.h5: no such file"),
        (("dft",), "dft"),
    ):
        assert run("predict", "model", "s/POSCAR", "--overlap", *refused, "--out", "q.h5") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (folder / "q.h5").exists()


def test_a_broken_member_of_a_data_set_is_told_and_the_others_are_read(dft, tmp_path):
    for number in range(3):
        export(written(tmp_path, dft), "deeph", tmp_path / "dft" / str(number))
    spoil_info(spinful=True)(tmp_path / "dft" / "0")
    (tmp_path / "dft" / "2" / "overlap.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="info.json: spinful") as error:
        import_data(tmp_path / "dft", tmp_path / "out")
    told = str(error.value).splitlines()
    assert len(told) == 2
    assert "2/overlap.h5" in told[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.h5"]


def test_imported_data_are_trained_on(szv, tmp_path, monkeypatch, capsys):
    """From a data set to a network by the verbs; what needs radial functions is refused in a line."""
    for number in range(2):
        export(written(tmp_path, model_hamiltonian(hafnia(number), szv)), "deeph", tmp_path / "dft" / str(number))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yaml").write_text(
        yaml.safe_dump(
            {
                "species": {"Hf": {"basis": "of DeepH"}, "O": {"basis": "of DeepH"}},
                "structures": {"train": {"split": "train", "builder": {"name": "bulk"}}},
                "graph": {"cutoff_angstrom": 4.0},
            }
        )
    )
    (tmp_path / "n.yaml").write_text(
        yaml.safe_dump({"network": {"layers": 1, "channels": 4, "hidden": 4}, "training": {"steps": 3, "validate_every": 3}})
    )

    def run(*arguments):
        return hamscale.cli.main([str(a) for a in arguments])

    assert run("import", "dft", "--out", "operators") == 0
    files = [f"operators/{number}.h5" for number in range(2)]
    assert read_operators(files[1]).basis[72].l == szv[72].l
    assert run("reference", "m.yaml", *files, "--out", "reference.h5") == 0
    assert run("graph", "reference.h5", *files, "--out", "graphs") == 0
    assert run(
        "train", "n.yaml", "reference.h5", "--train", "graphs/0.h5", "--validation", "graphs/1.h5",
        "--out", "model", "--checkpoint", "c",
    ) == 0  # fmt: skip
    assert (tmp_path / "model" / "weights.safetensors").is_file()
    ase.io.write("new.extxyz", hafnia(3))
    capsys.readouterr()
    assert run("predict", "model", "new.extxyz", "--out", "p.h5") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no radial functions" in line
    assert "--overlap" in line
    check_with_overlap(run, capsys, tmp_path, szv)
    known, unknown = read_operators(files[1]), read_operators(files[1])
    del unknown.attributes["electrons"]
    for operators in (known, unknown):
        rows, _ = evaluate("model", load_material("m.yaml"), [written(tmp_path, operators)])
        summary = summarise(rows)
        assert 0 < summary["mae_mev"] < 1e6
        assert ("gap_error_mev" in summary) == (operators is known)
    with pytest.raises(ValueError, match="no radial functions"):
        overlap_table(read_operators(files[0]).basis).pairs(hafnia())
    assert read_operators(files[0]).n_electrons == 24
    spoil_info(occupation=None)(tmp_path / "dft" / "0")
    with pytest.raises(ValueError, match="valence electrons of Hf, O are not known"):
        deeph.read(tmp_path / "dft" / "0").n_electrons  # noqa: B018
