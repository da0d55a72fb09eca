"""Compare the transmission of a prediction and of the reference with DFT's."""

import pandas as pd

from ..config import Analysis, Transmission, Transport
from ..operators import Operators
from ..units import ev_to_hartree, hartree_to_ev
from . import greens
from .spectra import Comparison
from .transmission import POINTS, axis_of, band_lines, conductances, lines_across, transport_grid, window

NAMES = ("dft", "predicted", "baseline")


def transmission_table(
    operators: tuple[Operators, Operators, Operators], c: Comparison | None, analysis: Analysis, transport: Transport | None
) -> pd.DataFrame | None:
    """Compute the smeared T(E) of DFT, the prediction and the reference; None if nobody asks for it.

    Columns: energy_ev, from `Comparison.edge`, dft, predicted, baseline. The energies reach by window_ev beyond DFT's
    band edges; those of the prediction and the reference are shifted as eigenvalues are. c: None if spectra are not compared.
    transport: the structure is a device.
    """
    if c is None or (analysis.transmission is None and transport is None):
        return None
    settings, kelvin = analysis.transmission or Transmission(), analysis.temperature_kelvin
    energies = window(c.levels[0], settings.window_ev, settings.points or (greens.POINTS if transport else POINTS))
    columns = {"energy_ev": hartree_to_ev(energies - c.edge)}
    for name, o, shift in zip(NAMES, operators, (0.0, *c.shifts)):
        if transport:
            smeared = greens.of_device(
                o, transport.axis, transport.leads, transport.kgrid, temperature_kelvin=kelvin, energies=energies - shift
            ).smeared
        else:
            axis = axis_of(o.atoms, settings.axis)
            counts = transport_grid(o.atoms, axis, settings.kgrid)
            threshold = 0.0 if name == "dft" else analysis.overlap_threshold
            lines = band_lines(o, axis, counts[axis], *lines_across(counts, axis), overlap_threshold=threshold)
            smeared = lines.smeared(energies - shift, kelvin)
        columns[name] = smeared.mean(0)
    return pd.DataFrame(columns)


def transmission_summary(table: pd.DataFrame, c: Comparison) -> dict[str, float]:
    """Return the relative errors sum |T - T_dft| / sum T_dft of the prediction and of the reference, and T at the band edges.

    T of each is at its own band edges and in the middle of its own gap, or at its own Fermi level.
    """
    error = lambda name: float((table[name] - table["dft"]).abs().sum() / table["dft"].sum())  # noqa: E731
    result = {"transmission_error": error("predicted"), "baseline_transmission_error": error("baseline")}
    energies = ev_to_hartree(table["energy_ev"].to_numpy()) + c.edge
    for name, levels in zip(NAMES[:2], c.levels):
        at = conductances(energies, table[name].to_numpy(), levels)
        result |= {f"{place}_{name}": T for place, T in at.items()}
    return result
