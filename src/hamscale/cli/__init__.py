"""Run hamscale COMMAND ...: one command per step of the pipeline; a Snakemake rule is one command.

Results that a program may read go to standard output, everything else through `logging` to standard error. Errors of the user's
data or settings, and the end of another rank, are one line each, without a traceback, and the exit code is 1. Training that was
stopped by a signal, with its checkpoint written, exits with 85.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..workers import threads_for
from . import dft, figures, prediction, results, training
from .commands import COMMANDS

__all__ = ["dft", "figures", "main", "prediction", "results", "training"]

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return the exit code."""
    options = vars(_parser().parse_args(arguments))
    function = options.pop("function")
    options.pop("name")
    _log_to_stderr()
    try:
        with threads_for(0):  # products of blocks are too small for several threads
            return function(**options) or 0
    except ValueError as error:
        log.error(error)
        return 1
    except OSError as error:  # e.g. a full disk or a folder without permission to write
        log.error(" ".join(str(error).split()))  # messages of HDF5 have many lines
        return 1


class _Lines(logging.Formatter):
    """One format of all messages: the plain text of what happens, and the level before every line of anything else."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return "\n".join(f"hamscale: {record.levelname.lower()}: {line}" for line in text.splitlines())


def _log_to_stderr() -> None:
    """Send the messages of this package, and all warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("hamscale").setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_, **__: str(message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hamscale", description="From DFT to the predicted Hamiltonian of large structures.")
    parser.add_argument("--version", action="version", version=f"hamscale {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        text = command.function.__doc__
        assert text is not None, f"{command.name}: its function has no docstring, which is the help text"
        of_command = commands.add_parser(command.name, help=text.splitlines()[0], description=text)
        for flag, options in command.arguments:
            of_command.add_argument(flag, **options)
        of_command.set_defaults(function=command.function)
    return parser
