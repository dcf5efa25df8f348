"""What a stage is, and what a run remembers of it. Imports no torch.

A stage writes RUN/stages/NAME.json, its marker, when it starts, and again when it is done. The marker holds the inputs that
decide the stage's outcome, so a stage is run once for each set of inputs:

    no marker                               new      it runs
    the same inputs, not done               started  it resumes
    other inputs                            stale    what it made moves to RUN/previous/N, and it reruns
    only `extendable` inputs were raised    extended it continues what it made, done or not
    a damaged marker, or one that is gone   lost     the same; a fingerprinted stage keeps what it made, and resumes
    done, but its outcome was altered       broken   it reruns; a resumable stage keeps the intact part
    done                                    done     it is skipped

Inputs have stable dotted keys; `labels.py` names them for people. A marker ends with a checksum of its content, and holds those of
the files that the stage made: what was altered since is not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from pkd_dist.errors import UserError
from pkd_dist.files import (
    altered,
    checksums,
    digest_of,
    discard,
    evict,
    first_free,
    make_folder,
    move,
    read_object,
    readable_bytes,
    size_of,
    write_json,
)
from pkd_dist.stages.changes import Inputs, all_raised, changed_inputs, describe_changes
from pkd_dist.telemetry.log import log

if TYPE_CHECKING:
    from pkd_dist.stages.context import Context

NAMES = ("data", "teacher", "cache", "init", "distill", "evaluate", "export", "report")
"""The stages in the order in which they run. Each is a module of this package with the same name."""

FORMAT = 3
_CHECKED = 3
"""The first format with checksums."""
Output = TypeVar("Output")


@dataclass(frozen=True)
class Artifacts:
    """The files and folders that a stage makes.

    Attributes:
        kept: moved to RUN/previous/N before the stage reruns.
        temporary: removed once the stage is done.
        unverified: of `kept`, what the marker holds no checksums of: the stage verifies it, or nothing is made of it.
        records: of `kept`, files that cannot be made again. One that was altered is renamed NAME.altered.N.
        resumable: where part of the outcome is missing, the stage keeps the rest and makes that part again.
        fingerprinted: what it made says itself which inputs it belongs to.
    """

    kept: tuple[Path, ...] = ()
    temporary: tuple[Path, ...] = ()
    unverified: tuple[Path, ...] = ()
    records: tuple[Path, ...] = ()
    resumable: bool = False
    fingerprinted: bool = False

    @property
    def verified(self) -> tuple[Path, ...]:
        return tuple(path for path in self.kept if path not in (*self.temporary, *self.unverified))


def _nothing(context: Context, output: object) -> None:
    return None


def _none(inputs: Inputs) -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True)
class Stage(Generic[Output]):
    """One stage, as its module declares it.

    Attributes:
        version: raised when the code changes what comes out; it and the versions of the stages before are inputs.
        output: the frozen dataclass that the stage hands on.
        inputs: (context) -> what decides the outcome.
        run: (context) -> the output; collective, rank 0's output counts.
        missing: (context, output) -> why the outcome cannot be used, or None. May raise UserError.
        verifies: ask `missing` even where the marker has checksums: it looks at what they do not cover.
        artifacts: (context) -> see `Artifacts`.
        require_rerunnable: (context, reason) raises UserError where the stage cannot run again.
        require_replaceable: (context, path) raises UserError where this file, which was altered, must not be made again.
        republish: (context, output) sets the metrics as the stage left them, in a process that skips it.
        extendable: inputs -> keys of the numbers among them that may be raised without starting over. They are no part of
            the fingerprint.
    """

    name: str
    version: int
    output: type[Output]
    inputs: Callable[[Context], Inputs]
    run: Callable[[Context], Output]
    missing: Callable[[Context, Output], str | None]
    artifacts: Callable[[Context], Artifacts]
    verifies: bool = False
    require_rerunnable: Callable[[Context, str], None] = _nothing  # type: ignore[assignment]
    require_replaceable: Callable[[Context, Path], None] = _nothing  # type: ignore[assignment]
    republish: Callable[[Context, Output], None] = _nothing  # type: ignore[assignment]
    extendable: Callable[[Inputs], frozenset[str]] = _none


class SpoiledError(UserError):
    """The output of a stage so far must not be used: the stage starts over the next time it runs.

    Attributes:
        cause: what the user reads.
        reason: shown when the stage reruns.
    """

    def __init__(self, cause: UserError, reason: str):
        super().__init__(cause.message, cause.setting)
        vars(self).update(vars(cause))  # whether every rank raises it
        self.cause, self.reason = cause, reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.cause, self.reason)


# --------------------------------------------------------------------------------------------------------- markers


class _DamagedMarkerError(UserError):
    def __init__(self, path: Path):
        super().__init__(f"{path}: is damaged; remove it to have the stage run again")
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path,), vars(self)


@dataclass(frozen=True)
class Marker:
    """RUN/stages/NAME.json.

    Attributes:
        fingerprint: digest of the inputs but the extendable ones; checkpoints of the stage carry it.
        outputs: fields of the stage's output, once done.
        seconds: time spent, without starts that ended by a kill or an error.
        starts: number of starts with these inputs.
        stopped: how many of them a signal stopped.
        spoiled: why the stage must start over, if it must.
        files: sha256 of each file that the stage made, once done; the keys begin with the name of the artifact.
        verified: False: an earlier version wrote it without checksums, which were added to what was found.
    """

    done: bool
    inputs: Inputs
    fingerprint: str
    outputs: dict[str, object] | None = None
    seconds: float = 0.0
    starts: int = 0
    stopped: int = 0
    spoiled: str | None = None
    files: dict[str, str] | None = None
    verified: bool = True
    format: int = FORMAT

    def write(self, path: Path) -> None:
        content = json.loads(json.dumps(dataclasses.asdict(self) | {"format": FORMAT}))
        write_json(path, content | {"checksum": digest_of(content)})


class State(enum.Enum):
    """How a run finds a stage; see the head of this module."""

    NEW = "new"
    STARTED = "started"
    STALE = "stale"
    EXTENDED = "extended"
    LOST = "lost"
    BROKEN = "broken"
    DONE = "done"


Translation = Callable[[str, dict[str, object]], dict[str, object]]
"""(stage name, marker of format 1) -> the same as format 2, which has no checksums either."""


class Markers:
    """The markers of a run folder; use on one rank.

    Args:
        run: the run folder.
        translate: reads markers of earlier versions of this project.
    """

    def __init__(self, run: Path, translate: Translation):
        self._run, self._translate = run, translate

    def path(self, name: str) -> Path:
        return self._run / "stages" / f"{name}.json"

    def read(self, name: str) -> Marker | None:
        """Return a stage's marker; None where it has none.

        Raises:
            UserError: the marker is damaged, or a later version wrote it.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            raw = read_object(path)
            written_by = int(str(raw.get("format", 1)))
            if "checksum" in raw or written_by >= _CHECKED:
                if raw.pop("checksum") != digest_of(raw):
                    raise ValueError
            else:
                raw = (self._translate(name, raw) if written_by == 1 else raw) | {"verified": False}
            if written_by > FORMAT:
                raise UserError(f"{path}: written by a later version of pkd_dist; use that version, or another run.dir")
            return TypeAdapter(Marker).validate_python(raw, strict=False)
        except PermissionError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise _DamagedMarkerError(path) from None

    def done(self, name: str) -> bool:
        """Return whether a stage's marker says that it is done; a damaged one does not."""
        try:
            marker = self.read(name)
        except _DamagedMarkerError:
            return False
        return marker is not None and marker.done

    def upgrade(self) -> None:
        """Rewrite the markers of earlier versions in today's format, with a checksum of what they hold now."""
        upgraded = []
        for name in NAMES:
            with contextlib.suppress(_DamagedMarkerError):  # reported when the stage's turn comes
                if (marker := self.read(name)) and marker.format < FORMAT:
                    self._write(name, marker)
                    upgraded.append(name)
        if upgraded:
            log.info(
                "%s: an earlier version wrote these markers, without checksums; they are added, and what was altered "
                "before is not found", ", ".join(upgraded),
            )  # fmt: skip

    def state(self, stage: Stage[Output], context: Context) -> tuple[State, str]:
        """Return how the stage is found and, unless it is done, why it runs."""
        try:
            marker = self.read(stage.name)
            if marker is None:
                return self._without_marker(stage, context)
            if marker.spoiled:
                return State.STALE, marker.spoiled
            now = json.loads(json.dumps(inputs_of(stage, context)))
            before, changed = changed_inputs(marker.inputs, now)
            if changed:
                raised = all_raised(before, now, changed, stage.extendable(before))
                return State.EXTENDED if raised else State.STALE, describe_changes(before, now, changed)
            if not marker.done:
                return State.STARTED, "it was interrupted"
            output = self.output(stage)
        except _DamagedMarkerError as damaged:
            return State.LOST, f"{damaged.path} is damaged"
        problem = self._altered(stage, context, marker)
        if problem is None and (stage.verifies or marker.files is None):
            problem = stage.missing(context, output)
        return (State.BROKEN, problem) if problem else (State.DONE, "")

    def _without_marker(self, stage: Stage[Output], context: Context) -> tuple[State, str]:
        """Tell a stage that never ran from one whose marker is gone: later ones have theirs."""
        later = [self.path(name) for name in NAMES[NAMES.index(stage.name) + 1 :]]
        made = any(path.exists() for path in stage.artifacts(context).kept)
        if made and any(path.exists() for path in later):
            return State.LOST, f"{self.path(stage.name)} is missing"
        return State.NEW, "it has not run yet"

    def _altered(self, stage: Stage[Output], context: Context, marker: Marker) -> str | None:
        """Return which of the files that a stage made is not as it left it; records are looked at by `settle`."""
        artifacts = stage.artifacts(context)
        paths = [path for path in artifacts.verified if path not in artifacts.records]
        found = list(altered(paths, marker.files or {}))
        for path, _ in found:
            stage.require_replaceable(context, path)
        return found[0][1] if found else None

    def settle(self, stage: Stage[Output], context: Context) -> None:
        """Give a stage that is found done the checksums it lacks, and set altered records aside, as NAME.altered.N.

        They stay lost; the stage names them at this and every later start, when it is republished. They are not moved to
        RUN/previous, which people remove.
        """
        self._tidy(stage, context)
        marker, artifacts = self._require(stage.name), stage.artifacts(context)
        if marker.files is None:
            self._write(stage.name, dataclasses.replace(marker, files=checksums(artifacts.verified)))
            return
        lost = [path for path, _ in altered(artifacts.records, marker.files)]
        if lost:
            for path in (path for path in lost if path.exists()):
                move(path, first_free(path.with_name(f"{path.name}.altered")))
            left = {key: digest for key, digest in marker.files.items() if key not in {path.name for path in lost}}
            self._write(stage.name, dataclasses.replace(marker, files=left))

    def output(self, stage: Stage[Output]) -> Output:
        """Return what a stage that is done handed on.

        Raises:
            UserError: its marker is damaged.
        """
        marker = self.read(stage.name)
        try:
            return TypeAdapter(stage.output).validate_python(marker and marker.outputs)
        except ValidationError:
            raise _DamagedMarkerError(self.path(stage.name)) from None

    def begin(self, stage: Stage[Output], context: Context, state: State, inputs: Inputs) -> Marker:
        """Mark a stage as started, and move an outcome of other inputs aside first.

        Raises:
            UserError: something this run did not make is in the way.
        """
        artifacts = stage.artifacts(context)
        found = next((path for path in artifacts.kept if path.exists()), None)
        if state is State.NEW and found and not artifacts.resumable:
            raise UserError(f"{found}: exists, but this run did not make it; choose another run.dir, or move it away")
        keeps = {State.BROKEN: artifacts.resumable, State.LOST: artifacts.resumable or artifacts.fingerprinted}
        if state is State.STALE or not keeps.get(state, True):
            self._set_aside(stage.name, artifacts.kept)
        marker = self.read(stage.name) if state in (State.STARTED, State.EXTENDED) else None
        if marker is None:
            marker = Marker(done=False, inputs=inputs, fingerprint=fingerprint_of(stage, inputs))
        elif state is State.EXTENDED:
            fresh = Marker(False, inputs, marker.fingerprint)
            marker = dataclasses.replace(fresh, seconds=marker.seconds)
        return self._write(stage.name, dataclasses.replace(marker, starts=marker.starts + 1))

    def stop(self, name: str, seconds: float) -> None:
        """Note that a signal stopped the stage after `seconds`."""
        marker = self._require(name)
        changed = dataclasses.replace(marker, stopped=marker.stopped + 1, seconds=round(marker.seconds + seconds, 1))
        self._write(name, changed)

    def spoil(self, name: str, reason: str) -> None:
        """Have the stage start over the next time it runs."""
        self._write(name, dataclasses.replace(self._require(name), done=False, spoiled=reason))

    def end(self, stage: Stage[Output], context: Context, output: Output, seconds: float) -> None:
        """Mark a stage as done, and remove its temporary files. `seconds` is the time since its last start.

        Raises:
            UserError: the outcome does not read back from the disk as it was written; temporary files are kept.
        """
        if any(path.exists() for path in stage.artifacts(context).temporary):
            for path in stage.artifacts(context).kept:
                evict(path)
            if problem := stage.missing(context, output):
                raise UserError(f"{problem} on the disk; nothing is removed; check the disk and rerun the same command")
        marker = self._require(stage.name)
        fields = dataclasses.asdict(output)  # type: ignore[call-overload]
        seconds = round(marker.seconds + seconds, 1)
        files = checksums(stage.artifacts(context).verified)
        self._write(stage.name, dataclasses.replace(marker, done=True, outputs=fields, seconds=seconds, files=files))
        self._tidy(stage, context)

    def _tidy(self, stage: Stage[Output], context: Context) -> None:
        """Remove the temporary files of a stage that is done; a kill may have left some."""
        for path in stage.artifacts(context).temporary:
            discard(path)

    def _require(self, name: str) -> Marker:
        marker = self.read(name)
        assert marker is not None, f"the stage {name} was not begun"
        return marker

    def _write(self, name: str, marker: Marker) -> Marker:
        marker.write(self.path(name))
        return marker

    def _set_aside(self, name: str, paths: tuple[Path, ...]) -> None:
        existing = [path for path in paths if path.exists()]
        if not existing:
            return
        previous = previous_folder(self._run)
        numbers = [int(p.name) for p in previous.iterdir() if p.name.isdigit()] if previous.exists() else []
        target = previous / str(max(numbers, default=0) + 1)
        make_folder(target)
        for path in existing:
            move(path, target / path.name)
        log.info("%s: its earlier outcome is kept in %s (%s)", name, target, readable_bytes(size_of(target)))


def previous_folder(run: Path) -> Path:
    """Return where a run keeps the outcomes of earlier settings."""
    return run / "previous"


def inputs_of(stage: Stage[Output], context: Context) -> Inputs:
    """Return all that decides a stage's outcome: its inputs, its version and those of the stages before it."""
    reached = NAMES[: NAMES.index(stage.name) + 1]
    return {f"version.{name}": context.versions[name] for name in reached} | stage.inputs(context)


def fingerprint_of(stage: Stage[Output], inputs: Inputs) -> str:
    """Return the fingerprint of a stage with these inputs, which its checkpoints carry."""
    extendable = stage.extendable(inputs)
    return digest_of({key: value for key, value in inputs.items() if key not in extendable})


def absent(path: Path) -> str | None:
    """Say that a path is missing; None where it exists."""
    return None if path.exists() else f"{path} is missing"
