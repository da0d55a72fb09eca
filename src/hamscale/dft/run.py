"""Run CP2K in a scratch folder, move an accepted run into place at once, and keep a failed one aside with its log.

Many runs of one job (`run_batch`) go to a store that no rule of the workflow owns: accepted runs stay, even if the job fails.
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from pathlib import Path

from ..basis import CP2K_BINARIES, cp2k_data_directory
from ..files import flush, move_folder, scratch, sweep
from ..runs import snapshot
from .csr import image_files
from .inputs import PROJECT
from .log import OUTPUT, check_version, parse_output

log = logging.getLogger(__name__)


class Aborted(ValueError):
    """Error of a run that was ended from outside and may well succeed another time."""


def cp2k_command(command: str | None = None) -> list[str]:
    """Return the command that runs CP2K: the argument, else $HAMSCALE_CP2K, else the first of CP2K_BINARIES on PATH.

    Raises ValueError saying what to install if there is none.
    """
    words = shlex.split(command or os.environ.get("HAMSCALE_CP2K", ""))
    if not words:
        words = [name for name in CP2K_BINARIES if shutil.which(name)][:1]
    if not words or not shutil.which(words[0]):
        raise ValueError(
            f"CP2K: {words[0] if words else ', '.join(CP2K_BINARIES)} not found on PATH. Install Debian's package cp2k, the "
            "conda environment envs/cp2k.yaml, or load the uenv cp2k; or set HAMSCALE_CP2K to the command that runs it."
        )
    # a run has a folder of its own, from which a relative path would lead elsewhere
    return [os.path.abspath(word) if "/" in word and Path(word).is_file() else word for word in words]


@lru_cache
def check_command(words: tuple[str, ...]) -> None:
    """Refuse a CP2K that is too old before it computes anything, by calling `WORDS --version` once.

    Raises ValueError as `log.check_version` does. If the command does not print a version, the check of its log decides.
    """
    with tempfile.TemporaryDirectory() as folder:  # for any files that the command writes
        result = subprocess.run(
            [*words, "--version"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    if found := re.search(r"CP2K version (\d\S*)", result.stdout):
        try:
            check_version(found[1].rstrip("."))
        except ValueError as error:
            raise ValueError(f"{shlex.join(words)}: {error}") from None


def run_cp2k(input_path: str | Path, directory: str | Path, command: str | None = None) -> None:
    """Run one input; afterwards `directory` holds run.inp, run.out and the CSR files of an accepted run.

    The run takes place in a scratch folder beside `directory`, which is then renamed as a whole. Raises ValueError if the run
    is refused (see `check_run`). A refused run leaves nothing at `directory` (an earlier accepted run stays there, whole), and
    CP2K's files lie in `directory`.failed.
    """
    input_path, directory = Path(input_path), Path(directory)
    words = cp2k_command(command)
    if not input_path.is_file():
        raise ValueError(f"{input_path}: no such file. Expected a CP2K input as `hamscale input` writes it.")
    check_command(tuple(words))
    failed = directory.with_name(directory.name + ".failed")
    with scratch(directory) as folder:
        run = folder / directory.name
        run.mkdir()
        shutil.copyfile(input_path, run / f"{PROJECT}.inp")
        with open(run / "stderr", "w") as messages:
            result = subprocess.run(
                [*words, "-i", f"{PROJECT}.inp", "-o", OUTPUT],
                cwd=run,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                env={"OMP_NUM_THREADS": "1"} | os.environ | _data_directory(),
            )
        try:
            check_run(run, result.returncode)
        except ValueError as error:
            move_folder(run, failed)
            kind = Aborted if isinstance(error, Aborted) else ValueError
            raise kind(f"{input_path}: {error} Log: {failed / OUTPUT}") from None
        for path in run.iterdir():
            flush(path)
        move_folder(run, directory)
        shutil.rmtree(failed, ignore_errors=True)


def _data_directory() -> dict[str, str]:
    """Return CP2K_DATA_DIR for a run: the folder where `hamscale input` looks up basis sets.

    CP2K reads it before the folder it was built with, which may be missing (Debian's 2026.2-1) or hold other files. Without
    such a folder here, CP2K is left to find its own.
    """
    try:
        return {"CP2K_DATA_DIR": str(cp2k_data_directory())}
    except ValueError:
        return {}


def run_batch(inputs: list[Path], store: Path, at_once: int = 1, command: str | None = None) -> dict[str, str]:
    """Run inputs, NAME.inp to store/NAME, `at_once` of them side by side, and return the error of each refused run by name.

    A run in the store that was accepted with the same input is not repeated. A run that failed for a cause that may not occur
    again, a signal or an early end, is repeated once, alone.
    """
    errors: dict[str, str] = {}
    aborted: set[str] = set()
    ended = count(1)

    def run(path: Path) -> None:
        kept = store / path.stem / f"{PROJECT}.inp"
        if kept.is_file() and kept.read_bytes() == path.read_bytes():
            sweep(store / path.stem)
            log.info(f"{path.stem}: done before ({next(ended)} of {len(inputs)})")
            return
        try:
            run_cp2k(path, store / path.stem, command)
            errors.pop(path.stem, None)
            log.info(f"{path.stem}: accepted ({next(ended)} of {len(inputs)})")
        except ValueError as error:
            errors[path.stem] = str(error)
            if isinstance(error, Aborted):
                aborted.add(path.stem)
            log.info(f"{error} ({next(ended)} of {len(inputs)})")

    check_command(tuple(cp2k_command(command)))  # says what to install before anything runs
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, inputs))
    for path in inputs:
        if path.stem in aborted:
            log.info(f"{path.stem}: once more, alone")
            run(path)
    return errors


def collect(input_path: Path, store: Path, record: Path, directory: Path) -> None:
    """Link the files of an accepted run of the store into `directory`, without a copy.

    Raises ValueError with the error of a refused run. The record of the batch is then removed, so that the next start repeats
    that run, alone.
    """
    name, kept = directory.name, store / directory.name
    accepted = (kept / f"{PROJECT}.inp").is_file() and (kept / f"{PROJECT}.inp").read_bytes() == input_path.read_bytes()
    if not accepted:
        errors = json.loads(record.read_text())["errors"] if record.is_file() else {}
        record.unlink(missing_ok=True)
        raise ValueError(errors.get(name, f"{kept}: no accepted run of {input_path}. Start again: it will be run."))
    with scratch(directory) as folder:
        run = folder / name
        run.mkdir()
        for path in kept.iterdir():
            os.link(path, run / path.name)
        move_folder(run, directory)


def check_run(directory: Path, returncode: int) -> None:
    """Accept a run, or raise ValueError with the cause.

    A run is accepted if its exit code is 0, its log has "SCF run converged", no "NOT converged", and "PROGRAM ENDED AT", and
    every file of the image table is there with a size that is whole records. CP2K exits with 0, and writes matrices, even
    without convergence or at its time limit.
    """
    log = directory / OUTPUT
    text = log.read_text(errors="replace") if log.is_file() else ""
    steps = re.findall(r"^ +(\d+) +\S+/\S+ +\S+ +\S+ +(\S+) +\S+ +(\S+)$", text, re.M)
    last = f"last step {steps[-1][0]}, convergence {steps[-1][1]}, energy change {steps[-1][2]} Ha" if steps else "no SCF step"
    # a shell, mpirun or srun that starts CP2K returns 128 + the signal
    if returncode < 0 or returncode > 128:
        number = -returncode if returncode < 0 else returncode - 128
        raise Aborted(f"CP2K was killed by signal {number} ({last}). Out of memory or time? Run it again.")
    unconverged = "SCF run NOT converged" in text  # since version 2024.1 CP2K then exits with code 1
    if returncode and not unconverged:
        raise ValueError(
            f"CP2K stopped with exit code {returncode}: {_abort_message(text) or _last_line(directory / 'stderr')}."
        )
    if unconverged or "SCF run converged" not in text:
        raise ValueError(
            f"the SCF did not converge ({last}). Raise dft.max_scf, lower dft.mixing_alpha, or set dft.smearing for a small "
            "gap."
        )
    if "PROGRAM ENDED AT" not in text:
        raise Aborted(f"CP2K did not come to its end ({last}): 'PROGRAM ENDED AT' is missing. Run it again.")
    output = parse_output(log)
    image_files(snapshot(directory), output.images, output.spins)


def _abort_message(text: str) -> str:
    """Return the text in CP2K's [ABORT] box, on one line."""
    box = re.search(r"\[ABORT\].*?\n(.*?)\n \*{10}", text, re.S)
    if not box:
        return ""
    words = " ".join(re.sub(r"^[ *|\\/_O]+|[ *]+$", "", line) for line in box[1].splitlines())
    return " ".join(words.split())


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "no message"
