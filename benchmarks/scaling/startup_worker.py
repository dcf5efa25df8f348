"""Run launcher/train.py on one rank up to its first step, and time each part of the start.

    python -m benchmarks.scaling.startup_worker FILE STARTED [arguments of launcher/train.py]

STARTED is the time of the command, in seconds since 1970. Ends the process after the first step and writes FILE.
"""

import sys
import time

BEGUN = time.time()

import builtins  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.spans import Spans  # noqa: E402

PARTS: dict[str, dict[str, str]] = {
    "pkd_dist.config.load": {"load": "configuration"},
    "pkd_dist.telemetry.endpoint": {"serve": "metrics server"},
    "pkd_dist.distributed.world": {"World.__init__": "rendezvous of the ranks"},
    "pkd_dist.data.tokens": {"problem": "data: checksums", "open_tokens": "data: opened"},
    "pkd_dist.model.digests": {"weights_digest": "teacher: checksum"},
    "pkd_dist.model.encoder": {"load_model": "models: loaded"},
    "pkd_dist.distillation.cache": {"require_shard": "cache: checksums", "CacheReader.__init__": "cache: opened"},
    "pkd_dist.training.engine": {"open_engine": "engine"},
    "pkd_dist.training.trainer": {"resume": "checkpoint", "Trainer.train_step": "first step"},
    "pkd_dist.stages.context": {"resolve": "checks before the start"},
    "pkd_dist.pipeline": {"_run_stage": "checks of finished stages"},
}
"""Module -> function -> the part of the start it is.

In the order of imports: each module is imported and its functions are wrapped before another one takes them from it.
"""
IMPORTS, REST, INTERPRETER = "imports", "rest", "interpreter"


def follow(spans: Spans, end: Any) -> None:
    """Import the modules of `PARTS` and wrap their functions; `end` is called with the result of the first step."""
    for name, functions in PARTS.items():
        module = importlib.import_module(name)
        for function, part in functions.items():
            path, _, last = function.rpartition(".")
            owner = getattr(module, path) if path else module
            setattr(owner, last, spans.wrapped(getattr(owner, last), part))
    trainer = sys.modules["pkd_dist.training.trainer"].Trainer
    step = trainer.train_step
    trainer.train_step = lambda self: end(step(self))


def main() -> None:
    output, started, *argv = sys.argv[1:]
    spans = Spans()

    def end(_: Any) -> None:
        whole, parts = time.time() - float(started), spans.finished()
        parts[INTERPRETER] = BEGUN - float(started)
        parts[REST] = max(0.0, whole - sum(seconds for part, seconds in parts.items() if part != REST))
        Path(output).write_text(json.dumps({"seconds": whole, "parts": parts}))
        os._exit(0)

    builtins.__import__ = spans.wrapped(builtins.__import__, IMPORTS)
    importlib.import_module = spans.wrapped(importlib.import_module, IMPORTS)
    with spans.span(REST):
        from pkd_dist.loading import loading

        with loading():  # like the launcher
            follow(spans, end)
        from pkd_dist.cli.launch import leave, train

        status = train(argv)
    leave(status or 1)


if __name__ == "__main__":
    main()
