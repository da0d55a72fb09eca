"""Hooks of MkDocs: add the reference and the pages of the root to the site, and turn formulas into MathML.

Browsers show MathML by themselves, so that the site needs no script from elsewhere.
"""

import html
import re
import sys
import unicodedata
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from reference import generated_pages  # noqa: E402

# pages of the site that the root of the repository holds
OF_ROOT = {
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the pages of the repository's root."""
    pages = generated_pages()
    for source, name in OF_ROOT.items():
        pages[name] = (ROOT / source).read_text().replace("](docs/", "](")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _letter(match: re.Match) -> str:
    """Write a bold or script letter as the character that it is in Unicode: browsers know `mathvariant` as `normal` alone."""
    kind, letter = match[1].upper(), match[2]
    case = "CAPITAL" if letter.isupper() else "SMALL"
    try:
        return f"<mi>{unicodedata.lookup(f'MATHEMATICAL {kind} {case} {letter.upper()}')}</mi>"
    except KeyError:  # script letters that Unicode had before
        return f"<mi>{unicodedata.lookup(f'{kind} {case} {letter.upper()}')}</mi>"


def mathml(latex: str, display: str) -> str:
    """Return a formula as MathML, `display` it `inline` or as a `block`."""
    prime = "&#x02032;"  # is raised by itself
    text = re.sub(
        rf"<msup>(<mi>\w</mi>)<mi>{prime}</mi></msup>",
        rf"<mrow>\1<mo lspace='0' rspace='0'>{prime}</mo></mrow>",
        convert(latex, display=display),
    )
    return re.sub(r'<mi mathvariant="(bold|script)">([A-Za-z])</mi>', _letter, text)


def on_page_content(content: str, **_: object) -> str:
    """Turn the formulas that Arithmatex has marked into MathML."""

    def formula(match: re.Match) -> str:
        latex = html.unescape(match[2]).strip()[2:-2].strip()
        return mathml(latex, "block" if match[1] == "div" else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)
