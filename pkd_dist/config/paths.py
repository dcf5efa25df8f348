"""Find files that ship with the project."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def packaged_path(name: str | Path) -> Path:
    """Return where a file or folder that ships with pkd_dist is: in `defaults/` of a wheel, or in the checkout."""
    installed = _PACKAGE / "defaults" / name
    return installed if installed.exists() else _PACKAGE.parent / name


def project_path(name: str | Path) -> Path:
    """Return `name` if it exists or is absolute, else the file of that name that ships with pkd_dist.

    Returns `name` itself if there is none, so that an error message shows what the user wrote.
    """
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute():
        return path
    packaged = packaged_path(path)
    return packaged if packaged.exists() else path
