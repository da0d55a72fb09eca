"""What a transmission costs, and how far that of a model is from DFT's.

python benchmarks/transmission.py time FILE [--copies 2 2 81 --leads 384 384] --out resources/raw/transmission_time.csv
python benchmarks/transmission.py errors --model MODEL --material M.yaml --dft FILES... --out OUT
python benchmarks/transmission.py device --model MODEL --dft FILE --leads 16 16 --kpoint 0.25 0.25 --out OUT

FILE: operators of DFT. `time`: processor and wall seconds, and peak memory, of T(E) of a cell from its bands on 8 x 8 lines of
32 points, 1,000 energies; with `--leads`, of a device of so many copies by Green's functions, at one k and 100 energies, on the
cores of OMP_NUM_THREADS. A row is added to the table. `errors`: sum |T - T_dft| / sum T_dft of a model and of its reference
alone, smeared at 300 K, up to `--window` eV beyond the band edges, for cells. `device`: the same at one k of a device, also
before it is smeared.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd

from hamscale.analysis import greens, transmission
from hamscale.analysis.devices import assemble, cut
from hamscale.analysis.spectra import compare_spectra
from hamscale.analysis.transmission_tables import transmission_summary, transmission_table
from hamscale.config import Analysis, Transmission, load_material
from hamscale.files import read_table, write_table
from hamscale.operators import read_operators
from hamscale.predict import predict
from hamscale.units import ev_to_hartree


def cost(path: Path, copies: list[int], leads: list[int] | None) -> dict:
    operators = read_operators(path).repeat(copies)
    before, wall = _seconds(), time.perf_counter()
    if leads:
        found = greens.of_device(operators, "c", leads, (1, 1, 1), points=100)
        blocks = found.about["blocks_orbitals"]
    else:
        found, blocks = transmission.of_bands(operators, "c", (8, 8, 32)), []
    used, wall = _seconds() - before, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "structure": operators.atoms.get_chemical_formula(),
        "orbitals": operators.n_orbitals,
        "method": found.about["method"],
        "blocks": len(blocks),
        "largest_block": max(blocks, default=0),
        "energies": len(found.energies),
        "cpu_seconds": used,
        "wall_seconds": wall,
        "peak_gib_at_most": peak / 2**20,
    }


def _seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _compared(model: Path, path: Path, analysis: Analysis):
    dft = read_operators(path)
    others = [predict(model, dft.atoms, reference_only=only).operators() for only in (False, True)]
    return (dft, *others), compare_spectra(dft, *others, analysis)


def errors(model: Path, path: Path, analysis: Analysis) -> dict:
    operators, comparison = _compared(model, path, analysis)
    table = transmission_table(operators, comparison, analysis, None)
    return {"structure": path.stem, "model": model.name} | transmission_summary(table, comparison)


def device(model: Path, path: Path, leads: list[int], kpoint: list[float], window_ev: float) -> list[dict]:
    operators, comparison = _compared(model, path, Analysis(kgrid_length_angstrom=20))
    energies, eta = transmission.window(comparison.levels[0], window_ev, 200), ev_to_hartree(greens.ETA_EV)
    valence, rows, of_dft = energies < comparison.levels[0].mid_gap, [], {}
    parts = {"relative_error": slice(None), "relative_error_valence": valence, "relative_error_conduction": ~valence}
    for name, o, shift in zip(("dft", "predicted", "reference"), operators, (0.0, *comparison.shifts)):
        chain = assemble(o, cut(o.atoms, o.pairs, 2, leads), np.array([*kpoint, 0.0]))
        sharp = np.array([greens.chain_transmission(chain, eta, energy - shift) for energy in energies])
        smeared = transmission.smear(energies, energies, (sharp[1:] + sharp[:-1])[None] / 2, 300.0)[0]
        for kind, T in (("sharp", sharp), ("smeared at 300 K", smeared)):
            dft = of_dft.setdefault(kind, T)
            found = {part: float(np.abs(T - dft)[within].sum() / dft[within].sum()) for part, within in parts.items()}
            rows.append({"structure": path.stem, "operators": name, "t": kind} | found)
    return rows


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    of_time, of_errors, of_device = (commands.add_parser(name) for name in ("time", "errors", "device"))
    of_time.add_argument("file", type=Path)
    of_time.add_argument("--copies", type=int, nargs=3, default=(1, 1, 1))
    for command in (of_errors, of_device):
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--dft", type=Path, nargs="+", required=True)
        command.add_argument("--window", type=float, default=2.0)
    of_errors.add_argument("--material", required=True)
    of_device.add_argument("--kpoint", type=float, nargs=2, required=True)
    for command in (of_time, of_device):
        command.add_argument("--leads", type=int, nargs=2)
    for command in (of_time, of_errors, of_device):
        command.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    if o.command == "time":
        rows = [cost(o.file, o.copies, o.leads)]
        if o.out.is_file():
            rows = [*read_table(o.out).to_dict("records"), *rows]
    elif o.command == "errors":
        settings = load_material(o.material).analysis.model_dump() | {"transmission": Transmission(window_ev=o.window)}
        rows = [errors(o.model, path, Analysis.model_validate(settings)) for path in o.dft]
    else:
        rows = [row for path in o.dft for row in device(o.model, path, o.leads, o.kpoint, o.window)]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    write_table(o.out, table)


if __name__ == "__main__":
    main()
