"""Run launcher/train.py on one rank up to its first step, and time each part of the start.

    python -m benchmarks.scaling.startup_worker FILE STARTED [arguments of launcher/train.py]

STARTED is the time of the command, in seconds since 1970. Functions are wrapped when their module has been imported, so
that imports happen where they happen in a run. Ends the process after the first step and writes FILE.
"""

from __future__ import annotations

import sys
import time

BEGUN = time.time()

import builtins  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from importlib.machinery import ModuleSpec, PathFinder  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.spans import Spans  # noqa: E402

FIRST_STEP = "first step"
FOLLOWED: dict[str, dict[str, str]] = {
    "pkd_dist.config.load": {"load": "configuration"},
    "pkd_dist.distributed.world": {"World.__init__": "rendezvous of the ranks"},
    "pkd_dist.pipeline": {
        "Pipeline.__init__": "checks before the start",
        "Pipeline._open_folder": "run folder",
        "Pipeline._run_stage": "checks of finished stages",
    },
    "pkd_dist.telemetry.endpoint": {"serve": "metrics server"},
    "pkd_dist.data.tokens": {"problem": "data: checksums", "open_tokens": "data: opened"},
    "pkd_dist.distillation.cache": {"require_shard": "cache: checksums", "CacheReader.__init__": "cache: opened"},
    "pkd_dist.model.encoder": {"weights_digest": "teacher: checksum", "load_model": "models: loaded"},
    "pkd_dist.training.engine": {"Engine.__init__": "engine"},
    "pkd_dist.training.trainer": {"Trainer._resume": "checkpoint", "Trainer._step": FIRST_STEP},
}
"""Module -> function -> the part of the start it is."""
IMPORTS, REST, INTERPRETER = "imports", "rest", "interpreter"


class _Follower:
    """An importer that wraps the functions of a module after its import."""

    def __init__(self, spans: Spans, ended: Any):
        self.spans, self.ended = spans, ended

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in FOLLOWED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for function, part in FOLLOWED[name].items():
                owner: Any = module
                *above, last = function.split(".")
                for step in above:
                    owner = getattr(owner, step)
                wrapped = self.spans.wrapped(getattr(owner, last), part)
                setattr(owner, last, self.ended(wrapped) if part == FIRST_STEP else wrapped)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main() -> None:
    output, started, *argv = sys.argv[1:]
    spans = Spans()

    def ended(step: Any) -> Any:
        def last(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            whole, parts = time.time() - float(started), spans.finished()
            parts[INTERPRETER] = BEGUN - float(started)
            parts[REST] = max(0.0, whole - sum(seconds for part, seconds in parts.items() if part != REST))
            Path(output).write_text(json.dumps({"seconds": whole, "parts": parts}))
            os._exit(0)

        return last

    sys.meta_path.insert(0, _Follower(spans, ended))  # type: ignore[arg-type]
    builtins.__import__ = spans.wrapped(builtins.__import__, IMPORTS)
    importlib.import_module = spans.wrapped(importlib.import_module, IMPORTS)
    with spans.span(REST):
        from pkd_dist.cli.launch import leave, train

        status = train(argv)
    leave(status or 1)


if __name__ == "__main__":
    main()
