"""What an export is made of: `manifest.json` with the sha256 of every file, and the check that all are as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError
from pkd_dist.files import changed_file, digest_of, file_digests, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_REMEDY = "; export it again"


def write(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Writes and returns the manifest of all that lies in a folder.

    Args:
        about: what else it says; its own `digest` covers that too.
    """
    content = {"format_version": FORMAT_VERSION, **about, "files": file_digests(folder)}
    content["digest"] = digest_of(content)
    write_json(folder / MANIFEST, content)
    return content


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose every file is there, is the one that was written, and is alone.

    Raises:
        UserError: it is not so; says which file.
    """
    content = read(folder)
    try:
        problem = changed_file(folder, content["files"])
    except (OSError, ValueError) as error:  # a name that no file can have
        problem = f"{folder / MANIFEST}: names a file that cannot be read ({error})"
    if problem:
        raise UserError(f"{problem}{_REMEDY}")
    extra = sorted(set(_all_files(folder)) - {*content["files"], MANIFEST})
    if extra:
        raise UserError(f"{folder / extra[0]}: does not belong to the export; remove it")
    return content


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an export as it was written; its files are not looked at.

    Raises:
        UserError: it is missing, or was altered.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; give a folder that `pkd export` has written, RUN/export") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read ({error}){_REMEDY}") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{folder / MANIFEST}: is not the manifest of an export{_REMEDY}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format version {content.get('format_version')!r} is not known here (known: "
            f"{FORMAT_VERSION}); use the pkd_dist that wrote it"
        )
    digest = content.pop("digest", None)
    if digest != digest_of(content):
        raise UserError(f"{folder / MANIFEST}: was altered{_REMEDY}")
    return content


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
