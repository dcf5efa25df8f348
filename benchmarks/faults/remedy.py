"""What an operator does who reads the job's last message and follows it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path


def follow(message: str, aside: Path) -> str | None:
    """Does what the message asks for, the mildest of what it offers; returns that in words.

    Args:
        aside: folder that takes what is to be moved away.

    Returns:
        None where it asks for nothing; `--fresh` where the next start must have this flag.
    """
    named = re.search(r"(/[^\s:,;]+)", message)
    path = Path(named[1]) if named else None
    if path and path.exists() and re.search(r"remove (the file|it)\b", message):
        path.unlink()
        return f"removed {path.name}"
    if path and path.exists() and re.search(r"remove the folder\b", message):
        folder = path.parent if path.is_file() else path
        shutil.rmtree(folder)
        return f"removed {folder.name}/"
    if path and path.exists() and re.search(r"move it away\b", message):
        aside.mkdir(exist_ok=True)
        os.replace(path, aside / f"{len(list(aside.iterdir()))}-{path.name}")
        return f"moved {path.name} away"
    return "--fresh" if "--fresh" in message else None
