"""The site: its reference has no gaps, it is built without a warning, its links lead somewhere, and Chromium shows it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from hamscale.config import Config, Material, Model, Section

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from reference import commands, commands_page, fields_page, sections, unit  # noqa: E402

# what a name ends with -> the unit that its description is to have
SUFFIXES = {
    "_per_fs": "1/fs", "_g_cm3": "g/cm^3", "_angstrom": "A", "_kelvin": "K", "_fs": "fs", "_ry": "Ry", "_hartree": "Ha",
    "_mev": "meV", "_gib": "GiB",
}  # fmt: skip
SECTIONS = {f"{file.__name__} {path}": section for file in (Material, Model, Config) for path, section in sections(file)}


def test_every_section_that_can_be_reached_is_in_the_reference():
    """Found here in another way: all that inherits from Section."""
    assert set(SECTIONS.values()) == set(Section.__subclasses__())
    assert "Material structures.NAME.melt_quench" in SECTIONS


@pytest.mark.parametrize("name", SECTIONS)
def test_every_field_has_a_description_with_its_unit(name):
    section = SECTIONS[name]
    assert section.__doc__ != Section.__doc__, f"{section.__name__} has no docstring"
    for field, about in section.model_fields.items():
        assert about.description, f"{name}.{field} has no description"
        suffix = next((suffix for suffix in SUFFIXES if field.endswith(suffix)), None)
        assert suffix is None or unit(about.description) == SUFFIXES[suffix], f"{name}.{field}: {about.description}"


def test_every_command_and_argument_has_a_description():
    for name, parser in commands().items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, f"hamscale {name}: {action.dest} has no help"


def test_the_reference_has_types_defaults_and_limits():
    page = fields_page(Material, "Material", "").splitlines()
    rows = {row.split(" | ")[0]: row for row in page if row.startswith("| `")}
    assert rows["| `cutoff_ry`"] == (
        "| `cutoff_ry` | number | Ry | `400.0` | > 0 | plane-wave cutoff of the finest grid (Ry) |"
    )
    assert "| integer |  | required | at least 1; at most 230 |" in rows["| `spacegroup`"]
    text = commands_page()
    assert "| `--parts` | integer | required | number of ranks |" in text
    assert "| `--method` | `low-nn`, `metis`, `min-nn` | `min-nn` |" in text


@pytest.fixture(scope="module")
def site(mkdocs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


class Page(HTMLParser):
    """The anchors of a page, and the addresses that it names: (tag, address)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: list[tuple[str, str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.anchors |= {of[name] or "" for name in ("id", "name") if name in of}
        self.addresses += [(tag, of[name] or "") for name in ("href", "src") if name in of]


def test_every_link_inside_the_site_leads_somewhere_and_nothing_is_loaded_from_outside(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 25
    for path, page in pages.items():
        for tag, address in page.addresses:
            of = urlsplit(address)
            if of.scheme:
                assert tag == "a", f"{path.name}: <{tag}> loads {address}"
                continue
            if path.name == "404.html":  # which a server gives for any address: its links begin with a slash
                continue
            target = (path.parent / unquote(of.path)).resolve() if of.path else path
            assert target.is_file(), f"{path.name}: {address}"
            if of.fragment and target in pages:
                assert unquote(of.fragment) in pages[target].anchors | {"__skip"}, f"{path.name}: {address}"


def test_the_examples_have_run(site):
    """Each piece of code is followed by what it printed or drew."""
    article = (site / "examples.html").read_text()
    assert "Hf4O8 with 72 orbitals" in article
    assert re.search(r"gap \d\.\d\d eV", article)
    assert article.count("<svg xmlns:xlink") == 3


def test_the_site_opens_in_a_browser_without_a_server(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import element_to_be_clickable
    from selenium.webdriver.support.ui import WebDriverWait

    driver = browser.open(site / "index.html")
    wait = WebDriverWait(driver, 120)
    picture = driver.find_element(By.CSS_SELECTOR, "article img")
    assert wait.until(lambda _: picture.get_property("naturalWidth")) > 900
    driver.find_element(By.LINK_TEXT, "Tutorial").click()
    wait.until(lambda d: d.current_url.endswith("tutorial.html"))
    driver.get((site / "method.html").as_uri())
    formulas = driver.find_elements(By.TAG_NAME, "math")
    assert len(formulas) > 50
    assert not [f.text for f in formulas if "\\" in f.text]
    assert max(f.size["height"] for f in formulas) > 40  # fractions and sums are set as such, not in a line of text
    driver.get((site / "reference" / "material.html").as_uri())
    assert "plane-wave cutoff of the finest grid" in driver.find_element(By.TAG_NAME, "article").text
    field = wait.until(element_to_be_clickable((By.CSS_SELECTOR, "input.md-search__input")))
    field.click()
    field.send_keys("kpoint_length_angstrom")
    found = wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, ".md-search-result__item a"))
    assert any("material.html" in link.get_attribute("href") for link in found)
    assert [message for level, message in browser.console() if level == "SEVERE"] == []
    assert {urlsplit(url).scheme for url in browser.requests()} == {"file"}
