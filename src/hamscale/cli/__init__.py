"""Run hamscale COMMAND ...: one command per step of the pipeline; a Snakemake rule is one command.

Errors of the user's data or settings, and the end of another rank, are printed one line each, without a traceback, and the exit
code is 1. Training that was stopped by a signal, with its checkpoint written, exits with 85.
"""

import argparse
import sys
import warnings

from .. import __version__
from ..workers import threads_for
from . import dft, figures, prediction, results, training
from .commands import COMMANDS

__all__ = ["dft", "figures", "main", "prediction", "results", "training"]


def main(arguments=None) -> int:
    """Run a command line, and return the exit code."""
    options = vars(_parser().parse_args(arguments))
    function = options.pop("function")
    options.pop("name")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        with threads_for(0):  # products of blocks are too small for several threads
            return function(**options) or 0
    except ValueError as error:
        print("\n".join(f"hamscale: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    except OSError as error:  # e.g. a full disk or a folder without permission to write
        print(f"hamscale: error: {' '.join(str(error).split())}", file=sys.stderr)  # messages of HDF5 have many lines
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hamscale", description="From DFT to the predicted Hamiltonian of large structures.")
    parser.add_argument("--version", action="version", version=f"hamscale {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        text = command.function.__doc__
        of_command = commands.add_parser(command.name, help=text.splitlines()[0], description=text)
        for flag, options in command.arguments:
            of_command.add_argument(flag, **options)
        of_command.set_defaults(function=command.function)
    return parser
