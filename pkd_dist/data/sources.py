"""Find the files of a data set.

A split is a table in a folder under the split's name or under another name that is common for it (`validation.csv`,
`dev_matched.tsv`), a folder of texts in RACE's layout (`race.py`), a part of one file (`splitting.py`), a part of the authors'
original release, or a split of a Hugging Face data set (`hub:NAME`). `tasks.py` holds the names of each task, `rows.py` the kinds of
table. Nothing is read here except the contents that `digests` hashes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.config.paths import project_path
from pkd_dist.data import splitting
from pkd_dist.data.delimited import is_quoted
from pkd_dist.data.race import PATTERN, files_of
from pkd_dist.data.rows import EXTENSIONS, FILE_EXTENSIONS, is_table
from pkd_dist.data.tasks import Task
from pkd_dist.data.typed import load_hub
from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, sha256

_HUB = "hub:"
_OTHER_NAMES = {"dev": ("validation", "valid", "val")}
_MAX_FILES_IN_MESSAGE = 5


@dataclass(frozen=True)
class Source:
    """Where the rows of one split are.

    Attributes:
        place: a file, or a folder of files that together are a table, or the name of a hub data set (`NAME` or `NAME:CONFIGURATION`).
        dev_ids: file with the id pairs of the dev examples; None if no list decides which rows belong to the split.
        is_dev: whether the split is the rows of `place` that `dev_ids` lists, or the others.
        is_part: whether the split is a part of `place`, as `splitting.py` splits it.
        notes: what a user should know about the choice.
    """

    place: Path | str
    dev_ids: Path | None = None
    is_dev: bool = False
    is_part: bool = False
    notes: tuple[str, ...] = ()


def is_file(data: str) -> bool:
    """Return whether `task.data` is one file, which is split into train, dev and test."""
    return bool(data) and not data.startswith(_HUB) and project_path(data).is_file()


def locate(data: str, split: str, task: Task) -> Source | None:
    """Return the source of a split, or None if the folder does not have it. A hub data set is not checked.

    Raises:
        UserError: no such folder or table, two files of one split, or `task.split` for more than one file.
    """
    if data.startswith(_HUB):
        _require_no_file_split(data, task)
        if not 1 <= len(names := data.split(":")[1:]) <= 2 or not all(names):
            raise UserError(f"{data!r} is not of the form hub:NAME or hub:NAME:CONFIGURATION", "task.data")
        return Source(data.removeprefix(_HUB))
    if not data:
        raise UserError("is empty; give a folder, or hub:NAME", "task.data")
    folder = project_path(data)
    if folder.is_file():
        if not is_table(folder):
            raise UserError(
                f"{data} is a file, but none of {', '.join(f'.{e}' for e in FILE_EXTENSIONS)}; give such a table, or a folder "
                "that contains the examples as train.* and dev.*",
                "task.data",
            )
        return Source(folder, is_part=True) if split in splitting.parts(task.file_split) else None
    if not folder.is_dir():
        if is_table(folder):
            raise UserError(f"no such file: {data}", "task.data")
        raise UserError(
            f"no such folder: {data}; it must contain train and dev as {', '.join(EXTENSIONS)}", "task.data"
        )
    _require_no_file_split(data, task)
    places = _split_files(folder, split, task)
    if any((folder / split / name).is_dir() for name in task.folders):
        places.append(folder / split)
    if len(places) > 1:
        raise UserError(f"{places[0]} and {places[1].name} both contain the split {split}; keep one", "task.data")
    if places:
        return Source(places[0])
    if task.release is None or any(_split_files(folder, name, task) for name in task.splits):
        return None
    return _locate_in_release(folder, split, task)


def _require_no_file_split(data: str, task: Task) -> None:
    if task.file_split:
        raise UserError(
            f"is for one file, and {data} has splits; remove it, or give one file as task.data", "task.split"
        )


def require(data: str, split: str, task: Task) -> Source:
    """Return the source of a split.

    Raises:
        UserError: as `locate`, or the folder does not have the split.
    """
    source = locate(data, split, task)
    if source is None and is_file(data):
        raise UserError(f"{data} has no split {split!r}; it has {', '.join(available(data, task))}", "task.data")
    if source is None:
        stem, *others = _stems(split, task)
        names = [f"{stem}.{extension}" for extension in EXTENSIONS]
        names += [f"{other}.*" for other in others] + ([task.release.train] if task.release else [])
        names += [f"{split}/{name}/{PATTERN}" for name in task.folders]
        tables = sorted(path.name for path in project_path(data).iterdir() if is_table(path))
        more = ", ..." if len(tables) > _MAX_FILES_IN_MESSAGE else ""
        found = f"; it contains {', '.join(tables[:_MAX_FILES_IN_MESSAGE])}{more}" if tables else ""
        raise UserError(f"{data} has no split {split!r}; expected one of {', '.join(names)}{found}", "task.data")
    return source


def available(data: str, task: Task) -> list[str]:
    """Return the task's splits that a folder or a hub data set has, in the task's order."""
    if data.startswith(_HUB):
        locate(data, "train", task)  # checks the form of the name
        tables = load_hub(data.removeprefix(_HUB))
        return [split for split in task.splits if any(name in tables for name in hub_names(split, task))]
    return [split for split in task.splits if locate(data, split, task) is not None]


def digests(data: str, splits: Sequence[str], task: Task) -> dict[str, str]:
    """Return what identifies the content of splits: file name -> digest, or for the hub split -> name and fingerprint."""
    if data.startswith(_HUB):
        tables = load_hub(data.removeprefix(_HUB))
        names = {split: name for split in splits for name in reversed(hub_names(split, task)) if name in tables}
        return {split: f"{data} {tables[name]._fingerprint}" for split, name in names.items()}
    sources = {split: source for split in splits if (source := locate(data, split, task))}
    files = [path for s in sources.values() for path in (s.place, s.dev_ids) if isinstance(path, Path)]
    return {path.name: _digest(path) for path in dict.fromkeys(files)}


def _digest(path: Path) -> str:
    """Return what identifies a file's content and, of a TSV file, how it is read: earlier versions never removed quotes."""
    if path.is_dir():
        return digest_of([[str(each.relative_to(path)), sha256(each)] for each in sorted(files_of(path))])
    quoted = False
    if path.name.endswith((".tsv", ".tsv.gz")):
        with contextlib.suppress(UserError):  # reading the rows reports it
            quoted = is_quoted(path)
    return sha256(path) + (" unquoted" if quoted else "")


def hub_names(split: str, task: Task) -> tuple[str, ...]:
    """Return the names that a split may have on the hub, most specific first."""
    return tuple(dict.fromkeys((task.hub_splits.get(split, split), split)))


def unlabeled_paths(files: Sequence[str], task: Task) -> list[Path]:
    """Return the paths of the files of `task.unlabeled`.

    Raises:
        UserError: a file is missing or of a kind that cannot be read.
    """
    for name in files:
        path = project_path(name)
        if not path.is_file():
            raise UserError(
                f"task.unlabeled: {name} is a folder; name the files in it"
                if path.is_dir()
                else f"task.unlabeled: no such file: {name}"
            )
        if not is_table(path) and path.suffix != ".txt":
            raise UserError(f"task.unlabeled: {name} is not one of .txt, {', '.join(f'.{e}' for e in EXTENSIONS)}")
        if path.suffix == ".txt" and task.multiple_choice:
            raise UserError(
                f"task.unlabeled: {name}: a .txt file contains single texts; give a table with the columns "
                f"{', '.join(task.inputs)}"
            )
        if path.suffix == ".txt" and len(task.text) > 1:
            raise UserError(
                f"task.unlabeled: {name}: a .txt file contains single texts, but {task.name} needs pairs; give a table "
                f"with the columns {' and '.join(task.text)}"
            )
    return [project_path(name) for name in files]


def _stems(split: str, task: Task) -> tuple[str, ...]:
    """Return the names that the file of a split may have, without extension."""
    names = (split, *task.files.get(split, ()), *_OTHER_NAMES.get(split, ()), task.hub_splits.get(split, split))
    return tuple(dict.fromkeys(names))


def _split_files(folder: Path, split: str, task: Task) -> list[Path]:
    paths = [folder / f"{stem}.{extension}" for stem in _stems(split, task) for extension in FILE_EXTENSIONS]
    return [path for path in paths if path.is_file()]


def _locate_in_release(folder: Path, split: str, task: Task) -> Source | None:
    """Return the source of a split in the authors' original release: see `Release`."""
    assert task.release is not None
    train, test, dev_ids = (folder / n for n in (task.release.train, task.release.test, task.release.dev_ids))
    if dev_ids.is_file():
        sources = {
            "train": Source(train, dev_ids),
            "dev": Source(train, dev_ids, is_dev=True),
            "test": Source(test),
        }
    else:
        note = f"no {dev_ids.name}: the labeled test file of the release is used as dev, and there is no test split"
        sources = {"train": Source(train), "dev": Source(test, notes=(note,))}
    source = sources.get(split)
    return source if source and Path(source.place).is_file() else None
