"""Write results/index.html: the tables of `analyse` and `view` in one page that needs no server and no other file."""

import base64
import json
from importlib.resources import files as resources
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list

from .files import facts, provenance, read_table

LOWEST, HIGHEST = -3.0, 5.0  # log10 |H| (meV) of the darkest and the brightest colour
BAND_WINDOW_EV = (-12.0, 10.0)
MOST_WITH_BONDS = 3000  # atoms


def index_page(results: str | Path) -> str:
    """Return the page of all structures that have tables under RESULTS/MATERIAL/analysis/MODEL/ID."""
    found = sorted(Path(results).glob("*/analysis/*/*/atoms.csv"))
    if not found:
        raise ValueError(
            f"{results}: no table MATERIAL/analysis/MODEL/ID/atoms.csv. Run the pipeline, or `hamscale view`, first."
        )
    structures = [structure_data(path.parent) for path in found]
    data = json.dumps({"about": provenance(), "range": [LOWEST, HIGHEST], "structures": structures}, separators=(",", ":"))
    template = resources("hamscale").joinpath("page.html").read_text()
    return template.replace("DATA", data.replace("</", "<\\/"), 1)


def structure_data(folder: Path) -> dict:
    """Return what the page shows of one structure, as JSON; without DFT there are no errors, bands and densities of states."""
    material, model, identifier = folder.parts[-4], folder.parts[-2], folder.parts[-1]
    atoms, about = read_table(folder / "atoms.csv"), facts(folder / "atoms.csv")
    owners = {c.removeprefix("owner_").replace("_", "-"): atoms[c].tolist() for c in atoms if c.startswith("owner_")}
    places = atoms[["x_angstrom", "y_angstrom", "z_angstrom"]].to_numpy()
    data = {
        "name": f"{material} / {model} / {identifier}",
        "elements": atoms["element"].tolist(),
        "positions": places.round(3).tolist(),
        "bonds": bonds(Atoms(atoms["element"], places)),
        "cell": about["cell_angstrom"],
        "periodic": about["periodic"],
        "orbitals": about["orbitals"],
        "owners": owners,
        "parts": read_table(folder / "parts.csv").round(3).to_dict("records"),
        "matrices": {"predicted, all orbitals": _image(folder / "image.csv")},
    }
    if not (folder / "summary.csv").is_file():
        return data
    heatmap = pd.read_csv(folder / "heatmap.csv")
    n = int(heatmap["row"].max()) + 1
    for name in ("dft", "predicted"):
        values = np.log10(np.maximum(heatmap[f"{name}_mev"].to_numpy(), 10**LOWEST)).reshape(n, n)
        data["matrices"][f"{'DFT' if name == 'dft' else name} at k = 0, first {n} orbitals"] = _coded(values, n)
    return (
        data
        | {
            "summary": json.loads(pd.read_csv(folder / "summary.csv").round(4).iloc[0].to_json()),
            "errors": json.loads(pd.read_csv(folder / "by_pair.csv").round(4).to_json(orient="records")),
            "bands": _bands(pd.read_csv(folder / "bands.csv")),
            "slabs": {c: v.round(4).tolist() for c, v in pd.read_csv(folder / "slabs.csv").items()},
            "dos": {c: v.round(4).tolist() for c, v in pd.read_csv(folder / "dos.csv").items()},
        }
        | _transmission(folder / "transmission.csv")
    )


def _transmission(path: Path) -> dict:
    """Return T(E), if the analysis was asked for it."""
    if not path.is_file():
        return {}
    return {"transmission": {c: v.round(4).tolist() for c, v in pd.read_csv(path).items()}}


def bonds(atoms: Atoms) -> list[list[int]]:
    """Return pairs of atoms of the cell that are closer than 1.15 times the sum of their covalent radii (ASE), each once.

    Of more than MOST_WITH_BONDS atoms, whose bonds nobody sees, none.
    """
    if len(atoms) > MOST_WITH_BONDS:
        return []
    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15))
    return np.stack([first, second], 1)[first < second].tolist()


def _image(path: Path) -> dict:
    table = read_table(path)
    n = int(table["row"].max()) + 1
    values = np.empty((n, n))
    values[table["row"], table["column"]] = values[table["column"], table["row"]] = table["log10_h_mev"]
    return _coded(values, facts(path)["orbitals"])


def _coded(values: np.ndarray, orbitals: int) -> dict:
    """Encode an image with one byte per pixel: 0 to 255 from LOWEST to HIGHEST."""
    scaled = np.clip((values - LOWEST) / (HIGHEST - LOWEST), 0, 1) * 255
    return {
        "n": len(values),
        "orbitals": orbitals,
        "bytes": base64.b64encode(scaled.round().astype(np.uint8).tobytes()).decode(),
    }


def _bands(table: pd.DataFrame) -> dict:
    """Return the lines of energies by segment, spin and band, and the special points."""
    table = table.assign(label=table["label"].astype(object).fillna(""))
    extremes = table.groupby("band")["dft_ev"].agg(["min", "max"])
    shown = extremes[(extremes["max"] > BAND_WINDOW_EV[0]) & (extremes["min"] < BAND_WINDOW_EV[1])].index
    table = table[table["band"].isin(shown)]
    lines = [
        {"x": line["x_per_angstrom"].round(4).tolist(), "dft": line["dft_ev"].round(3).tolist(),
         "predicted": line["predicted_ev"].round(3).tolist()}
        for _, line in table.groupby(["segment", *(["spin"] if "spin" in table else []), "band"])
    ]  # fmt: skip
    ticks = table[table["label"] != ""].drop_duplicates("x_per_angstrom")
    return {
        "lines": lines,
        "ticks": [[x, label.replace("G", "Γ")] for x, label in zip(ticks["x_per_angstrom"], ticks["label"])],
    }


def tables_page(title: str, tables: dict[str, pd.DataFrame]) -> str:
    """Return a page of tables under headings, for the report, with numbers to three digits."""
    style = "body{font:15px/1.4 sans-serif;margin:1.5em}table{border-collapse:collapse}th,td{padding:3px 9px;text-align:right;"
    style += "border-bottom:1px solid #ccc}th{text-align:left;font-weight:600;vertical-align:bottom}"
    parts = [
        f"<h2>{heading}</h2>"
        + table.rename(columns=lambda name: name.replace("_", " ")).to_html(
            index=False, border=0, na_rep="", float_format=lambda x: f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
        )
        for heading, table in tables.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{''.join(parts)}</html>\n"
    )
