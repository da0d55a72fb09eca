import numpy as np
import pandas as pd
import pytest

from hamscale import figures
from hamscale.analysis.tables import analysis_tables
from hamscale.config import Analysis
from helpers import hafnia, model_hamiltonian

FIGURES = ("bands", "dos", "error_by_pair", "error_by_distance", "decay", "slabs", "training", "heatmap")


@pytest.fixture(scope="module")
def tables(szv):
    dft, other = model_hamiltonian(hafnia(), szv), model_hamiltonian(hafnia(), szv)
    noise = np.random.default_rng(0).normal(0, 1e-4, len(other.hamiltonian))
    other.hamiltonian = other.hamiltonian + (noise + other.transposed(noise)) / 2
    other.attributes = {"cutoff_angstrom": 6.0, "wall_seconds": 1.0}
    return analysis_tables(dft, other, other, Analysis(kgrid=(1, 1, 1), band_points=20), {"structure": "a"})


@pytest.fixture(scope="module")
def training():
    names = (
        "train_mae_mev",
        "validation_mae_mev",
        "validation_mae_mev_onsite",
        "validation_mae_mev_offsite",
        "baseline_mae_mev",
    )
    return pd.DataFrame({"network": [0, 0], "step": [1, 2]} | {name: [2.0, 1.0] for name in names})


def test_every_figure_is_drawn_from_tables_alone_and_the_same_each_time(tables, training, tmp_path):
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    training.to_csv(tmp_path / "train.csv", index=False)
    for out in ("a", "b"):
        figures.draw_all(tmp_path, tmp_path / "train.csv", tmp_path / out)
    for name in FIGURES:
        assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes()
        assert (tmp_path / "a" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_axes_say_what_and_in_which_unit(tables, training):
    drawn = {
        "energy (eV)": figures.bands(tables["bands"], figures.new_figure().subplots()).get_ylabel(),
        "density of states (1/eV)": figures.dos(tables["dos"], figures.new_figure().subplots()).get_ylabel(),
        "mean absolute error of a block (meV)": figures.error_by_pair(
            tables["by_pair"], figures.new_figure().subplots()
        ).get_ylabel(),
        "distance (Å)": figures.error_by_distance(tables["by_distance"], figures.new_figure().subplots()).get_xlabel(),
        "largest |H| of a block (meV)": figures.decay(tables["decay"], figures.new_figure().subplots(), 6.0).get_ylabel(),
        "mean absolute error (meV)": figures.training(training, figures.new_figure().subplots()).get_ylabel(),
    }
    assert list(drawn) == list(drawn.values())


def test_bands_break_where_the_path_does(tables):
    ax = figures.bands(tables["bands"], figures.new_figure().subplots())
    segments, n = tables["bands"]["segment"].nunique(), tables["bands"]["band"].nunique()
    bands = [line for line in ax.lines if line.get_xdata()[0] < line.get_xdata()[-1]]
    assert segments > 1
    assert len(bands) == 2 * segments * n
    assert all((np.diff(line.get_xdata()) > 0).all() for line in bands)


def test_the_levels_of_a_molecule_are_drawn(tables):
    one = tables["bands"][tables["bands"]["x_per_angstrom"] == 0].assign(label="", segment=0)
    ax = figures.bands(one.iloc[: one["band"].nunique()], figures.new_figure().subplots())
    assert len(ax.lines) == 2 * one["band"].nunique()
