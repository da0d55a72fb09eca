"""Figures 3 and 5 to 8 as they are drawn from the committed tables."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.text import Text

from hamscale.figures.style import is_modelled, new_figure, styled
from hamscale.files import facts, read_table, write_table
from hamscale.paper import PAPER
from hamscale.paper.accuracy import ablations
from hamscale.paper.figures import boxes, domain_colours, throughput

RAW = Path(__file__).parents[2] / "resources" / "raw"


@pytest.fixture(scope="module", params=PAPER)
def figure(request):
    with styled():
        figure = PAPER[request.param][0](RAW)
        figure.draw_without_rendering()
    return request.param, figure


def test_text_is_readable_at_column_width_and_none_is_cut_off(figure):
    _, figure = figure
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()) >= 6
    page = figure.bbox
    for artist in (*figure.findobj(Axes), *figure.findobj(Legend)):
        if artist.get_visible() and getattr(artist, "name", "") != "3d":  # whose box is larger than what is drawn
            box = artist.get_tightbbox()
            over = max(page.x0 - box.x0, box.x1 - page.x1, page.y0 - box.y0, box.y1 - page.y1)
            assert over <= 1, artist  # pixel


def test_measured_and_modelled_never_look_alike(figure):
    name, figure = figure
    if name not in ("fig6", "fig7", "roofline"):
        return
    kinds = {"measured": 0, "modelled": 0}
    for ax in figure.findobj(lambda artist: hasattr(artist, "patches") and hasattr(artist, "get_facecolor")):
        words = {text.get_text() for text in ax.texts} & set(kinds)
        drawn = [p for p in ax.patches if isinstance(p, (PathPatch, Rectangle))]
        if not drawn and not words:
            continue  # a topology: exact
        (word,) = words
        kinds[word] += 1
        assert is_modelled(ax) == (word == "modelled")
        assert all(bool(p.get_hatch()) == (word == "modelled") for p in drawn)
        assert (ax.get_facecolor()[0] < 0.95) == (word == "modelled")
    assert kinds == ({"measured": 0, "modelled": 2} if name == "roofline" else {"measured": 2, "modelled": 4})


def test_tables_say_when_and_by_what_they_were_made_and_name_no_machine():
    for path in sorted(RAW.iterdir()):
        text = path.read_text()
        assert not re.search(r"/(home|root|tmp|work|users|scratch)/", text), path
        about = facts(path) if path.suffix == ".csv" else {}
        if path.suffix == ".csv":
            about |= read_table(path).iloc[0].to_dict()
            assert {"created", "git_commit", "hamscale_version"} <= set(about), path
    for name, (_, tables) in PAPER.items():
        assert all((RAW / table).is_file() for table in tables), name


def test_an_ablation_is_drawn_over_the_default():
    table = pd.DataFrame({"variant": ["default", "3 layers", "twice the steps"], "mae_mev": [2.0, 1.0, 9.0]})
    table["mae_mev_onsite"], table["eigenvalue_mae_mev_occupied"] = [10.0, 15.0, 9.0], [30.0, 30.0, 9.0]
    ax = ablations(table, new_figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3 layers"]  # a longer training is no change of the method
    assert [line.get_xdata().tolist() for line in ax.lines[:3]] == [[0.5], [1.5], [1.0]]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = pd.DataFrame({"a": ["x", "y"], "energy_ev": [1.5, 2.0]})
    write_table(tmp_path / "t.csv", table, label="here")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table)
    assert facts(tmp_path / "t.csv")["label"] == "here"


def test_saturation_is_marked_where_the_table_says():
    table = pd.DataFrame(
        {"device": "a", "channels": [16] * 3, "messages": [1, 10, 100], "messages_per_second": [1.0, 9.5, 10.0],
         "saturated": [False, True, True]}
    )  # fmt: skip
    ax = throughput(table, new_figure().subplots())
    rings = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert [tuple(ring.get_xydata()[0]) for ring in rings] == [(10, 9.5)]


def test_a_box_is_drawn_from_the_ranks_of_its_method_alone():
    times = pd.DataFrame({"ranks": 2, "method": ["metis"] * 3 + ["min-nn"] * 3, "compute_s": [1.0, 2, 3, 11, 12, 13]})
    ax = boxes(times.assign(pack_s=0.0, exchange_s=0.5, unpack_s=0.0), new_figure().subplots(), hatched=False)
    medians = sorted({tuple(line.get_ydata()) for line in ax.lines if line.get_color() == "black" and len(line.get_ydata())})
    assert medians == [(2.5, 2.5), (12.5, 12.5)]


def test_domains_that_touch_have_different_colours():
    x, y = np.meshgrid(np.arange(8) * 2.0, np.arange(8) * 2.0)
    table = pd.DataFrame({"x_angstrom": x.ravel(), "y_angstrom": y.ravel(), "z_angstrom": 0.0})
    table["owner"] = (x.ravel() // 4 + 4 * (y.ravel() // 4)).astype(int)
    colour = dict(zip(table["owner"], domain_colours(table, "owner")))
    assert all(colour[o] != colour[o + 1] for o in range(16) if o % 4 < 3)
    assert all(colour[o] != colour[o + 4] for o in range(12))
