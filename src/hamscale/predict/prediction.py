"""Predict H and S of a structure, in memory or written piece by piece, on any number of ranks."""

import json
import shutil
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from ..analysis.false_states import Suspects, find_suspects
from ..analysis.levels import UNKNOWN
from ..analysis.spectra import K_GRID, find_levels
from ..config import Analysis
from ..container import MADE_OF
from ..files import TOKEN, scratch
from ..graph.codec import DecodedBlocks
from ..graph.lifting import lift
from ..operators import (
    SHARD,
    Operators,
    join_shards,
    move_operators,
    read_operators,
    shard_path,
    store_levels,
    write_operators,
    write_pieces,
)
from ..parallel.env import World
from ..structures import check_same_structure
from .model import Residual, TrainedModel
from .self_consistent import ChargeLoop

# largest number of orbitals for which band edges are computed during a prediction; `hamscale dos` handles more
LARGEST_DENSE = 2000


@dataclass(frozen=True)
class Prediction:
    """H and S of a structure, or of a rank's rows of it, which `operators` computes in memory and `write` in a file.

    attributes: the origin of the prediction, as written to the file; wall_seconds among them grows by the time that
    computing H and S takes.
    lifted: whether states along directions that S nearly misses are lifted to where DFT has them (graph/lifting.py).
    loop: what makes charges self-consistent (self_consistent.py); None: H is that of one pass.

    prediction = predict("resources/models/hfo2", ase.io.read("cell.extxyz"))
    prediction.operators().at_k([0, 0, 0])
    """

    blocks: DecodedBlocks
    attributes: dict
    lifted: bool = False
    loop: ChargeLoop | None = None

    @property
    def whole(self) -> bool:
        """Tell whether H is complete in memory at some time."""
        return self.lifted or self.loop is not None

    def operators(self) -> Operators:
        """Compute all of H and S in memory."""
        started = time.time()
        operators = self._finish(self.blocks.operators())
        return replace(operators, attributes=self._attributes(started) | operators.attributes)

    def _finish(self, operators: Operators) -> Operators:
        """Make charges self-consistent and lift states, and note in the attributes what was done."""
        if self.loop:
            operators = self.loop(operators, lambda found: self._lift(found)[0])
        found, attributes = self._lift(operators)
        return replace(found, attributes=operators.attributes | attributes)

    def _lift(self, operators: Operators) -> tuple[Operators, dict]:
        """Lift states where that is wanted; return the operators and the attributes that say what was done."""
        if not self.lifted:
            return operators, {}
        found, done = lift(operators, self.blocks.reference.floor_hartree)
        return found, done.attributes()

    def _attributes(self, started: float) -> dict:
        return self.attributes | {"wall_seconds": self.attributes["wall_seconds"] + time.time() - started}

    def write(self, path: str | Path, world: World = World(), analysis: Analysis = K_GRID) -> None:  # noqa: B008
        """Write operators, a piece at a time, so that neither H nor S is ever complete in memory, unless charges are made
        self-consistent or states are lifted.

        With several ranks, each rank writes a shard, PATH.shards/NAME-N.h5, and the first rank then writes the file that
        joins them. If there are no more than LARGEST_DENSE orbitals, band edges are computed on the k-grid of the analysis,
        and states that are probably false are looked for, warned of and counted in the file (analysis/false_states.py).
        All of it is made in a folder beside PATH, and then takes the place of what was there.
        """
        path = Path(path)
        with scratch(path) if world.is_root else nullcontext() as own:
            token = world.same(own.name[-TOKEN:] if own else " " * TOKEN)
            whole = path.with_name(f".{path.name}.part{token}") / path.name
            self._write(whole, world, token)
            if world.is_root:
                atoms = self.blocks.graph.atoms
                if self.blocks.reference.basis.n_orbitals(atoms.numbers).sum() <= LARGEST_DENSE:
                    _add_levels(whole, path, analysis)
                move_operators(whole, path)
            world.barrier()

    def _write(self, path: Path, world: World, name: str) -> None:
        """Write the file without band edges, for which it has places, and the shards, if there are any, under a name."""
        started, blocks = time.time(), self.blocks
        atoms, basis, spins = blocks.graph.atoms, blocks.reference.basis, blocks.reference.spins
        unknown = UNKNOWN | Suspects().attributes()

        def attributes() -> dict:
            return self._attributes(started) | unknown

        if world.size == 1 and self.whole:
            operators = self.operators()
            write_operators(path, replace(operators, attributes=operators.attributes | unknown))
        elif world.size == 1:
            write_pieces(path, atoms, basis, blocks.pairs, blocks.pieces(), attributes, spins=spins)
        else:
            shard = shard_path(path, name, world.rank)
            named = lambda: attributes() | {"prediction": name}  # noqa: E731
            write_pieces(shard, atoms, basis, blocks.pairs, blocks.pieces(), named, layout=SHARD, spins=spins)
            world.barrier()
            if world.is_root:
                join_shards(path, name, world.size, attributes())
                if self.whole:
                    write_operators(path, self._finish(read_operators(path)))  # whole, instead of the shards
                    shutil.rmtree(shard.parent)


def predict(
    model: TrainedModel | str | Path,
    atoms: Atoms,
    reference_only: bool = False,
    dtype: torch.dtype = torch.float32,
    world: World = World(),  # noqa: B008
    exchange: str = "torch",
    lifted: bool = True,
    overlap: Operators | None = None,
    self_consistent: bool | None = None,
    analysis: Analysis = K_GRID,
) -> Prediction:
    """Predict H and S of any structure, Hermitian by construction, in the energy gauge of the reference.

    model: a trained model, or its folder.
    With several ranks, each rank has its rows.
    H: the reference on all pairs, plus the mean of the model's networks within their cutoff. The attribute
    onsite_spread_mev says how much the networks differ (standard deviation, root mean square over onsite components); it
    grows with the error, but is smaller.
    S: exact two-centre integrals, so that eigenvalues need no DFT; or that of `overlap`, operators of the same structure whose
    H is not looked at, which a model needs whose basis has no radial functions. Its atoms then stand where these have them.
    lifted: lifts states along directions that S nearly misses to where DFT has them (graph/lifting.py), if the reference knows
    where that is and there are no more than LARGEST_DENSE orbitals; a prediction of the reference alone is left as it is.
    self_consistent: makes the charges of the atoms those of the predicted states, on the k-grid of the analysis
    (self_consistent.py), if there are no more than LARGEST_DENSE orbitals; by default if the model was trained for it.
    The pairs are those that overlap by more than 1e-8 or lie within the cutoff.
    Raises ValueError if the structure has an element, or a kind of periodicity, on which the model was not trained, as
    `TrainedModel.with_overlap` does, if `overlap` is of another structure, and if charges are to be self-consistent with a
    model that was not trained for it. Warns of a structure that is more than twice as long as the longest training cell, and
    of one that is too large to be lifted or for charges to be made self-consistent.
    """
    started = time.time()
    if not isinstance(model, TrainedModel):
        model = TrainedModel.load(model)
    model = model.with_overlap(overlap)
    if overlap is not None and model.overlap:
        check_same_structure(atoms, overlap.atoms)
        atoms = overlap.atoms
    looped = (model.knows_charges if self_consistent is None else self_consistent) and not reference_only
    if looped and not model.knows_charges:
        raise ValueError(
            f"{model.name}: charges cannot be made self-consistent: the model was trained without their potentials. Train it "
            "on a material with `prediction: {self_consistent: true}`."
        )
    part = model.part(atoms, world, exchange)
    residual = Residual({}, {}) if reference_only else model.residual(part, dtype, world)
    blocks = model.decode(part, residual, world)
    attributes = {
        "source": "reference" if reference_only else "predicted",
        "model": model.name,
        MADE_OF: json.dumps({"model": [model.identity]}),
        "cutoff_angstrom": model.reference.cutoff_angstrom,
        "longest_training_cell_angstrom": model.reference.longest_cell_angstrom,
    }
    if overlap is not None and "electrons" in overlap.attributes:
        attributes["electrons"] = overlap.attributes["electrons"]
    if residual.onsite_spread_mev is not None:
        attributes["onsite_spread_mev"] = residual.onsite_spread_mev
    attributes["wall_seconds"] = time.time() - started
    wanted = lifted and not reference_only and np.isfinite(model.reference.floor_hartree)
    orbitals = int(model.reference.basis.n_orbitals(atoms.numbers).sum())
    dense = orbitals <= LARGEST_DENSE
    for asked, sentence in (
        (
            wanted,
            "states along directions that S nearly misses are lifted to where DFT has them in structures of at most "
            f"{LARGEST_DENSE}. False states may be left: `hamscale dos` tells them.",
        ),
        (looped, f"charges are made self-consistent in structures of at most {LARGEST_DENSE}. H is that of one pass."),
    ):
        if asked and not dense and world.is_root:
            warnings.warn(f"{orbitals} orbitals: {sentence}", stacklevel=2)
    loop = model.charge_loop(part, blocks.potential, analysis, world) if looped and dense else None
    return Prediction(blocks, attributes, bool(wanted and dense), loop)


def _add_levels(file: Path, path: Path, analysis: Analysis) -> None:
    """Store band edges in a file that will be at `path`."""
    operators = read_operators(file)
    try:
        levels = find_levels(operators, analysis)
        suspects = find_suspects(operators, levels)
    except ValueError as error:  # S is not positive definite, but the matrices are still useful
        warnings.warn(f"{path}: no band edges: {error}", stacklevel=3)
        return
    store_levels(file, levels.attributes() | suspects.attributes())
    if sentence := suspects.sentence():
        warnings.warn(f"{path}: {sentence}", stacklevel=3)
