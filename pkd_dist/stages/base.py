"""What a run remembers of its stages, so that each is done once.

A stage writes RUN/stages/NAME.json when it starts (with the digest of all that decides its outcome) and again, with
`"done": true`, when it has ended; it counts its starts, and how many of them a signal stopped. Found done with the same
inputs, it is not run again; found with other inputs, it says what changed, moves what it made to RUN/previous/N, and runs.
Found started and not done, it goes on. Found unreadable, or spoiled by what it was made of, it is moved aside as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.telemetry.log import log


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        inputs: -> what decides the outcome, by the name that a change is reported under.
        run: does the work on all ranks and returns what the marker remembers (rank 0's counts).
        made: files and folders it makes, moved aside when it must run again.
        leftovers: what it needs only until it is done.
        completes: where a part of its outcome is gone, it keeps the rest and makes that part again.
        missing: -> why its outcome cannot be used as it stands; None where it can. May raise a UserError.
    """

    name: str
    inputs: Callable[[], dict[str, Any]]
    run: Callable[[], dict[str, Any]]
    made: tuple[Path, ...]
    missing: Callable[[dict[str, Any]], str | None]
    leftovers: tuple[Path, ...] = ()
    completes: bool = False


class Markers:
    """The markers in a run folder; use on one rank."""

    def __init__(self, run: Path):
        self._run = run

    def _path(self, stage: Stage) -> Path:
        return self._run / "stages" / f"{stage.name}.json"

    def _read(self, stage: Stage) -> dict[str, Any]:
        return json.loads(self._path(stage).read_text())

    def state(self, stage: Stage) -> tuple[str, str]:
        """(new | started | stale: other inputs | broken: its outcome is not there any more | done, in words)."""
        path = self._path(stage)
        if not path.exists():
            return "new", "it has not run yet"
        try:
            marker = json.loads(path.read_text())
        except ValueError:
            return "stale", f"{path} cannot be read"
        if marker.get("spoiled"):
            return "stale", marker["spoiled"]
        inputs = json.loads(json.dumps(stage.inputs()))
        before = marker["inputs"]
        changed = [k for k in {**inputs, **before} if inputs.get(k) != before.get(k)]
        if changed:
            parts = [f"{k} changed ({_short(before.get(k))} -> {_short(inputs.get(k))})" for k in changed[:3]]
            return "stale", "; ".join(parts) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        if not marker["done"]:
            return "started", "it was interrupted"
        missing = stage.missing(marker["outputs"])
        return ("broken", missing) if missing else ("done", "")

    def outputs(self, stage: Stage) -> dict[str, Any]:
        """What a stage that is done remembers."""
        return self._read(stage)["outputs"]

    def begin(self, stage: Stage, state: str, inputs: dict[str, Any]) -> None:
        """Marks a stage started; what an outcome of other inputs left is moved aside first."""
        there = next((path for path in stage.made if path.exists()), None)
        if state == "new" and there and not stage.completes:
            raise UserError(f"{there}: is there, but this run did not make it; choose another run.dir, or move it away")
        if state == "stale" or (state == "broken" and not stage.completes):
            self._set_aside(stage)
        history = self._read(stage) if state == "started" else {}
        history = {key: history.get(key, 0) for key in ("starts", "stopped", "seconds")}
        marker = {"done": False, "inputs": inputs, **history, "starts": history["starts"] + 1}
        write_json(self._path(stage), marker)

    def stop(self, stage: Stage, seconds: float) -> None:
        """A signal stopped the stage, after so many seconds; at its next start it goes on."""
        marker = self._read(stage)
        more = {"stopped": marker["stopped"] + 1, "seconds": round(marker["seconds"] + seconds, 1)}
        write_json(self._path(stage), marker | more)

    def spoil(self, stage: Stage, why: str) -> None:
        """What the stage has made so far does not count: at its next start it is set aside."""
        write_json(self._path(stage), self._read(stage) | {"done": False, "spoiled": why})

    def end(self, stage: Stage, inputs: dict[str, Any], outputs: dict[str, Any], seconds: float) -> None:
        """Marks a stage done and removes what it needed only until then. `seconds`: since its last start."""
        marker = self._read(stage)
        marker |= {"done": True, "inputs": inputs, "outputs": outputs, "seconds": round(marker["seconds"] + seconds, 1)}
        write_json(self._path(stage), marker)
        for path in stage.leftovers:
            remove(path)

    def _set_aside(self, stage: Stage) -> None:
        there = [path for path in stage.made if path.exists()]
        if not there:
            return
        previous = self._run / "previous"
        numbers = [int(p.name) for p in previous.iterdir() if p.name.isdigit()] if previous.exists() else []
        target = previous / str(max(numbers, default=0) + 1)
        target.mkdir(parents=True)
        for path in there:
            os.replace(path, target / path.name)
        log.info("%s: what it made before is kept in %s", stage.name, target)


def absent(path: Path) -> str | None:
    """That a path is not there, in words; None where it is."""
    return None if path.exists() else f"{path} is missing"


def _short(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 60 else shown[:40] + "..."
