"""Messages: on the terminal from rank 0 alone; in RUN/logs/rank-N.log from every rank, with times and tracebacks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

log = logging.getLogger("pkd")


class _ToTerminal(logging.Handler):
    """Prints through whatever `sys.stdout` is now, so that progress bars and tests can redirect it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stdout, flush=True)


def _errors_alone(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def to_terminal(show: bool) -> None:
    """Lets messages through to the terminal where `show`; quiets the libraries, whose news is not the user's."""
    log.setLevel(logging.DEBUG)
    logging.raiseExceptions = False  # a log file on a full disk must not fill the terminal
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    if show:
        handler = _ToTerminal()
        handler.setLevel(logging.INFO)
        log.addHandler(handler)
    for name in ("transformers", "datasets", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_errors_alone)  # it sets its own level when it is imported
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):  # read when those are imported, which comes later
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def to_file(folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def log_file() -> Path | None:
    """This rank's log file, where it is open."""
    return next((Path(h.baseFilename) for h in log.handlers if isinstance(h, logging.FileHandler)), None)
