"""Figures drawn from tables read back from csv, of a crystal and of a molecule; completes test_structure.py."""

import subprocess
import sys
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from hamscale import figures
from hamscale.analysis.tables import analysis_tables
from hamscale.config import Analysis, Transmission
from helpers import SZV, WATER, basis_of, hafnia, model_hamiltonian


def tables_of(atoms, basis, folder):
    """The tables of a structure with a noisy prediction, as a figure meets them: read back from csv."""
    dft = model_hamiltonian(atoms, basis)
    noise = np.random.default_rng(0).normal(0, 1e-3, len(dft.hamiltonian))
    predicted = replace(
        dft,
        hamiltonian=dft.hamiltonian + (noise + dft.transposed(noise)) / 2,
        attributes={"cutoff_angstrom": 6.0, "wall_seconds": 0.1},
    )
    periodic = Transmission(kgrid=(2, 1, 8)) if atoms.pbc.any() else None
    analysis = Analysis(kgrid=(2, 1, 1), band_points=12, transmission=periodic)
    for name, table in analysis_tables(dft, predicted, predicted, analysis, {"structure": "test"}).items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    return tables_of(hafnia(), basis_of(Hf=SZV, O=SZV), tmp_path_factory.mktemp("crystal"))


@pytest.fixture(scope="module")
def molecule(tmp_path_factory):
    return tables_of(WATER, basis_of(H="SZV-MOLOPT-GTH", O="SZV-MOLOPT-GTH"), tmp_path_factory.mktemp("molecule"))


@pytest.fixture(scope="module")
def training():
    step = np.arange(1, 6) * 50
    columns = ("train_mae_mev", "validation_mae_mev", "validation_mae_mev_onsite", "validation_mae_mev_offsite")
    return pd.DataFrame(
        {"network": 0, "step": step, "learning_rate": 1e-3}
        | {c: 100.0 / step + n for n, c in enumerate(columns)}
        | {"baseline_mae_mev": 9.0}
    )


@pytest.fixture
def ax():
    return figures.new_figure().subplots()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_levels_of_a_molecule_are_drawn_from_its_csv(molecule, ax):
    """Its column of labels is empty, which pandas reads as numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.bands(molecule["bands"], ax)
    drawn = sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(drawn, sorted(molecule["bands"]["predicted_ev"]))
    assert "wave vector" not in ax.get_xlabel()


def test_density_of_states_has_three_lines(crystal, ax):
    figures.dos(crystal["dos"], ax)
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("energy (eV)", "density of states (1/eV)")
    assert set(legend(ax)) == {"DFT", "predicted", "reference"}


def test_transmission_is_that_of_its_table(crystal, ax):
    figures.transmission(crystal["transmission"], ax)
    for line, name in zip(ax.lines, ("baseline", "dft", "predicted"), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), crystal["transmission"][["energy_ev", name]])
    assert legend(ax) == ["reference", "DFT", "predicted"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("energy (eV)", "transmission of one spin")


def test_error_by_pair_has_a_box_for_each_row(crystal, ax):
    figures.error_by_pair(crystal["by_pair"], ax)
    labels = [tick.get_text() for tick in ax.get_xticklabels()]
    assert labels == [f"{r.pair}\n{'onsite' if r.onsite else 'offsite'}" for r in crystal["by_pair"].itertuples()]
    assert "(meV)" in ax.get_ylabel()
    assert ax.get_yscale() == "log"


def test_error_by_distance_has_the_size_of_h_and_the_baseline_beside(crystal, ax):
    figures.error_by_distance(crystal["by_distance"], ax)
    assert legend(ax) == ["mean |H| of DFT", "reference", "predicted"]
    assert (ax.get_xlabel(), ax.get_yscale()) == ("distance (Å)", "log")
    assert "(meV)" in ax.get_ylabel()


def test_decay_marks_the_cutoff(crystal, ax):
    figures.decay(crystal["decay"], ax, 6.0)
    assert legend(ax) == ["Hf-Hf", "Hf-O", "O-O", "cutoff of the network"]
    assert ax.lines[-1].get_xdata()[0] == 6.0
    assert (ax.get_xlabel(), ax.get_yscale()) == ("distance (Å)", "log")


def test_training_has_a_line_for_each_error_and_the_baseline(training, ax):
    figures.training(training, ax)
    assert len(ax.lines) == 5
    assert list(ax.lines[-1].get_ydata()) == [9.0, 9.0]
    assert (ax.get_xlabel(), ax.get_yscale()) == ("optimiser step", "log")
    assert "(meV)" in ax.get_ylabel()


def test_heatmap_shows_the_logarithm_of_the_table(crystal):
    axes = figures.heatmap(crystal["heatmap"], list(figures.new_figure().subplots(1, 3)))
    n = crystal["heatmap"]["row"].max() + 1
    for ax, name in zip(axes, ("dft", "predicted")):
        expected = np.log10(np.maximum(crystal["heatmap"][f"{name}_mev"].to_numpy().reshape(n, n), 1e-2))
        np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert axes[0].figure.axes[-1].get_ylabel() == "log10 |H| (meV)"


def test_text_of_a_pdf_stays_text(crystal, tmp_path):
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.new_figure()
        figures.dos(crystal["dos"], figure.subplots())
        figures.save(figure, tmp_path / "dos")
    assert b"/Type3" not in (tmp_path / "dos.pdf").read_bytes(), "fonts must be TrueType: journals refuse Type 3"


def test_analysis_and_figures_need_no_torch_and_no_pyplot():
    code = (
        "import sys, hamscale.figures, hamscale.analysis.tables; "
        "sys.exit(', '.join({'torch', 'matplotlib.pyplot'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
