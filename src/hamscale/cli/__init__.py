"""Run hamscale COMMAND ...: one command per step of the pipeline; a Snakemake rule is one command.

Results that a program may read go to standard output, everything else through `logging` to standard error. Errors of the user's
data or settings, a full disk and the end of another rank are one line each, without a traceback, and the exit code is 1. A
command that a signal ends removes what it was about to write, says so in a line, and exits with 128 + the number of the signal.
Training that was stopped by a signal, with its checkpoint written, exits with 85.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .. import __version__
from ..workers import threads_for
from . import dft, figures, prediction, results, training
from .commands import COMMANDS

__all__ = ["dft", "figures", "main", "prediction", "results", "training"]

log = logging.getLogger(__name__)
# torch reads it when it is imported: what it would print in many lines of C++ is in the line of the error
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # errors of a write, which do not name the file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return the exit code."""
    options = vars(_parser().parse_args(arguments))
    function = options.pop("function")
    options.pop("name")
    _log_to_stderr()
    try:
        with _ended_by_signals(), threads_for(0):  # products of blocks are too small for several threads
            _check_writable(options.get("out"))
            code = function(**options) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ValueError as error:
        log.error(error)
        return 1
    except OSError as error:  # e.g. a full disk or a folder without permission to write
        unnamed = f"{options['out']}: cannot be written: " if error.errno in FULL and error.filename is None else ""
        log.error(unnamed + " ".join(str(error).split()))  # messages of HDF5 have many lines
        return 1
    except MemoryError as error:
        log.error(f"memory ran out: {' '.join(str(error).split()) or 'no more is to be had'}")
        return 1
    except Ended as end:
        log.error(f"ended by {signal.Signals(end.number).name}; what it was about to write is not there")
        return 128 + end.number


class Ended(BaseException):
    """End of a command by a signal: raised where the command is, so that it removes its temporary files."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise Ended at SIGINT, SIGTERM and SIGHUP, for as long as the context lasts."""

    def end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main_thread else ()
    # one that is ignored, as SIGHUP below nohup, stays ignored
    before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_writable(out: Path | None) -> None:
    """Raise OSError if the place of a result cannot be written, before hours are spent on it."""
    if out is None:
        return
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OSError(f"{out}: cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{out}: cannot be written: no permission to write in {folder}, or it is read-only.")


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
