"""hamscale VERB ...: one verb per step of the pipeline; a Snakemake rule is one verb.

Errors of the user's data or settings, and the end of another rank, are printed one line each, without a traceback, and the exit
code is 1. Training that was stopped by a signal, with its checkpoint written, exits with 85.
"""

import argparse
import sys
import warnings
from pathlib import Path

from . import __version__
from .verbs import (
    analyse,
    batch,
    check,
    collect,
    dft,
    dos,
    draw,
    evaluate,
    export,
    figure_8,
    figures,
    graph,
    import_,
    index,
    input,
    join,
    operators,
    partition,
    predict,
    quality,
    reference,
    schema,
    structure,
    summary,
    table,
    train,
    view,
)
from .workers import threads_for


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="hamscale", description="From DFT to the predicted Hamiltonian of large structures.")
    parser.add_argument("--version", action="version", version=f"hamscale {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function, *positional, **options):
        p = verbs.add_parser(function.__name__.rstrip("_"), help=function.__doc__.splitlines()[0], description=function.__doc__)
        for name in positional:
            p.add_argument(name.rstrip("+"), nargs="+" if name.endswith("+") else None, type=Path)
        for name, keywords in options.items():
            p.add_argument(f"--{name.replace('_', '-')}", **keywords)
        p.set_defaults(function=function)

    out = {"type": Path, "required": True, "metavar": "PATH", "help": "what to write"}
    many = {"type": Path, "nargs": "*", "default": [], "metavar": "FILE"}
    verb(check, "config")
    verb(
        schema, kind={"choices": ["material", "model", "config"], "default": "material", "help": "which file; default material"}
    )
    verb(
        structure,
        "material",
        id={"required": True, "metavar": "SET-NNN", "help": "which structure"},
        tile={"type": Path, "metavar": "FILE", "help": "file of the structure it is a tile of; default: built again"},
        out=out,
    )
    verb(input, "material", "structure", out=out)
    verb(dft, "input", out=out, command={"help": "CP2K, e.g. 'mpirun -n 4 cp2k.psmp'; default: $HAMSCALE_CP2K, else PATH"})
    verb(
        batch,
        "inputs+",
        store={"type": Path, "required": True, "help": "folder of accepted runs"},
        at_once={"type": int, "default": 1, "help": "runs side by side"},
        command={"help": "CP2K, as of `dft`; e.g. 'srun --exact --ntasks=8 cp2k.psmp' for steps of a Slurm job"},
        out=out,
    )
    folder = {"type": Path, "required": True}
    verb(collect, "input", store=folder, record=folder, out=out)
    verb(operators, "material", "structure", "run", out=out)
    verb(reference, "material", "operators+", out=out)
    verb(graph, "reference", "operators", out=out)
    frame = {"type": int, "metavar": "N", "help": "which structure of a trajectory, from 0"}
    exchange = {"choices": ["torch", "cupy"], "default": "torch", "help": "torch.distributed, or NCCL through CuPy"}
    verb(
        partition,
        "structure",
        frame=frame,
        cutoff={"type": float, "help": "Angstrom: that of the graph; or give --reference"},
        reference={"type": Path, "help": "whose cutoff is taken"},
        parts={"type": int, "required": True},
        method={"choices": ["min-nn", "low-nn", "metis"], "default": "min-nn"},
        ranks_per_node={"type": int, "default": 1, "help": "parts that exchange much become ranks of one node"},
        out=out,
    )
    verb(
        train,
        "model",
        "reference",
        train=many,
        validation=many,
        operators=many | {"help": "DFT of the training structures, in their order, where the model has an eigenvalue_weight"},
        partitions=many | {"help": "of the training, then of the validation structures; default: min-nn, made at the start"},
        ranks_per_structure={"type": int, "help": "default: all"},
        exchange=exchange,
        network={"type": int, "default": 0, "help": "which of the model's `members`, from 0; `join` makes one model of them"},
        out=out,
        checkpoint={"type": Path, "required": True},
    )
    verb(join, "networks+", out=out)
    reference_only = {"action": "store_true", "help": "the reference without the network: the baseline"}
    verb(
        predict,
        "model",
        "structure",
        frame=frame,
        material={"type": Path, "metavar": "FILE", "help": "whose k-grid the band edges are found on; default: 20 A over |a|"},
        out=out,
        reference_only=reference_only,
        exchange=exchange,
    )
    verb(
        export,
        "operators",
        to={
            "required": True,
            "metavar": "FORMAT",
            "help": "quatrex, sisl, tbtrans, tshs, deeph, cp2k, cp2k-text, matrixmarket",
        },
        out=out,
        transport={"metavar": "AXIS", "help": "quatrex: an open device along a, b or c, in blocks; default: the cell as it is"},
        repeat={"type": int, "metavar": "N", "help": "quatrex: copies of the structure along the axis; default 1"},
        origin={
            "type": float,
            "metavar": "FRACTION",
            "help": "quatrex: where the device begins along the axis, in fractions of the cell; default 0, the corner of the user's cell",
        },
        allow_mismatch={"action": "store_true", "default": None, "help": "quatrex: also a device whose ends do not repeat"},
        blocks={"type": int, "metavar": "N", "help": "quatrex: blocks along the axis; default: the most without a loss"},
    )
    verb(import_, "source", out=out)
    one = {"type": Path, "required": True, "metavar": "FILE"}
    verb(analyse, "material", dft=one, predicted=one, baseline=one, out=out)
    verb(
        evaluate,
        "model",
        split={"choices": ["train", "validation", "test"], "default": "test", "help": "default: test"},
        sets={"nargs": "*", "metavar": "SET", "help": "some sets of the split; default: all"},
        material={"type": Path, "metavar": "FILE", "help": "default: config/materials/M.yaml of results/M/models/NAME"},
        out={"type": Path, "metavar": "PATH", "help": "also write a row per structure: csv"},
    )
    verb(view, "predicted", parts={"type": int, "default": 8, "help": "ranks its atoms are shared by"}, out=out)
    verb(quality, "structures+", out=out)
    verb(
        dos,
        "operators",
        clusters={"type": int, "default": 40, "help": "default 40; the error falls as the root of their number"},
        radius={"type": float, "default": 10.0, "help": "Angstrom, of a cluster; default 10; more is slower and cuts less"},
        core={"type": float, "default": 4.0, "help": "Angstrom; atoms so near the centre count; default 4"},
        width={"type": float, "default": 0.2, "help": "eV, standard deviation of a level; default 0.2"},
        window={"type": float, "default": 10.0, "help": "eV, either side of the Fermi level; default 10"},
        exact={
            "action": "store_true",
            "help": "small systems: also from all eigenvalues at the Gamma point, to see how far the clusters are from it",
        },
        out=out,
    )
    verb(figures, "analysis", "train_csv", out=out)
    verb(
        figure_8,
        label={"nargs": "+", "required": True, "help": "of the structures, then of the one shown"},
        analysis={"type": Path, "nargs": "+", "required": True, "metavar": "DIR", "help": "what `analyse` wrote of each"},
        view={"type": Path, "required": True, "metavar": "DIR", "help": "what `view` wrote of the one shown"},
        out=out,
    )
    verb(
        draw,
        figure={"choices": ["fig3", "fig5", "fig6", "fig7", "fig8", "learning", "size"], "nargs": "*", "help": "default: all"},
        raw={"type": Path, "default": Path("resources/raw"), "help": "folder of tables; default resources/raw"},
        out=out,
    )
    verb(index, results={"type": Path, "default": Path("results"), "help": "folder of results"}, out=out)
    verb(summary, "summaries+", out=out)
    verb(table, "summary")
    options = vars(parser.parse_args(arguments))
    function = options.pop("function")
    options.pop("verb")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        with threads_for(0):  # products of blocks are small too
            return function(**options) or 0
    except ValueError as error:
        print("\n".join(f"hamscale: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"hamscale: error: {' '.join(str(error).split())}", file=sys.stderr)  # HDF5 says it in many lines
        return 1
