import ase.io
import numpy as np
import pytest
from ase import Atoms

from hamscale.building import build_structure, build_structures
from hamscale.config import Material, load_material, validate
from hamscale.structures import (
    MINIMUM_DISTANCE_ANGSTROM,
    check_distances,
    given_cells,
    kpoint_counts,
    random_kpoints,
    read_structure_file,
    wrap_as_cp2k,
    write_structure_file,
)
from helpers import SZV


def test_the_same_seed_gives_the_same_structures_and_others_differ():
    material = load_material("config/materials/hfo2_demo.yaml")
    first, again = build_structures(material), build_structures(material)
    assert list(first) == material.identifiers()
    for identifier in first:
        assert np.array_equal(first[identifier].positions, again[identifier].positions)
    positions = [first[i].positions for i in material.identifiers("train", "validation", "test")]
    assert all(np.abs(a - b).max() > 1e-3 for k, a in enumerate(positions) for b in positions[:k])


def test_a_structure_does_not_depend_on_how_many_others_there_are():
    material = load_material("config/materials/silicon.yaml").model_dump(exclude_none=True)
    material["structures"]["train"]["count"] = 2
    few = build_structures(validate("m", material, Material))
    many = build_structures(load_material("config/materials/silicon.yaml"))
    assert np.array_equal(few["train-001"].positions, many["train-001"].positions)


def test_wrapping_puts_fractions_within_half_and_moves_by_whole_cells():
    rng = np.random.default_rng(0)
    cell = np.eye(3) * 5 + rng.normal(0, 0.5, (3, 3))
    atoms = Atoms("H20", rng.uniform(-20, 20, (20, 3)), cell=cell, pbc=True)
    wrapped = wrap_as_cp2k(atoms)
    fractions = wrapped.cell.scaled_positions(wrapped.positions)
    shift = wrapped.cell.scaled_positions(wrapped.positions - atoms.positions)
    assert np.abs(fractions).max() <= 0.5
    np.testing.assert_allclose(shift, np.round(shift), atol=1e-12)
    np.testing.assert_allclose(wrap_as_cp2k(wrapped).positions, wrapped.positions, atol=1e-14)


def test_no_atom_is_left_on_the_boundary_where_rounding_decides():
    atoms = wrap_as_cp2k(Atoms("H2", scaled_positions=[(0.5, 0, 0), (-0.5, 0.25, 0.5)], cell=[4, 5, 6], pbc=True))
    fractions = atoms.cell.scaled_positions(atoms.positions)
    assert np.abs(np.abs(fractions) - 0.5).min() > 1e-4
    np.testing.assert_allclose((fractions[1] - fractions[0]) % 1, [0, 0.25, 0.5], atol=1e-12)


def test_a_file_reads_back_to_the_same_positions(tmp_path):
    atoms = build_structures(load_material("config/materials/hfo2_demo.yaml"))["train-003"]
    write_structure_file(tmp_path / "a.extxyz", atoms)
    back = read_structure_file(tmp_path / "a.extxyz")
    np.testing.assert_allclose(back.positions, atoms.positions, atol=1e-15)
    np.testing.assert_allclose(back.cell, atoms.cell, atol=1e-12)


def _material(**structure) -> Material:
    return validate("m", {"species": {"H": {"basis": "SZV"}}, "structures": {"a": {"split": "train"} | structure}}, Material)


def test_a_trajectory_gives_one_structure_a_frame(tmp_path):
    frames = [Atoms("H2", [(0, 0, 0), (0, 0, d)], cell=[4] * 3, pbc=True) for d in (0.7, 0.8, 0.9)]
    ase.io.write(tmp_path / "md.extxyz", frames)
    built = build_structures(_material(file={"path": str(tmp_path / "md.extxyz")}, count=3))
    assert [round(a.get_distance(0, 1), 3) for a in built.values()] == [0.7, 0.8, 0.9]


def test_a_crystal_may_feed_several_splits_and_a_trajectory_may_not(tmp_path):
    frames = [Atoms("H2", [(0, 0, 0), (0, 0, d)], cell=[4] * 3, pbc=True) for d in (0.7, 0.8)]
    sets = {split: {"split": split, "file": {"path": str(tmp_path / "h.extxyz")}, "count": 2} for split in ("train", "test")}
    moved = {"rattle_angstrom": 0.1}
    material = validate(
        "m", {"species": {"H": {"basis": "SZV"}}, "structures": {name: s | moved for name, s in sets.items()}}, Material
    )
    ase.io.write(tmp_path / "h.extxyz", frames[:1])
    distances = [a.get_distance(0, 1) for a in build_structures(material).values()]
    assert len({round(d, 6) for d in distances}) == 4
    ase.io.write(tmp_path / "h.extxyz", frames)
    with pytest.raises(ValueError, match="structures.train: .* has 2 frames and feeds the splits test, train"):
        build_structures(material)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"builder": {"name": "molecule", "arguments": {"name": "H2"}}}, "cell has rank 0.*box_angstrom"),
        ({"builder": {"name": "molecule", "arguments": {"name": "H2O"}}, "box_angstrom": 6.0}, "holds O, but species are H"),
        ({"builder": {"name": "bulk", "arguments": {"nonsense": 1}}}, "ASE could not make it"),
        ({"file": {"path": "nowhere.xyz"}}, "structures.a: nowhere.xyz: no such file"),
    ],
)
def test_bad_structures_are_refused_by_set(structure, message):
    with pytest.raises(ValueError, match=message):
        build_structures(_material(**structure))


GETE = """data_gete
_cell_length_a 6.03
_cell_length_b 6.03
_cell_length_c 6.03
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'F m -3 m'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Te1 Te 0 0 0 1.0
"""


def test_a_site_that_elements_share_is_refused(tmp_path):
    """ASE takes the element with the largest share for the only one: Ge0.25 Sb0.5 and vacancies would be antimony."""
    shared, whole = tmp_path / "shared.cif", tmp_path / "whole.cif"
    shared.write_text(GETE + "Ge1 Ge 0.5 0.5 0.5 0.25\nSb1 Sb 0.5 0.5 0.5 0.5\n")
    whole.write_text(GETE + "Ge1 Ge 0.5 0.5 0.5 1.0\n")
    with pytest.raises(ValueError, match=r"shared.cif: sites are shared .*\(0.25 Ge, 0.5 Sb\).*`decorate`"):
        read_structure_file(shared)
    with pytest.raises(ValueError, match="structures.a: .*decorate"):
        build_structures(_material(file={"path": str(shared)}))
    assert read_structure_file(whole).get_chemical_formula() == "Ge4Te4"


def test_which_structure_of_a_trajectory_is_asked_for(tmp_path):
    frames = [Atoms("H2", [(0, 0, 0), (0, 0, z)], cell=[6] * 3, pbc=True) for z in (0.7, 0.8, 0.9)]
    ase.io.write(tmp_path / "md.extxyz", frames)
    with pytest.raises(ValueError, match="md.extxyz: holds 3 structures, expected one. Choose one by --frame 0 to 2"):
        read_structure_file(tmp_path / "md.extxyz")
    assert read_structure_file(tmp_path / "md.extxyz", 1).positions[1, 2] == 0.8
    for frame in (3, -1):
        with pytest.raises(ValueError, match=f"no frame {frame}, it holds 3. Choose one by --frame 0 to 2"):
            read_structure_file(tmp_path / "md.extxyz", frame)


def test_wrapped_atoms_keep_where_the_file_had_them(tmp_path):
    atoms = Atoms("H4", [(0.1, 0, z) for z in (0.5, 3.0, 6.0, 9.5)], cell=[4, 4, 10], pbc=True)
    wrapped = wrap_as_cp2k(atoms)
    assert given_cells(atoms) is None
    assert given_cells(wrapped)[:, 2].tolist() == [0, 0, 1, 1]
    write_structure_file(tmp_path / "a.extxyz", wrapped)
    again = wrap_as_cp2k(read_structure_file(tmp_path / "a.extxyz"))
    assert given_cells(again)[:, 2].tolist() == [0, 0, 1, 1]
    # what was moved or repeated since is another structure
    again.positions[0, 2] += 0.3
    assert given_cells(again) is None
    assert given_cells(wrapped.repeat((1, 1, 2))) is None


def test_atoms_closer_than_half_an_angstrom_are_refused(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", Atoms("H2", [(0, 0, 0.1), (0, 0, 5.8)], cell=[6] * 3, pbc=True))
    with pytest.raises(ValueError, match="structures.a number 0: atoms 0 and 1 are 0.300 A apart, expected at least 0.5"):
        build_structures(_material(file={"path": str(tmp_path / "a.extxyz")}))


def _rocksalt(**more) -> Material:
    species = {symbol: {"basis": "SZV"} for symbol in ("Ge", "Sb", "Te")}
    builder = {"name": "bulk", "arguments": {"name": "GeTe", "crystalstructure": "rocksalt", "a": 6.0, "cubic": True}}
    return validate("m", {"species": species, "structures": {"a": {"split": "train", "builder": builder} | more}}, Material)


def test_decorated_sites_have_exact_shares_and_every_structure_its_own():
    material = _rocksalt(repeat=[2, 1, 1], decorate={"Ge": {"Ge": 1, "Sb": 2, "vacancy": 1}}, count=2)
    first, second = build_structures(material).values()
    assert first.get_chemical_formula() == second.get_chemical_formula() == "Ge2Sb4Te8"
    assert len(first) == 14
    sites = [{tuple(p) for p in a.positions[a.numbers == 51].round(3)} for a in (first, second)]
    assert sites[0] != sites[1]


def test_sites_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="structures.a.decorate: 4 sites of Ge cannot be shared.*multiple of 3"):
        build_structures(_rocksalt(decorate={"Ge": {"Ge": 1, "Sb": 2}}))


MELT = {"calculator": "ase.calculators.emt.EMT", "melt_kelvin": 2000, "melt_steps": 10, "quench_steps": 10, "relax_steps": 5}


def _copper(**more) -> Material:
    melt = {"density_g_cm3": 8.0} | MELT | more
    builder = {"name": "bulk", "arguments": {"name": "Cu", "cubic": True}}
    structure = {"split": "test", "builder": builder, "repeat": [2, 2, 2], "melt_quench": melt, "count": 2}
    return validate("m", {"species": {"Cu": {"basis": "SZV"}}, "structures": {"a": structure}}, Material)


def test_a_quenched_melt_has_its_density_no_crystal_and_the_same_atoms_each_time():
    material = _copper()
    first, second = build_structures(material).values()
    assert first.get_masses().sum() / first.get_volume() * 1.66053906660 == pytest.approx(8.0, rel=1e-6)
    assert len(first) == 32
    distances = first.get_all_distances(mic=True)
    assert distances[np.triu_indices(32, 1)].min() > 1.8
    assert np.abs(first.positions - second.positions).max() > 0.5
    assert np.array_equal(build_structure(material, "a-000").positions, first.positions)


LEADS = {"leads": [4, 1], "undisturbed": [8, 4]}


def _device(**more) -> Atoms:
    builder = {"name": "bulk", "arguments": {"name": "Cu", "cubic": True}}
    structure = {"split": "test", "builder": builder, "repeat": [1, 1, 6], "transport": LEADS, **more}
    return build_structure(
        validate("m", {"species": {"Cu": {"basis": "SZV"}}, "structures": {"a": structure}}, Material), "a-000"
    )


def test_the_leads_of_a_device_stay_where_others_are_displaced():
    """So do their neighbours, by default as many again; the displacements of the others are those without leads."""
    perfect, device = (_device(rattle_angstrom=rattle).arrays["given_positions"] for rattle in (0.0, 0.1))
    moved = np.linalg.norm(device - perfect, axis=1)
    layer = np.round(perfect[:, 2] / 1.805).astype(int)
    assert set(layer) == set(range(12))
    assert (moved[(layer < 4) | (layer >= 10)] == 0).all()
    assert (moved[(layer >= 4) & (layer < 10)] > 0.01).all()
    by_default = _device(rattle_angstrom=0.1, transport={"leads": [4, 2]}).arrays["given_positions"]
    np.testing.assert_array_equal(by_default, device)
    without = _device(rattle_angstrom=0.1, transport=None).arrays["given_positions"]
    np.testing.assert_array_equal(without[moved > 0], device[moved > 0])
    across = _device(rattle_angstrom=0.1, transport={"axis": "a", "leads": [6, 1], "undisturbed": [12, 1]}).arrays[
        "given_positions"
    ]
    still = (across == perfect).all(1)
    assert still.sum() == 13
    assert (still == (perfect[:, 0] < 1)).sum() == 23


def test_between_leads_a_device_is_amorphous_and_has_its_density_there():
    perfect = _device()
    device = _device(melt_quench={"density_g_cm3": 8.0} | MELT)
    assert device.get_chemical_symbols() == perfect.get_chemical_symbols()
    np.testing.assert_allclose(device.cell[:2], perfect.cell[:2])
    middle, density = 0.5 * perfect.cell[2, 2], 24 * 63.546 * 1.66053906660 / perfect.get_volume()
    assert device.cell[2, 2] == pytest.approx(perfect.cell[2, 2] + middle * (density / 8.0 - 1))
    given = device.arrays["given_positions"]
    order = np.argsort(perfect.arrays["given_positions"][:, 2], kind="stable")
    left, right = order[:8], order[-4:]
    np.testing.assert_array_equal(given[left], perfect.arrays["given_positions"][left])
    from_the_end = [a.arrays["given_positions"][right] - a.cell[2] for a in (device, perfect)]
    np.testing.assert_allclose(*from_the_end, atol=1e-12)
    between = order[8:-4]
    assert given[between, 2].min() > -1
    assert np.abs(given - perfect.arrays["given_positions"])[between].max(1).min() > 0.05
    assert device.get_all_distances(mic=True)[np.triu_indices(24, 1)].min() > 1.8


def test_leads_that_leave_nothing_between_them_are_refused():
    with pytest.raises(
        ValueError, match="structures.a.transport: 16 and 8 of 24 atoms are to stay undisturbed, expected others"
    ):
        _device(transport={"leads": [8, 4]}, rattle_angstrom=0.1)
    with pytest.raises(ValueError, match=r"undisturbed is \[8, 3\], expected as many atoms as the leads \[8, 4\] have"):
        _device(transport={"leads": [8, 4], "undisturbed": [8, 3]})


def test_a_calculator_of_an_installed_package_is_taken_by_its_name(tmp_path, monkeypatch):
    """An entry point, as pip installs it with any package; an unknown name runs nothing."""
    about = tmp_path / "engine-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: engine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[hamscale.calculators]\nmine = ase.calculators.emt:EMT\nbroken = nowhere:Engine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(build_structures(_copper(calculator="mine"))) == len(build_structures(_copper()))
    with pytest.raises(ValueError, match="structures.a.melt_quench.calculator: broken cannot be had .ModuleNotFoundError"):
        build_structures(_copper(calculator="broken"))
    for name in ("os.system", "nowhere.Engine"):
        with pytest.raises(ValueError, match=f"expected one of .*EMT.* found '{name}'"):
            _copper(calculator=name)


def test_a_tile_is_made_of_the_structure_at_hand():
    atoms = build_structures(load_material("config/materials/silicon.yaml"))["test-000"]
    moved = atoms.copy()
    moved.positions += [0.01, 0, 0]
    material = load_material("config/materials/silicon.yaml").model_dump(exclude_none=True)
    material["structures"]["t"] = {"split": "predict", "tile": {"of": "test-000"}, "repeat": [2, 1, 1]}
    tiled = build_structure(validate("m", material, Material), "t-000", moved)
    expected = wrap_as_cp2k(moved.repeat((2, 1, 1)))
    np.testing.assert_allclose(tiled.positions, expected.positions, atol=1e-8)


def test_a_grid_by_length_is_the_same_density_in_every_cell():
    small = Atoms("H", cell=[5.1, 5.0, 10.4], pbc=True)
    assert kpoint_counts(small, (3, 3, 3), None) == (3, 3, 3)
    assert kpoint_counts(small, (1, 1, 1), 10.0) == (2, 2, 1)
    assert kpoint_counts(small.repeat((2, 2, 2)), (1, 1, 1), 10.0) == (1, 1, 1)
    assert kpoint_counts(Atoms("H"), (1, 1, 1), 10.0) == (1, 1, 1)  # a molecule needs no cell


def made(**source) -> Atoms:
    structures = {"train": {"split": "train", **source}}
    content = {"species": {e: {"basis": SZV} for e in ("B", "N", "Na", "Cl")}, "structures": structures}
    return build_structure(validate("m", content, Material), "train-000")


SALT = {"spacegroup": {"spacegroup": 225, "cellpar": [5.64] * 3 + [90] * 3, "basis": [["Na", 0, 0, 0], ["Cl", 0.5, 0, 0]]}}
SHEET = {"builder": {"name": "graphene", "arguments": {"formula": "BN", "a": 2.5}}}


def test_a_crystal_is_opened_to_a_slab_or_a_wire_with_room_for_the_solver():
    slab = made(**SALT, repeat=[1, 1, 2], open=["c"])
    assert slab.pbc.tolist() == [True, True, False]
    extent = np.ptp(slab.positions[:, 2])
    assert extent == pytest.approx(1.5 * 5.64)
    np.testing.assert_allclose(np.asarray(slab.cell), np.diag([5.64, 5.64, 2 * extent + 12]), atol=1e-9)
    assert slab.positions[:, 2].mean() == pytest.approx(extent + 6)
    wire = made(**SALT, open=["a", "b"], vacuum_angstrom=20)
    np.testing.assert_allclose(wire.cell.lengths(), [2 * 2.82 + 20, 2 * 2.82 + 20, 5.64], atol=1e-9)
    assert wire.pbc.tolist() == [False, False, True]


def test_a_builder_that_leaves_a_direction_open_needs_no_cell_there():
    sheet = made(**SHEET)
    assert sheet.pbc.tolist() == [True, True, False]
    np.testing.assert_allclose(np.asarray(sheet.cell)[2], [0, 0, 12], atol=1e-9)


def test_a_slab_is_strained_in_its_plane_and_a_wire_along_its_axis():
    for atoms in (
        made(**SHEET, strain=0.05),
        made(**SALT, open=["b", "c"], strain=0.05),
        made(**SALT, open=["b"], strain=0.05),
    ):
        cell = np.asarray(atoms.cell)
        for axis in np.flatnonzero(~atoms.pbc):
            assert np.abs(np.delete(np.concatenate([cell[axis], cell[:, axis]]), [axis, 3 + axis])).max() < 1e-12
        assert np.abs(cell[0, 0] / [2.5, 5.64] - 1).min() > 1e-3


def test_tiling_across_is_refused():
    with pytest.raises(ValueError, match=r"repeat is \[2, 1, 3\], .* periodic along XY alone .* Give 1 along c"):
        made(**SHEET, repeat=[2, 1, 3])
    with pytest.raises(ValueError, match="melt_quench of atoms periodic along XY, expected XYZ"):
        made(**SHEET, melt_quench={})
    with pytest.raises(ValueError, match="box_angstrom, for a molecule, and open"):
        made(**SHEET, open=["c"], box_angstrom=8)


def test_atoms_are_wrapped_along_periodic_directions_alone():
    atoms = Atoms("H2", [(3.5, 9.0, -7.0), (0, 0, 0)], cell=[4, 12, 12], pbc=(True, False, False))
    np.testing.assert_allclose(wrap_as_cp2k(atoms).positions[0], [-0.5, 9, -7], atol=1e-12)


def test_kpoints_lie_where_a_structure_is_periodic():
    atoms = Atoms("H", cell=[2, 12, 3], pbc=(True, False, True))
    assert kpoint_counts(atoms, (4, 4, 4), None) == (4, 1, 4)
    assert kpoint_counts(atoms, (1, 1, 1), 12.0) == (6, 1, 4)
    assert not random_kpoints(atoms, 5)[:, 1].any()


ROCK_SALT = """2
Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 pbc="T T T"
Na 0.0 0.0 0.0
Cl 2.0 2.0 2.0
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("a.extxyz", "2.0 2.0 2.0", "nan 2.0 2.0", r"position of an atom \(1\) is \[nan, 2.0, 2.0\] A, expected numbers up to"),
        ("a.extxyz", "2.0 2.0 2.0", "2.0 -inf 2.0", "position of an atom.*-inf"),
        ("a.extxyz", "2.0 2.0 2.0", "2.0 1e300 2.0", "position of an atom.*1e.300"),
        ("a.extxyz", "2.0 2.0 2.0", "4.0 8.0 -4.0", "atoms 0 and 1 are 0.000 A apart"),
        ("a.extxyz", "2.0 2.0 2.0", "3.9 0.1 3.9", "are 0.173 A apart"),
        ("a.extxyz", "4 0 0 0 4 0", "nan 0 0 0 4 0", r"cell \(0\) is \[nan"),
        ("a.extxyz", "4 0 0 0 4 0", "0 0 0 0 4 0", "periodic along a, where the cell vector is zero"),
        ("a.extxyz", "4 0 0 0 4 0", "4 0 0 4 0 0", "planes of the cell.*are 0 A apart"),
        ("a.extxyz", "4 0 0 0 4 0", "4 0 0 400 4 0", "planes of the cell.*are 0.04 A apart.*less oblique"),
        ("a.extxyz", "4 0 0 0 4 0", "0.1 0 0 0 4 0", "planes of the cell.*are 0.1 A apart"),
        ("a.extxyz", ROCK_SALT, ROCK_SALT.splitlines()[1].join(["0\n", "\n"]), "no atoms"),
        ("a.extxyz", "Na 0.0", "Nax 0.0", "an atom is called 'Nax'"),
        ("a.extxyz", "Na 0.0", "X 0.0", "atom 0 has the atomic number 0, expected an element"),
        ("a.extxyz", "Na 0.0", "\0\1\2 0.0", "not a structure ASE reads"),
        ("a.extxyz", ROCK_SALT, ROCK_SALT.replace("2\n", "999999999999\n", 1), "says 999999999999 atoms, 2 lines follow"),
        ("a.extxyz", ROCK_SALT, ROCK_SALT * 2 + "9_9", "says 99 atoms, -1 lines follow"),
        ("a", ROCK_SALT, "999999999999\n" + ROCK_SALT, "says 999999999999 atoms"),
        ("a.extxyz", ROCK_SALT, "", "holds no structure|not a structure"),
        ("a.blend", ROCK_SALT, "BLENDER-v279 \0\0", "not a structure ASE reads"),
        ("a.cif", ROCK_SALT, "\0" * 40, "not a structure ASE reads|holds no structure"),
        ("a.xyz", "Lattice", "charge=nan Lattice", "charge of the structure is nan, expected an integer"),
    ],
)
def test_a_file_that_is_no_structure_is_refused_in_a_line_that_names_it(name, old, new, message, tmp_path):
    assert old in ROCK_SALT
    path = tmp_path / name
    path.write_text(ROCK_SALT.replace(old, new))
    with pytest.raises(ValueError, match=message) as refused:
        read_structure_file(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_labels_of_atoms_stand_for_their_elements(tmp_path, caplog):
    path = tmp_path / "a.extxyz"
    path.write_text(ROCK_SALT.replace("Na", "Na1").replace("Cl", " Cl23"))
    assert read_structure_file(path).get_chemical_symbols() == ["Na", "Cl"]
    assert "atoms are called Cl23, Na1" in caplog.text
    path.write_text(ROCK_SALT.replace("Na", "Nx1"))
    with pytest.raises(ValueError, match="an atom is called"):
        read_structure_file(path)


def test_distances_are_those_of_all_images():
    """Against every image of every atom, in cells of any shape and periodicity."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        cell = np.eye(3) * 3 + rng.normal(0, 0.8, (3, 3))
        atoms = Atoms("H6", rng.uniform(-5, 5, (6, 3)), cell=cell, pbc=rng.random(3) < 0.6)
        shifts = np.array([R for R in np.ndindex(15, 15, 15)]) - 7
        shifts = shifts[(shifts[:, ~atoms.pbc] == 0).all(1)] @ cell
        d = np.linalg.norm(atoms.positions[:, None, None] - atoms.positions[:, None] + shifts, axis=-1)
        closest = d[d > 1e-9].min()
        if closest < MINIMUM_DISTANCE_ANGSTROM:
            with pytest.raises(ValueError, match=rf"atoms \d and \d are {closest:.3f} A apart"):
                check_distances("it", atoms)
        else:
            check_distances("it", atoms)


def test_a_name_that_looks_like_the_address_of_a_data_base_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("postgresql@1.extxyz", "mysql.xyz"):
        (tmp_path / name).write_text(ROCK_SALT)
        assert len(read_structure_file(name)) == 2
