"""The page of all materials, in a real browser."""

import json
import re
from dataclasses import replace

import ase.build
import numpy as np
import pandas as pd
import pytest

from hamscale.analysis.tables import analysis_tables
from hamscale.analysis.views import image_table, view_tables
from hamscale.cli import main
from hamscale.config import Analysis, Transmission
from hamscale.files import write_table, write_text
from hamscale.page import bonds, index_page
from hamscale.paper import figure_8_tables
from helpers import hafnia, model_hamiltonian


@pytest.fixture(scope="module")
def results(tmp_path_factory, szv):
    """Tables of a structure with DFT, and of a tiled one without."""
    root = tmp_path_factory.mktemp("results")
    dft = model_hamiltonian(hafnia(), szv)
    noise = np.random.default_rng(0).normal(0, 1e-4, len(dft.hamiltonian))
    attributes = {"cutoff_angstrom": 6.0, "wall_seconds": 1.0, "model": "tiny"}
    predicted = replace(dft, hamiltonian=dft.hamiltonian + (noise + dft.transposed(noise)) / 2, attributes=attributes)
    tiled = model_hamiltonian(hafnia().repeat((2, 2, 1)), szv)
    tiled.attributes |= attributes
    test = root / "toy" / "analysis" / "tiny" / "test-000"
    analysis = Analysis(kgrid=(1, 1, 1), band_points=20, transmission=Transmission(kgrid=(2, 2, 8), window_ev=8))
    for name, table in analysis_tables(dft, predicted, predicted, analysis, {}).items():
        write_text(test / f"{name}.csv", table.to_csv(index=False))
    for identifier, operators in (("test-000", predicted), ("tiled-000", tiled)):
        about = {
            "cell_angstrom": operators.atoms.cell.tolist(),
            "periodic": operators.atoms.pbc.tolist(),
            "orbitals": operators.n_orbitals,
            "model": "tiny",
        }
        for name, table in view_tables(operators, parts=4, pixels=40).items():
            write_table(root / "toy" / "analysis" / "tiny" / identifier / f"{name}.csv", table, **about)
    return root


@pytest.fixture(scope="module")
def page(results):
    assert main(["index", "--results", str(results), "--out", str(results / "index.html")]) == 0
    return results / "index.html"


def is_drawn(driver, canvas) -> int:
    """How many colours a canvas has."""
    return driver.execute_script(
        "const c = document.getElementById(arguments[0]), copy = new OffscreenCanvas(c.width, c.height).getContext('2d');"
        "copy.drawImage(c, 0, 0); const {data} = copy.getImageData(0, 0, c.width, c.height);"
        "return new Set(new Uint32Array(data.buffer)).size",
        canvas,
    )


def test_the_page_shows_everything_asks_for_nothing_and_zooms(page, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    driver = browser.open(page)
    for canvas in ("structure", "matrix", "bands", "dos", "transmission", "slabs"):
        assert is_drawn(driver, canvas) > 3, canvas
    rows = lambda table: len(driver.find_elements(By.CSS_SELECTOR, f"#{table} tr"))  # noqa: E731
    assert (rows("parts"), rows("errors")) == (1 + 3, 1 + 5)
    assert "error of H" in driver.find_element(By.ID, "facts").text

    matrix = driver.find_element(By.ID, "matrix")
    zoom = lambda: float(matrix.get_attribute("data-zoom"))  # noqa: E731
    assert zoom() == 1
    whole = matrix.screenshot_as_base64
    driver.find_element(By.ID, "nearer").click()
    assert zoom() == 2
    assert matrix.screenshot_as_base64 != whole
    driver.execute_script(
        "const b = arguments[0].getBoundingClientRect();"
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -150, clientX: b.left + 50, clientY: b.top + 50}))",
        matrix,
    )
    assert zoom() == pytest.approx(2 * np.e**0.5, rel=1e-3)
    driver.find_element(By.ID, "whole").click()
    assert matrix.screenshot_as_base64 == whole

    by_element = driver.find_element(By.ID, "structure").screenshot_as_base64
    Select(driver.find_element(By.ID, "colours")).select_by_value("min-nn")
    assert driver.find_element(By.ID, "structure").screenshot_as_base64 != by_element

    Select(driver.find_element(By.ID, "which")).select_by_value("toy / tiny / tiled-000")
    assert not driver.find_element(By.ID, "bands").is_displayed()  # no DFT of it
    assert is_drawn(driver, "matrix") > 3
    assert browser.console() == []
    assert browser.requests() == [page.resolve().as_uri()]


def test_a_phone_shows_the_page_without_scrolling_sideways_and_paper_in_one_column(page, browser):
    driver = browser.open(page)
    device = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    try:
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert is_drawn(driver, "structure") > 3
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert driver.execute_script("return getComputedStyle(document.querySelector('main')).display") == "block"
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bonds_are_those_of_neighbours():
    """Of a water molecule the two to hydrogen; of a crystal those within the cell, each once; of a large one none."""
    assert bonds(ase.build.molecule("H2O")) == [[0, 1], [0, 2]]
    crystal = ase.build.bulk("Si", cubic=True)
    expected = [[i, j] for i in range(8) for j in range(i) if 0 < crystal.get_distance(i, j) < 2.5]
    crystal.pbc = False
    assert sorted(map(sorted, bonds(crystal))) == sorted(map(sorted, expected))
    assert bonds(crystal.repeat((8, 8, 8))) == []


def test_what_is_embedded_is_what_the_tables_say(page, results):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    by_name = {s["name"]: s for s in data["structures"]}
    summary = pd.read_csv(results / "toy" / "analysis" / "tiny" / "test-000" / "summary.csv").iloc[0]
    assert by_name["toy / tiny / test-000"]["summary"]["mae_mev"] == pytest.approx(summary["mae_mev"], abs=1e-4)
    assert "summary" not in by_name["toy / tiny / tiled-000"]


def test_a_folder_without_tables_is_told(tmp_path):
    with pytest.raises(ValueError, match="Run the pipeline"):
        index_page(tmp_path)


def test_a_pixel_is_the_largest_element_under_it(dft):
    table = image_table(dft, pixels=5)
    n, largest = dft.n_orbitals, np.zeros((5, 5))
    start = np.concatenate([[0], np.cumsum(dft.orbitals)])
    for b, (i, j, *_) in enumerate(dft.pairs):
        block = np.abs(dft.block(dft.hamiltonian, b))
        for (a, c), value in np.ndenumerate(block):
            pixel = (start[i] + a) * 5 // n, (start[j] + c) * 5 // n
            largest[pixel] = max(largest[pixel], value)
    expected = np.log10(np.maximum(largest[table["row"], table["column"]] * 27211.386, 1e-3))
    np.testing.assert_allclose(table["log10_h_mev"], expected, atol=0.006)


def test_tables_of_figure_8_carry_the_label_of_each_structure(results):
    test = results / "toy" / "analysis" / "tiny" / "test-000"
    tables = figure_8_tables({"amorphous": test, "crystal": test}, results / "toy" / "analysis" / "tiny" / "tiled-000")
    for name in ("summary", "decay", "blocks", "bands", "dos"):
        assert set(tables[name]["structure_label"]) == {"amorphous", "crystal"}
    assert len(tables["atoms"]) == 12
