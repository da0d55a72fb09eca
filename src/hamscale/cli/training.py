"""Define the commands of training: reference, graphs, partitions, networks."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import config
from .commands import MATERIAL, OUT, STRUCTURE, argument, command, ranks

if TYPE_CHECKING:
    from ..operators import Operators

STOPPED = 85
EXCHANGE = argument(
    "--exchange",
    choices=list(config.EXCHANGES),
    default="torch",
    help="torch.distributed, or NCCL through CuPy; -float16, -bfloat16: what travels between ranks has 16 bits",
)
REFERENCE = argument("reference", help="reference.h5, as `reference` writes it")
FRAME = argument("--frame", type=int, metavar="N", help="which structure of a trajectory, from 0")


class _Stored:
    """Files of operators, read one at a time whenever they are iterated over.

    charges: whether those of the atoms are computed where a file lacks them, once.
    """

    def __init__(self, paths: list[Path], charges: bool = False) -> None:
        self.paths, self.charges = paths, charges
        self.known: dict[Path, np.ndarray | None] = {}

    def __iter__(self) -> Iterator["Operators"]:
        from ..analysis.density import with_charges
        from ..operators import read_operators

        for path in self.paths:
            operators = read_operators(path)
            if self.charges:
                if path not in self.known:
                    self.known[path] = with_charges(operators).mulliken_charges
                operators.mulliken_charges = self.known[path]
            yield operators


@command(
    "reference",
    MATERIAL,
    argument("operators", nargs="+", help="files of H and S of the training structures"),
    OUT,
)
def fit(material: Path, operators: list[Path], out: Path) -> None:
    """Fit energy gauge, reference and scales to training structures."""
    from ase.data import atomic_numbers

    from ..container import identity
    from ..graph.crystal_field import Ions
    from ..graph.lifting import LOW
    from ..graph.reference import fit_reference, write_reference
    from ..units import hartree_to_ev

    settings = config.load_material(material)
    charges = {atomic_numbers[element]: charge for element, charge in settings.graph.charges.items()}
    ions = Ions(settings.graph.near_angstrom, charges, settings.graph.far)
    of = settings.graph
    result = fit_reference(
        _Stored(operators, settings.prediction.self_consistent),
        of.cutoff_angstrom,
        of.auto_threshold_hartree,
        ions,
        of.crystal_field,
        of.two_centre,
        settings.prediction.self_consistent,
    )
    if np.isfinite(result.floor_hartree):
        print(
            f"S nearly misses some directions (below {LOW:g}): states along them lie above "
            f"{hartree_to_ev(result.floor_hartree):.1f} eV in the training structures, and are lifted there in predictions"
        )
    outside = result.outside_fraction
    print(
        f"cutoff {result.cutoff_angstrom:.2f} A; H reaches {result.reach_angstrom:.2f} A; "
        f"beyond the cutoff: {outside:.2%} of sum |H|"
    )
    if outside > 0.01:
        warnings.warn(
            f"{outside:.1%} of sum |H| lies beyond the cutoff of {result.cutoff_angstrom} A, where the network does not reach. "
            "Raise graph.cutoff_angstrom.",
            stacklevel=2,
        )
    write_reference(out, result, {"operators": [identity(path) for path in operators]})


@command(
    "graph",
    REFERENCE,
    argument("operators", nargs="+", help="files of H and S of the structures"),
    argument("--out", required=True, metavar="DIR", help="folder of the graphs"),
)
def encode(reference: Path, operators: list[Path], out: Path) -> None:
    """Build the graphs of structures with their targets, OUT/NAME.h5 for each file of operators NAME.h5.

    The reference is read, and its tables are made, once for all of them.
    """
    from ..container import identity
    from ..graph.codec import BlockCodec
    from ..graph.graph import write_graph
    from ..graph.reference import read_reference

    codec = BlockCodec(read_reference(reference))
    charges = codec.reference.crystal_field.potential is not None
    for path, found in zip(operators, _Stored(operators, charges)):
        if found.attributes.get("source") == "predicted" and found.attributes.get("self_consistent") != 1:
            raise ValueError(
                f"{path}: a prediction whose charges are not self-consistent, expected one of `hamscale predict "
                "--self-consistent` whose loop converged: others have nothing to teach."
            )
        result = codec.encode(found)
        print(
            f"{path.stem}: {len(result.atoms)} atoms, {len(result.edges)} edges, "
            f"{result.attributes['outside_fraction']:.2%} of sum |H| outside"
        )
        write_graph(out / path.name, result, {"operators": [identity(path)], "reference": [identity(reference)]})


@command(
    "partition",
    STRUCTURE,
    FRAME,
    argument("--cutoff", type=float, help="Angstrom: that of the graph; or give --reference"),
    argument("--reference", help="whose cutoff is taken"),
    argument("--parts", type=int, required=True, help="number of ranks"),
    argument(
        "--method",
        choices=list(config.PARTITIONERS),
        default="min-nn",
        help="how the structure is cut (docs/distributed.md); default min-nn",
    ),
    argument("--ranks-per-node", type=int, default=1, help="parts that exchange much become ranks of one node"),
    OUT,
)
def cut(
    structure: Path,
    frame: int | None,
    cutoff: float | None,
    reference: Path | None,
    parts: int,
    method: str,
    ranks_per_node: int,
    out: Path,
) -> None:
    """Decide which rank owns which atom, and print the quality as JSON: what ranks have and send to one another.

    The edges are never in memory together, except for metis.
    """
    from ..graph.neighbours import Neighbourhood
    from ..graph.reference import read_reference
    from ..partition import partition
    from ..partition.halo import write_partition
    from ..structures import read_structure_file, wrap_as_cp2k

    if (cutoff is None) == (reference is None):
        raise ValueError("give either --cutoff or --reference.")
    if reference is not None:
        cutoff = read_reference(reference).cutoff_angstrom
    assert cutoff is not None, "one of the two was given"
    atoms = wrap_as_cp2k(read_structure_file(structure, frame))
    edges = Neighbourhood(atoms, cutoff)
    result = partition(atoms, edges, cutoff, parts, method, ranks_per_node=ranks_per_node)
    write_partition(out, result, atoms)
    print(json.dumps({"method": method, "parts": parts} | result.quality() | {"seconds": result.attributes["seconds"]}))


@command(
    "train",
    argument("model", help="file of the model's settings, config/models/NAME.yaml"),
    REFERENCE,
    argument("--train", nargs="*", default=[], help="graphs that are learnt"),
    argument("--validation", nargs="*", default=[], help="graphs that choose the weights which are kept"),
    argument(
        "--operators",
        nargs="*",
        default=[],
        help="DFT of the training structures, in their order, where the model has an eigenvalue_weight",
    ),
    argument(
        "--partitions",
        nargs="*",
        default=[],
        help="of the training, then of the validation structures; default: min-nn, made at the start",
    ),
    argument("--ranks-per-structure", type=int, metavar="N", help="ranks that share a structure; default: all"),
    EXCHANGE,
    argument(
        "--network",
        type=int,
        default=0,
        help="which of the model's `networks`, from 0; `join` makes one model of them",
    ),
    argument(
        "--start-from",
        metavar="MODEL",
        help="folder of a model of the same elements and sizes, with whose weights training begins; default: the model's "
        "`start_from`, or random weights",
    ),
    OUT,
    argument("--checkpoint", required=True, metavar="DIR", help="folder of the checkpoint, from which training goes on"),
)
def train_network(
    model: Path,
    reference: Path,
    train: list[Path],
    validation: list[Path],
    operators: list[Path],
    partitions: list[Path],
    ranks_per_structure: int | None,
    exchange: str,
    network: int,
    start_from: Path | None,
    out: Path,
    checkpoint: Path,
) -> int:
    """Train a network of a model, and resume from CHECKPOINT.

    Writes OUT/{weights.safetensors, config.json, reference.h5, train.csv}. On many ranks: torchrun --nproc-per-node P -m
    hamscale train ..., or srun, or mpirun. On SIGUSR1, SIGTERM or SIGINT it writes a checkpoint and exits with code 85.
    """
    from ..train import loop

    if not train:
        raise ValueError("--train: no graph was given, expected at least one. Give the material a set with split: train.")
    settings = config.load_model(model)
    with ranks() as world:
        world.stop_on_signals()
        try:
            files = loop.TrainingFiles(reference, train, validation, operators, partitions)
            loop.train(settings, files, out, checkpoint, network, world, ranks_per_structure, exchange, start_from)
        except loop.Stopped as stopped:
            if world.is_root:
                logging.getLogger(__name__).info(str(stopped))
            return STOPPED
    return 0


@command("join", argument("networks", nargs="+", help="folders that `train` wrote"), OUT)
def join_networks(networks: list[Path], out: Path) -> None:
    """Make one model of networks that differ only in their seeds: its prediction is the mean of theirs."""
    from ..inputs.model_folder import join

    join(networks, out)
