"""Act as an operator who follows the last message of the job."""

import os
import re
import shutil
from pathlib import Path


def follow(message: str, aside: Path) -> str | None:
    """Do what the message asks for, choosing the mildest of its remedies, and return a description.

    Files are moved away to `aside`. Returns `--fresh` if the next start needs this flag, None if nothing is asked for.
    """
    named = re.search(r"(/[^\s:,;]+)", message)
    path = Path(named[1]) if named else None
    if path and path.exists():
        if re.search(r"remove (the file|it)\b", message):
            path.unlink()
            return f"removed {path.name}"
        if re.search(r"remove the folder\b", message):
            folder = path.parent if path.is_file() else path
            shutil.rmtree(folder)
            return f"removed {folder.name}/"
        if re.search(r"move it away\b", message):
            aside.mkdir(exist_ok=True)
            os.replace(path, aside / f"{len(list(aside.iterdir()))}-{path.name}")
            return f"moved {path.name} away"
    return "--fresh" if "--fresh" in message else None
