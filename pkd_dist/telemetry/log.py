"""Log messages: on the terminal from rank 0 only; in RUN/logs/rank-N.log from every rank, with times and tracebacks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

log = logging.getLogger("pkd")


class _StdoutHandler(logging.Handler):
    """Print to the current `sys.stdout`, which progress bars and tests redirect."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stdout, flush=True)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def to_terminal(show: bool) -> None:
    """Configure logging for this process.

    Args:
        show: print messages of level INFO and above to the terminal. Libraries are quiet either way.
    """
    log.setLevel(logging.DEBUG)
    logging.raiseExceptions = False  # a log file on a full disk must not flood the terminal
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    if show:
        handler = _StdoutHandler()
        handler.setLevel(logging.INFO)
        log.addHandler(handler)
    for name in ("transformers", "datasets", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # DeepSpeed resets its level when it is imported
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):  # read when the libraries are imported, later
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message=".*joblib will operate in serial mode"
    )  # without /dev/shm; nothing needs it


def to_file(folder: Path, rank: int) -> None:
    """Also log to `folder/rank-N.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def log_file() -> Path | None:
    """Return the log file of this rank; None before `to_file`."""
    return next((Path(h.baseFilename) for h in log.handlers if isinstance(h, logging.FileHandler)), None)
