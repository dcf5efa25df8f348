"""What an export is made of: `manifest.json` with the sha256 of every file, and the check that all are as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError
from pkd_dist.files import changed_file, digest_of, file_digests, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


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
    remedy = "; export it again"
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; give a folder that `pkd export` has written, RUN/export") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read ({error}){remedy}") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{folder / MANIFEST}: is not the manifest of an export{remedy}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format version {content.get('format_version')!r} is not known here (known: "
            f"{FORMAT_VERSION}); use the pkd_dist that wrote it"
        )
    digest = content.pop("digest", None)
    if digest != digest_of(content):
        raise UserError(f"{folder / MANIFEST}: was altered{remedy}")
    if problem := changed_file(folder, content["files"]):
        raise UserError(f"{problem}{remedy}")
    extra = sorted(set(_all_files(folder)) - {*content["files"], MANIFEST})
    if extra:
        raise UserError(f"{folder / extra[0]}: does not belong to the export; remove it")
    return content


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
