import pytest
import yaml

from hamscale.config import Config, Material, Model, load_material, validate

GOOD = {
    "species": {"Si": {"basis": "SZV"}},
    "structures": {"train": {"split": "train", "builder": {"name": "bulk"}}},
}


def test_every_error_is_told_at_once_with_file_and_field(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"dft": {"cutof_ry": 300, "eps_scf": "small"}, "colour": "red"}))
    with pytest.raises(ValueError) as error:
        load_material(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert any("dft.cutof_ry" in line and "Known keys" in line and "cutoff_ry" in line for line in lines)
    assert any("dft.eps_scf" in line and "'small'" in line for line in lines)
    assert any("colour" in line for line in lines)


def test_missing_file_names_those_there_are(tmp_path):
    (tmp_path / "silicon.yaml").write_text("")
    with pytest.raises(ValueError, match="no such file.*silicon"):
        load_material(tmp_path / "silicone.yaml")


BOMB = "\n".join(["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "m.yaml, line 1: not YAML"),
        (b"a: 1\nb: \xff", "m.yaml, line 2: not UTF-8"),
        (b"species: {}\ndft: {}\nspecies: {}", "m.yaml, line 3: the key 'species' is there twice"),
        (b"a: 1\nb: !!python/object/apply:os.system [true]", "m.yaml, line 2: not YAML: could not determine a constructor"),
        (BOMB.encode(), "aliases make it more than"),
        (b"a: &a [*a]", "m.yaml, line 1: an anchor that holds its own alias"),
        (b"[" * 100_000, "nested too deeply"),
        (b"#" * 2_000_000, "2000000 bytes, expected a configuration of at most"),
        (b"a: " + b"9" * 10_000, "m.yaml: not YAML"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "m.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_material(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_anchors_and_merged_keys_are_data(tmp_path):
    text = "species: {Si: {basis: SZV}}\nstructures:\n  a: &a {split: train, builder: {name: bulk}}\n  b: {<<: *a, split: test}"
    (tmp_path / "m.yaml").write_text(text)
    assert load_material(tmp_path / "m.yaml").structures["b"].builder.name == "bulk"


@pytest.mark.parametrize("name", ["../other", "/etc/x", "a b", "", ".", "é"])
def test_names_do_not_leave_their_folders(tmp_path, name):
    with pytest.raises(ValueError, match="runs.0.material"):
        validate("c", {"runs": [{"material": name, "model": "m"}]}, Config)
    with pytest.raises(ValueError, match="structures"):
        validate("m", GOOD | {"structures": {name: GOOD["structures"]["train"]}}, Material)
    if name:
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(GOOD | {"extends": name}, allow_unicode=True))
        with pytest.raises(ValueError, match="extends"):
            load_material(tmp_path / "m.yaml")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match="finite"):
        validate("m", GOOD | {"graph": {"cutoff_angstrom": value}}, Material)


def test_frames_of_one_trajectory_stay_in_one_split():
    sets = {"a": {"split": "train", "file": {"path": "md.xyz"}}, "b": {"split": "test", "file": {"path": "md.xyz"}}}
    with pytest.raises(ValueError, match="frames of one trajectory"):
        validate("m", GOOD | {"structures": sets}, Material)


@pytest.mark.parametrize("sources", [{}, {"builder": {"name": "bulk"}, "file": {"path": "x"}}])
def test_a_set_has_exactly_one_source(sources):
    with pytest.raises(ValueError, match="expected exactly one of"):
        validate("m", GOOD | {"structures": {"a": {"split": "train"} | sources}}, Material)


def test_tile_of_nothing():
    tile = {"t": {"split": "predict", "tile": {"of": "test-007"}}}
    with pytest.raises(ValueError, match="expected one of train-000"):
        validate("m", GOOD | {"structures": GOOD["structures"] | tile}, Material)


def test_every_field_that_is_a_quantity_says_what_it_is():
    """A description on every number of a material: they are the documentation."""

    def fields(model):
        for name, field in model.model_fields.items():
            for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(candidate, "model_fields"):
                    yield from fields(candidate)
            yield model.__name__, name, field

    undescribed = [(m, n) for m, n, f in fields(Material) if f.annotation in (float, int) and not f.description]
    assert undescribed == []
    assert Model().network.lmax == "auto"


def _extended(tmp_path, **extension):
    parent = GOOD | {"structures": {"train": {"split": "train", "builder": {"name": "bulk"}, "count": 4}}}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(parent))
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({"extends": "all"} | extension))
    return load_material(tmp_path / "part.yaml")


def test_an_extension_changes_splits_counts_and_graph_alone(tmp_path):
    material = _extended(tmp_path, structures={"train": {"count": 2, "split": "test"}}, graph={"cutoff_angstrom": 5.0})
    assert material.identifiers("test") == ["train-000", "train-001"]
    assert material.graph.cutoff_angstrom == 5.0
    assert material.species == load_material(tmp_path / "all.yaml").species


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        ({"structures": {"train": {"rattle_angstrom": 0.2}}}, "structures.train differs from that of all"),
        ({"structures": {"more": {"split": "test", "builder": {"name": "bulk"}}}}, "structures.more differs"),
        ({"structures": {"train": {"count": 5}}}, "count is 5, but all has 4"),
        ({"dft": {"cutoff_ry": 300}}, "dft or species differ"),
        ({"extends": "nobody"}, "nobody.yaml: no such file.*all, part"),
        ({"extends": "part"}, "part.yaml: extends part, which extends another itself"),
    ],
)
def test_an_extension_that_would_need_dft_of_its_own_is_refused(tmp_path, extension, message):
    with pytest.raises(ValueError, match=message):
        _extended(tmp_path, **extension)


def test_steps_of_one_run_stay_in_one_split(tmp_path):
    """Every step that wrote H and S is a structure; the number is found if it is not given."""
    for step in range(3):
        for matrix in ("KS", "S"):
            (tmp_path / f"md-{matrix}_SPIN_1_R_1-1_{step}.csr").touch()
    species = {"Si": {"basis": "SZV-MOLOPT-SR-GTH"}}
    train = {"dft": str(tmp_path), "split": "train"}
    material = Material.model_validate({"species": species, "structures": {"train": train}})
    assert material.identifiers() == ["train-000", "train-001", "train-002"]
    run = material.run("train-002")
    assert run is not None
    assert (run.project, run.step) == ("md", 2)
    for other, message in (
        (train | {"split": "test"}, "feeds the splits test, train"),
        (train | {"count": 4}, "3 structures with H and S, but count is 4"),
        (train | {"strain": 0.1}, "has dft and strain, expected split, count and transport alone"),
        (train | {"dft": str(tmp_path / "none")}, "no file NAME-KS_SPIN_1"),
    ):
        with pytest.raises(ValueError, match=message):
            validate("m.yaml", {"species": species, "structures": {"train": train, "other": other}}, Material)
