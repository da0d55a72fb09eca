"""How true the potential is along structures longer than the training cells.

    python benchmarks/long_waves.py --out resources/raw/long_waves.csv

Fits references to the training structures of results/MATERIAL (`make hfo2`, `make gst`, config/silicon_device.yaml), with
potentials of charges and without them (`graph: {far: false}`), and writes a row per reference and test structure: the largest
error of the mean potential of a slab along the longest cell vector, how far DFT's slabs and the reference's lie apart, and the
error of the occupied eigenvalues. No network. Rows of rattled silicon, 36 cells long, are of the reference alone: no DFT of
them is made.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers

from hamscale.analysis.slabs import atom_potentials, slab_errors, slab_table
from hamscale.analysis.spectra import compare_spectra, spectral_summary
from hamscale.config import load_material
from hamscale.files import write_table
from hamscale.graph.codec import BlockCodec
from hamscale.graph.crystal_field import Ions
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import Reference, fit_reference
from hamscale.operators import Operators, read_operators
from hamscale.units import hartree_to_ev

MATERIALS = ("silicon_device", "hfo2", "gst124")
SEEDS = range(3)


def of_reference(reference: Reference, atoms: Atoms) -> Operators:
    """H of the reference alone."""
    graph = structure_graph(atoms, reference.basis, reference.cutoff_angstrom)
    return BlockCodec(reference).decode(graph, {}, {}).operators()


def rattled_silicon(reference: Reference, cells: int, seed: int) -> float:
    """Peak to peak of the mean potential of the cells of a rattled column of silicon, eV."""
    atoms = bulk("Si", "diamond", a=5.431, cubic=True).repeat((1, 1, cells))
    cell = (atoms.get_scaled_positions()[:, 2] % 1 * cells).astype(int)
    atoms.rattle(0.1, seed=seed)
    u = hartree_to_ev(atom_potentials(of_reference(reference, atoms)))
    return float(np.ptp([u[cell == k].mean() for k in range(cells)]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out, rows = parser.parse_args().out, []
    for name in MATERIALS:
        material = load_material(f"config/materials/{name}.yaml")
        read = lambda id, name=name: read_operators(f"results/{name}/operators/{id}.h5")  # noqa: E731
        train, test = ([read(id) for id in material.identifiers(split)] for split in ("train", "test"))
        charges = {atomic_numbers[element]: charge for element, charge in material.graph.charges.items()}
        for far in (True, False):
            reference = fit_reference(
                train, material.graph.cutoff_angstrom, ions=Ions(material.graph.near_angstrom, charges, far)
            )
            known = {"material": name, "far": far}
            for id, dft in zip(material.identifiers("test"), test):
                made = of_reference(reference, dft.atoms)
                slabs = slab_table(dft, made, made, material.analysis.slab_angstrom)
                spectrum = spectral_summary(compare_spectra(dft, made, made, material.analysis))
                apart = {f"{key}_ev": np.ptp(slabs[f"{of}_ev"]) for key, of in (("dft_apart", "dft"), ("apart", "predicted"))}
                rows.append(
                    known
                    | {
                        "structure": id,
                        "atoms": len(dft.atoms),
                        "slabs": len(slabs),
                        "error_ev": slab_errors(slabs)["slab_error_ev"],
                    }
                    | apart
                    | {"eigenvalue_mae_mev_occupied": spectrum["eigenvalue_mae_mev_occupied"]}
                )
                print(rows[-1], flush=True)
            for seed in SEEDS if name == "silicon_device" and far else ():
                rows.append(known | {"structure": f"rattled 1x1x36, seed {seed}", "atoms": 288, "slabs": 36})
                rows[-1]["apart_ev"] = rattled_silicon(reference, 36, seed)
                print(rows[-1], flush=True)
    write_table(out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
