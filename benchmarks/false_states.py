"""Where states lie along directions that S nearly misses, in DFT and in predictions.

python benchmarks/false_states.py lengths FILES... --out resources/raw/false_states.csv
python benchmarks/false_states.py lifted --material config/materials/mos2.yaml --models MODEL... --dft FILES... --out OUT

FILES: operators of DFT, results/M/operators/ID.h5. `lengths`: of every structure the smallest eigenvalue of S, and for ranges
of energy above the highest occupied state the largest and the mean v^+ v of the states (v^+ S v = 1), at random k-points. A
state with a large v^+ v lies along directions that S nearly misses: such states belong high, and one near the gap is suspect
(`hamscale.analysis.false_states`). `lifted`: predictions of models as they are and lifted (`hamscale.graph.lifting`), each
beside DFT: errors, false states, suspect ones. Rows of other materials stay.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from hamscale.analysis.errors import block_errors, error_summary
from hamscale.analysis.false_states import false_state_summary, looked_at
from hamscale.analysis.spectra import compare_spectra, spectral_summary
from hamscale.config import Material, load_material
from hamscale.files import read_table, write_table
from hamscale.operators import read_operators
from hamscale.predict import predict
from hamscale.units import hartree_to_ev
from hamscale.workers import eigh

EDGES_EV = (-np.inf, 0.01, 4.0, 8.0, 20.0, 60.0, np.inf)
KPOINTS = 8


def lengths(path: Path) -> list[dict]:
    """A row per range of energy of one structure."""
    operators = read_operators(path)
    occupied, energies, squares, smallest = operators.n_electrons // 2, [], [], []
    for k in looked_at(operators)[:KPOINTS]:
        H, S = operators.at_k(k)
        e, v = eigh(H, S)
        energies.append(hartree_to_ev(e - e[occupied - 1]))
        squares.append(np.square(np.abs(v)).sum(0))
        smallest.append(np.linalg.eigvalsh(S)[0])
    energies, squares = np.concatenate(energies), np.concatenate(squares)
    rows = []
    for low, high in zip(EDGES_EV, EDGES_EV[1:]):
        within = squares[(energies >= low) & (energies < high)]
        if len(within):
            rows.append({"from_ev": low, "to_ev": high, "largest": within.max(), "mean": within.mean(), "states": len(within)})
    names = {"material": path.parents[1].name, "structure": path.stem, "orbitals": operators.n_orbitals}
    return [names | {"smallest_overlap_eigenvalue": min(smallest)} | row for row in rows]


def lifted(model: Path, path: Path, material: Material) -> list[dict]:
    """A row for the prediction as it is and one for the lifted one."""
    dft, rows = read_operators(path), []
    reference = predict(model, dft.atoms, reference_only=True).operators()
    for lifts in (False, True):
        predicted = predict(model, dft.atoms, lifted=lifts).operators()
        spectra = compare_spectra(dft, predicted, reference, material.analysis)
        of_h = error_summary(block_errors(dft, predicted, float(predicted.attributes["cutoff_angstrom"])))
        summary = spectral_summary(spectra)
        rows.append(
            {"material": path.parents[1].name, "structure": path.stem, "model": model.name, "lifted": lifts}
            | {"mae_mev": of_h["mae_mev"]}
            | {name: summary[name] for name in ("eigenvalue_mae_mev_occupied", "gap_dft_ev", "gap_predicted_ev")}
            | false_state_summary(dft, predicted, spectra.levels[0], spectra.shifts[0])
            | {name: predicted.attributes.get(name, 0.0) for name in ("lifted_states", "lifted_mean_change_mev")}
        )
    return rows


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    of_dft = commands.add_parser("lengths")
    of_dft.add_argument("dft", nargs="+", type=Path)
    of_models = commands.add_parser("lifted")
    of_models.add_argument("--material", required=True)
    of_models.add_argument("--models", nargs="+", type=Path, required=True)
    of_models.add_argument("--dft", nargs="+", type=Path, required=True)
    for command in (of_dft, of_models):
        command.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    if o.command == "lengths":
        rows = [row for path in o.dft for row in lengths(path)]
    else:
        material = load_material(o.material)
        rows = [row for model in o.models for path in o.dft for row in lifted(model, path, material)]
    table = pd.DataFrame(rows)
    if o.command == "lifted" and o.out.is_file():
        others = read_table(o.out)
        table = pd.concat([others[~others["material"].isin(table["material"])], table], ignore_index=True)
    print(table.to_string(index=False))
    write_table(o.out, table)


if __name__ == "__main__":
    main()
