"""Define commands of the command line: a function, with the parser of its arguments beside it.

    @command("join", argument("networks", nargs="+"), OUT)
    def join_networks(networks: list[Path], out: Path):
        \"\"\"Make one model of several networks.\"\"\"

Modules are imported where a command needs them, so that a command line answers at once and only commands that use torch wait
for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..parallel.env import World


@dataclass(frozen=True)
class Command:
    """A command: its name, the function that is called with its arguments, and (flags, options) of each for argparse."""

    name: str
    function: Callable
    arguments: tuple[tuple[str, dict], ...]


COMMANDS: list[Command] = []


def argument(flag: str, **options: object) -> tuple[str, dict]:
    """Describe an argument, `--name` or positional; its type is a path unless `options` (those of argparse) say otherwise."""
    if not {"type", "choices", "action"} & options.keys():
        options["type"] = Path
    if flag.startswith("--") and options.get("type") is Path:
        options.setdefault("metavar", "FILE")
    return flag, options


def command(name: str, *arguments: tuple[str, dict]) -> Callable:
    """Register the decorated function as a command; its docstring is the help text."""

    def register(function: Callable) -> Callable:
        COMMANDS.append(Command(name, function, arguments))
        return function

    return register


ONE_PASS = argument(
    "--one-pass", action="store_true", help="charges are not made self-consistent, whatever the model was trained for"
)
THRESHOLD = argument(
    "--overlap-threshold",
    type=float,
    metavar="T",
    help="leave out directions whose overlap is smaller, against false states; 5e-3 is a value to try",
)
MATERIAL = argument("material", help="file of the material, config/materials/NAME.yaml")
STRUCTURE = argument("structure", help="file of the structure, any that ASE reads")
OUT = argument("--out", required=True, metavar="PATH", help="what to write")


@contextmanager
def ranks() -> Iterator["World"]:
    """Open the world of this run's ranks; if a rank is lost, print what is known about it in the last line."""
    from ..parallel.env import RankLost, world

    try:
        with world() as result:
            yield result
    except RankLost as error:
        raise OSError(str(error)) from None
