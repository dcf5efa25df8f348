"""Find files that ship with the project."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def project_path(name: str | Path) -> Path:
    """Return `name` if it exists, else its copy in the checkout or in the installed package's `defaults/`.

    Returns `name` itself if none of them exists, so that an error message shows what the user wrote.
    """
    path = Path(name).expanduser()
    candidates = [path] if path.is_absolute() else [path, _PACKAGE.parent / path, _PACKAGE / "defaults" / path]
    return next((candidate for candidate in candidates if candidate.exists()), path)
