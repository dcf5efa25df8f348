"""launcher/train.py up to its first step, with the time of each part of the start; one rank.

    python -m benchmarks.scaling.startup_worker FILE STARTED [arguments of launcher/train.py]

STARTED is the time of the command, seconds since 1970. Functions are followed from when their module has been imported,
so that imports happen where they happen in a run. Ends the process after the first step, and writes FILE.
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

FOLLOWED: dict[str, dict[str, str]] = {
    "pkd_dist.config.load": {"load": "configuration"},
    "pkd_dist.distributed.world": {"World.__init__": "the ranks meet"},
    "pkd_dist.pipeline": {
        "Pipeline.__init__": "checks before the start",
        "Pipeline._open_folder": "run folder",
        "Pipeline._run_stage": "stages that are done: checked",
    },
    "pkd_dist.telemetry.endpoint": {"serve": "metrics server"},
    "pkd_dist.data.tokens": {"problem": "data: checksums", "open_tokens": "data: opened"},
    "pkd_dist.distillation.cache": {"shard_problem": "cache: checksums", "CacheReader.__init__": "cache: opened"},
    "pkd_dist.model.encoder": {"weights_digest": "teacher: checksum", "load_model": "models: loaded"},
    "pkd_dist.training.trainer": {"open_engine": "engine", "resume": "checkpoint", "Trainer.train_step": "first step"},
}
"""Module -> function -> the part of the start that it is."""
IMPORTS, REST, INTERPRETER = "imports", "rest", "interpreter"


class _Follower:
    """Among the importers: wraps the functions of a module once it has been imported."""

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
                setattr(owner, last, self.ended(wrapped) if part == "first step" else wrapped)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main() -> None:
    output, started, *argv = sys.argv[1:]
    spans = Spans()

    def ended(step: Any) -> Any:
        def last(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            now, parts = time.time(), spans.finished()
            parts[INTERPRETER] = BEGUN - float(started)
            whole = now - float(started)
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
