"""Draw figure 8 of the method: a material's H, its errors and what follows from H, for two structures side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from numpy.typing import ArrayLike

from ..figures.structure import bands, decay
from ..figures.style import COLOURS, DFT, ELEMENTS, PAGE_INCHES, PREDICTED, new_figure, panel
from ..files import facts, read_table


def atoms_3d(
    table: pd.DataFrame, ax: Axes3D, colours: Sequence[str], cell_angstrom: ArrayLike, size: float = 4, zoom: float = 1.1
) -> Axes3D:
    """Draw atoms in the box of a cell, which is given by its three lengths or its three vectors.

    The box is centred on the middle of the atoms.
    """
    cell = np.array(cell_angstrom)
    cell = np.diag(cell) if cell.ndim == 1 else cell
    xyz = table[["x_angstrom", "y_angstrom", "z_angstrom"]].to_numpy()
    ax.computed_zorder = False  # draws the box behind the atoms
    ax.scatter(*xyz.T, c=colours, s=size, linewidths=0, depthshade=False, zorder=2)
    corners = np.array(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij")).reshape(3, -1).T
    origin = (xyz.max(0) + xyz.min(0)) / 2 - cell.sum(0) / 2
    for a in corners:
        for axis in np.flatnonzero(a == 0):
            ax.plot(
                *np.transpose([a @ cell + origin, (a + np.eye(3)[axis]) @ cell + origin]), color="0.3", linewidth=0.5, zorder=1
            )
    low, high = (corners @ cell + origin).min(0), (corners @ cell + origin).max(0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    ax.set_box_aspect(high - low, zoom=zoom)
    ax.view_init(elev=24, azim=-60)
    ax.set_axis_off()
    return ax


def error_violins(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw mean absolute errors of node (onsite) and edge (offsite) blocks on a log scale.

    The table has the errors between their 2.5 and 97.5 percentiles.
    """
    labels = list(dict.fromkeys(table["structure_label"]))
    for k, label in enumerate(labels):
        for shift, onsite, colour in ((-0.2, True, COLOURS[2]), (0.2, False, COLOURS[0])):
            chosen = (table["structure_label"] == label) & (table["onsite"] == onsite)
            values = np.log10(table["block_mae_mev"][chosen])
            body = ax.violinplot(values, [k + shift], widths=0.36, showmedians=True)
            bodies = cast(list[Collection], body["bodies"])  # of all entries this one is a list
            for part in (*bodies, body["cmins"], body["cmaxes"], body["cbars"], body["cmedians"]):
                part.set_color(colour)
                part.set_linewidth(0.8)
            if k == 0:
                bodies[0].set_label("nodes" if onsite else "edges")
    low, high = np.log10(table["block_mae_mev"].agg(["min", "max"]))
    decades = np.arange(np.floor(low), np.ceil(high) + 1)
    ax.set_yticks(decades, [f"$10^{{{d:.0f}}}$" for d in decades])
    ax.set_ylim(decades[0], decades[-1] + 0.5)
    ax.set_xticks(range(len(labels)), [label.replace(" (", "\n(") for label in labels])
    ax.set(ylabel="error of a block (meV)", xlim=(-0.5, len(labels) - 0.5))
    ax.legend(loc="upper right", ncols=2)
    return ax


def h_image(table: pd.DataFrame, ax: Axes, orbitals: int) -> Axes:
    """Draw log10 |H| of a whole structure; a pixel shows the largest element under it."""
    n = int(table["row"].max()) + 1
    image = np.empty((n, n))
    image[table["row"], table["column"]] = image[table["column"], table["row"]] = table["log10_h_mev"]
    picture = ax.imshow(image, cmap="viridis", extent=(0, orbitals, orbitals, 0), interpolation="nearest")
    ax.figure.colorbar(picture, ax=ax, label="log10 |H| (meV)")
    ax.set(xlabel="orbital", ylabel="orbital")
    return ax


def figure_8(raw: Path) -> Figure:
    names = ("summary", "decay", "blocks", "bands", "dos", "atoms", "image")
    t, about = {name: read_table(raw / f"fig8_{name}.csv") for name in names}, facts(raw / "fig8_atoms.csv")
    labels = list(t["summary"]["structure_label"])
    cutoff = t["summary"]["cutoff_angstrom"].iloc[0]
    of = lambda name, label: t[name][t[name]["structure_label"] == label]  # noqa: E731
    figure = new_figure(PAGE_INCHES, 7.4)
    matrices, tiled, spectra = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1.1, 1.05)).ravel()
    top = matrices.subplots(1, 3)
    for letter, label, ax in zip("ab", labels, top):
        panel(decay(of("decay", label), ax, cutoff), letter, label)
        ax.set_ylim(1e-3, 1e5)
        handles, names = ax.get_legend_handles_labels()
        of_axes = slice(0, -1) if letter == "a" else slice(-1, None)  # one legend has the pairs, the other the cutoff
        ax.legend(
            handles[of_axes],
            names[of_axes],
            markerscale=6,
            loc="upper right",
            handletextpad=0.3,
            frameon=True,
            edgecolor="none",
        )
    panel(error_violins(t["blocks"], top[2]), "c", "errors of held-out cells")
    picture, image = (
        tiled.add_subplot(1, 2, 1, projection="3d"),
        tiled.add_subplot(1, 2, 2),
    )
    atoms_3d(t["atoms"], picture, [ELEMENTS.get(e, "0.5") for e in t["atoms"]["element"]], about["cell_angstrom"], size=22)
    panel(picture, "d", f"{about['label']}, {len(t['atoms']):,} atoms")
    for element in dict.fromkeys(t["atoms"]["element"]):
        picture.scatter([], [], [], color=ELEMENTS.get(element, "0.5"), label=element)
    picture.legend(loc="center left", bbox_to_anchor=(-0.35, 0.5), markerscale=0.8)
    panel(h_image(t["image"], image, about["orbitals"]), "e", "its predicted H")
    bottom = spectra.subplots(1, 2 * len(labels), width_ratios=(1.3, 1) * len(labels), sharey=True)
    for k, label in enumerate(labels):
        band, density = bottom[2 * k], bottom[2 * k + 1]
        panel(bands(of("bands", label), band, legend=False), "fh"[k], f"bands, {label.split(' (')[0]}")
        density_of_states(of("dos", label), density)
        panel(density, "gi"[k], "DOS")
    # shows about forty bands of the largest structure, because more lines would merge into a surface
    near = t["bands"][t["bands"]["dft_ev"].abs() < 2].groupby("structure_label")["dft_ev"]
    bands_per_ev = max(len(e) / 4 / t["bands"][t["bands"]["structure_label"] == n]["x_per_angstrom"].nunique() for n, e in near)
    height = float(np.clip(20 / bands_per_ev, 1, 6.5))
    bottom[0].set_ylim(-height, height)
    for ax in bottom[1:]:
        ax.set_ylabel("")
    handles, names = bottom[0].get_legend_handles_labels()
    spectra.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def density_of_states(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw densities of states with the energy axis upwards, to stand beside bands."""
    ax.plot(table["dft_states_per_ev"], table["energy_ev"], "-", color=DFT)
    ax.plot(table["predicted_states_per_ev"], table["energy_ev"], "--", color=PREDICTED)
    ax.set(xlabel="states per eV", xlim=(0, None))
    return ax
