"""What was exported is a run: T(E) that quatrex recorded of it, sisl's of TBtrans's files, and Green's functions by hand."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import sisl
from ase import Atoms
from negf import transmission
from test_quatrex import read_cells

from hamscale.export import export
from hamscale.structures import wrap_as_cp2k
from hamscale.units import HARTREE_IN_EV
from helpers import DATA, SZV, basis_of, model_hamiltonian, written

RECORDS = DATA / "quatrex"
CELLS, CELL, REACH, ORBITALS = 18, 4.0, 3, 8  # cells of the device, their length, how many of them H reaches, orbitals of one
LEVELS = {"fermi_level": -0.413, "mid_gap": -0.413, "valence_band_maximum": -0.4135, "conduction_band_minimum": -0.4125}


def of_chain(cells: int, displaced: float = 0.0):
    """H after Wolfsberg and Helmholz, K = 1.75, of a zigzag chain of silicon, atoms near its middle displaced."""
    unit = Atoms("Si2", [(0.5, 0, 0), (0.5 + CELL / 2, 1.2, 0)], cell=[CELL, 12, 12], pbc=[True, False, False])
    atoms = unit.repeat((cells, 1, 1))
    middle = np.abs(atoms.positions[:, 0] - atoms.positions[:, 0].mean()) < 4
    atoms.positions[middle] += np.random.default_rng(1).normal(0, 1, (middle.sum(), 3)) * displaced
    operators = model_hamiltonian(wrap_as_cp2k(atoms), basis_of(Si=SZV))
    between = np.repeat(~operators.pairs.onsite, np.diff(operators.offsets))
    H = np.where(between, 1.75, 1.0) * (operators.hamiltonian - operators.overlap)
    levels = {f"{name}_hartree": value for name, value in LEVELS.items()}
    return replace(operators, hamiltonian=H, attributes=operators.attributes | levels)


@pytest.fixture(scope="module")
def unit(tmp_path_factory):
    return written(tmp_path_factory.mktemp("unit"), of_chain(1))


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return written(tmp_path_factory.mktemp("device"), of_chain(CELLS, 0.05))


def settings(path: Path) -> dict:
    return tomllib.loads(path.read_text())


def window(config: dict) -> np.ndarray:
    electron = config["electron"]
    return np.linspace(electron["energy_window_min"], electron["energy_window_max"], electron["energy_window_num"])


@pytest.mark.parametrize("name", ["unit", "device"])
def test_settings_are_what_quatrex_takes_and_what_the_record_was_made_of(name, tmp_path, request):
    export(request.getfixturevalue(name), "quatrex", tmp_path / "out", **({"transport": "a"} if name == "device" else {}))
    schemas = json.loads((RECORDS / "settings.json").read_text())
    old, new = settings(tmp_path / "out" / "quatrex_config_0.0.1.toml"), settings(tmp_path / "out" / "quatrex_config.toml")
    for version, config, other in (("0.0.1", old, new), ("0.1.0", new, old)):
        of_version = jsonschema.Draft202012Validator(schemas[version])
        assert list(of_version.iter_errors(config)) == []
        assert list(of_version.iter_errors(other)), "each generation refuses the other's settings"
    assert old == settings(RECORDS / f"{name}.toml")
    assert window(old).tolist() == window(new).tolist()


def test_transmission_of_a_device_is_that_of_quatrex(device, tmp_path):
    export(device, "quatrex", tmp_path / "out", transport="a")
    config = settings(tmp_path / "out" / "quatrex_config_0.0.1.toml")
    (block,) = set(config["device"]["block_size"])
    H, S = (read_cells(tmp_path / "out" / f"{name}.h5")[0, 0, 0] for name in ("hamiltonian", "overlap"))
    some = slice(None, None, 10)
    ours, theirs = transmission(H, S, window(config)[some], block), np.load(RECORDS / "device.npy")[some]
    assert np.ptp(theirs) > 1
    assert np.abs(ours - theirs).max() < 1e-4


def test_transmission_of_a_unit_cell_is_that_of_quatrex(unit, tmp_path):
    export(unit, "quatrex", tmp_path / "out")
    repeated = []
    for name in ("hamiltonian", "overlap"):
        matrices = read_cells(tmp_path / "out" / f"{name}.h5")
        large = np.zeros((3 * REACH * ORBITALS,) * 2)
        for i, j in np.ndindex(3 * REACH, 3 * REACH):
            if (j - i, 0, 0) in matrices:
                large[i * ORBITALS : (i + 1) * ORBITALS, j * ORBITALS : (j + 1) * ORBITALS] = matrices[j - i, 0, 0]
        repeated.append(large)
    some = slice(None, None, 10)
    energies = window(settings(RECORDS / "unit.toml"))[some]
    ours, theirs = transmission(*repeated, energies, REACH * ORBITALS), np.load(RECORDS / "unit.npy")[some]
    assert np.ptp(theirs) > 1
    assert np.abs(ours - theirs).max() < 1e-4


def test_what_tbtrans_reads_gives_the_same_transmission(device, tmp_path):
    """sisl reads RUN.fdf and the files that it names; its self-energies of the electrodes, put where TBtrans puts them."""
    export(device, "tbtrans", tmp_path / "out", transport="a")
    fdf = sisl.get_sile(tmp_path / "out" / "RUN.fdf")
    H = sisl.get_sile(tmp_path / "out" / fdf.get("TBT.HS")).read_hamiltonian()
    assert H.geometry.nsc.tolist() == [1, 1, 1], "nothing couples across the ends"
    sigma, eta, fermi = {}, 1e-8, LEVELS["fermi_level"] * HARTREE_IN_EV
    for name in ("Left", "Right"):
        block = dict(line.split(maxsplit=1) for line in fdf.get(f"TBT.Elec.{name}"))
        electrode = sisl.get_sile(tmp_path / "out" / block["HS"]).read_hamiltonian()
        assert electrode.geometry.nsc.tolist() == [3, 1, 1]
        sigma[name] = sisl.RecursiveSI(electrode, block["semi-inf-direction"].replace("a1", "A"))
        n, start = electrode.no, 0 if block["electrode-position"] == "1" else H.no - electrode.no
        first = H.geometry.o2a(start)
        np.testing.assert_allclose(H.geometry.xyz[first : first + electrode.na], electrode.geometry.xyz, atol=1e-6)
    contour = fdf.get("TBT.Contour.line")
    low, high = (float(word) for word in contour[1].split()[1::3])
    config = settings(RECORDS / "device.toml")
    assert (low + fermi, high + fermi) == pytest.approx((window(config)[0], window(config)[-1]), abs=1e-3)
    some = np.arange(0, 501, 25)
    for energy, expected in zip(window(config)[some] - fermi, np.load(RECORDS / "device.npy")[some]):
        left, right = (of_end.self_energy(energy + 1j * eta) for of_end in sigma.values())
        inside = (energy + 1j * eta) * H.Sk(format="array") - H.Hk(format="array")
        inside[:n, :n] -= left
        inside[-n:, -n:] -= right
        G = np.linalg.inv(inside)[:n, -n:]
        of_left, of_right = (1j * (matrix - matrix.conj().T) for matrix in (left, right))
        assert np.trace(of_left @ G @ of_right @ G.conj().T).real == pytest.approx(expected, abs=1e-4)


def test_transmission_of_a_device_is_that_of_tbtrans(device, tmp_path):
    """TBtrans ran the RUN.fdf that is written today; numpy computes T(E) from what quatrex gets of the same file."""
    export(device, "tbtrans", tmp_path / "out", transport="a")
    assert (tmp_path / "out" / "RUN.fdf").read_text() == (DATA / "tbtrans" / "RUN.fdf").read_text()
    export(device, "quatrex", tmp_path / "same", transport="a")
    H, S = (read_cells(tmp_path / "same" / f"{name}.h5")[0, 0, 0] for name in ("hamiltonian", "overlap"))
    theirs = np.load(DATA / "tbtrans" / "device.npy")
    edges = window(settings(RECORDS / "device.toml"))
    energies, some = (edges[1:] + edges[:-1]) / 2, slice(None, None, 10)
    ours = transmission(H, S, energies[some], REACH * ORBITALS)
    assert np.ptp(theirs) > 1
    assert np.abs(ours - theirs[some]).max() < 1e-4


def test_a_device_of_electrodes_alone_is_refused(unit, tmp_path):
    with pytest.raises(ValueError, match="the device has 2 blocks, expected at least three: .* say --repeat 9 or more"):
        export(unit, "tbtrans", tmp_path / "out", transport="a", repeat=6)
    export(unit, "tbtrans", tmp_path / "out", transport="a", repeat=9)


def test_an_electrode_without_its_repetition_is_refused(tmp_path):
    """One atom less in one of the blocks: it is no other's image."""
    operators = of_chain(12)
    atoms = operators.atoms[:-1]
    path = written(tmp_path, model_hamiltonian(atoms, operators.basis))
    with pytest.raises(ValueError, match="block has other atoms than the one next to it, which TBtrans takes"):
        export(path, "tbtrans", tmp_path / "out", transport="a", allow_mismatch=True)
    with pytest.raises(ValueError, match="came without --transport"):
        export(path, "tbtrans", tmp_path / "out", blocks=2)
    with pytest.raises(ValueError, match="--blocks came with --to tshs, expected --to quatrex or tbtrans"):
        export(path, "tshs", tmp_path / "out.TSHS", blocks=2)
    assert list(tmp_path.iterdir()) == [path]
