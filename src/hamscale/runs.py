"""Find runs of CP2K by the names of the files in which it wrote H and S, without opening any of them.

CP2K names these files NAME-KS_SPIN_1_R_12-1_5.csr: the project, the matrix (KS is H, S the overlap), the number of a periodic
image (R), or of a k-point (K), or neither, and the step of a molecular dynamics or an optimisation, zero for a single energy.
"""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(
    r"(?P<project>.+)-(?P<matrix>KS|S)_SPIN_(?P<spin>[12])(?:_(?P<kind>[RK])_(?P<number>\d+))?-1_(?P<step>\d+)\.csr"
)


@dataclass(frozen=True)
class Snapshot:
    """Name H and S of one structure: one step of one run.

    folder: where the files lie. project: the NAME before -KS_SPIN_1. step: CP2K's count of steps.
    """

    folder: Path
    project: str
    step: int

    def __str__(self) -> str:
        return f"{self.folder / self.project}, step {self.step}" if self.step else str(self.folder / self.project)

    def files(self, matrix: str, kind: str | None, spin: int = 1) -> dict[int, Path]:
        """Return the files of a matrix, "KS" or "S", by the number of the image ("R") or k-point ("K"); without one, by 1.

        spin: 1, or 2 for H of spin down.
        """
        found = {}
        for path in self.folder.glob("*.csr"):
            name = NAME.fullmatch(path.name)
            if name and (name["project"], int(name["step"]), name["matrix"], name["kind"], int(name["spin"])) == (
                self.project, self.step, matrix, kind, spin,
            ):  # fmt: skip
                found[int(name["number"] or 1)] = path
        return found


def snapshots(path: str | Path) -> list[Snapshot]:
    """Find all snapshots of a folder, or, if it has none, of all folders below it, by folder, project and step.

    path: a folder, a file of H, which stands for its snapshot, or a pattern such as runs/*/md or runs/**/*-KS_*.csr.

    Raises ValueError if there is none.
    """
    found: set[Snapshot] = set()
    for each in [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True))):
        found |= _snapshots(each) if each.is_dir() else _of_files([each])
    if not found:
        raise ValueError(
            f"{path}: no file NAME-KS_SPIN_1...-1_0.csr there or below, expected runs of CP2K that wrote H and S. Set &PRINT "
            "&KS_CSR_WRITE ON and &S_CSR_WRITE ON in &DFT (docs/howto/own_runs.md)."
        )
    return sorted(found, key=lambda s: (_natural(s.folder), _natural(s.project), s.step))


def members(path: str | Path) -> list[Path]:
    """Find all structures with H and S of other codes: folders of DeepH data sets, with info.json, and files of operators.

    path: a folder, also one above them, a file, or a pattern such as dataset/*. They come in the order of their names.

    Raises ValueError if there is none.
    """
    found: set[Path] = set()
    for each in [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True))):
        folders = {info.parent for info in each.rglob("info.json")} if each.is_dir() else set()
        found |= folders or set(each.glob("*.h5")) or ({each} if each.suffix == ".h5" else set())
    if not found:
        raise ValueError(f"{path}: no folder of a DeepH data set (info.json) and no file of H and S (.h5) there or below.")
    return sorted(found, key=_natural)


def _snapshots(folder: Path) -> frozenset[Snapshot]:
    return _of_files(list(folder.glob("*.csr"))) or _of_files(list(folder.rglob("*.csr")))


def _of_files(paths: list[Path]) -> frozenset[Snapshot]:
    names = [(path.parent, NAME.fullmatch(path.name)) for path in paths]
    return frozenset(Snapshot(folder, n["project"], int(n["step"])) for folder, n in names if n and n["matrix"] == "KS")


def _natural(name: str | Path) -> list[tuple[int, str]]:
    """Return a key by which run_9 comes before run_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name))]


def snapshot(path: str | Path) -> Snapshot:
    """Return the one snapshot of a folder, or that of a file of H.

    Raises ValueError if there is none, or more than one.
    """
    found = snapshots(path)
    if len(found) > 1:
        raise ValueError(
            f"{path}: holds {len(found)} structures, expected one. Name the first file of H of one of them, e.g. "
            f"{first_file(found[-1])}."
        )
    return found[0]


def first_file(of: Snapshot) -> Path:
    """Return the first file of H of a snapshot: the path that stands for the snapshot where one path is needed."""
    for kind in ("R", None, "K"):
        if files := of.files("KS", kind):
            return files[min(files)]
    raise ValueError(f"{of}: the files of H are gone.")
