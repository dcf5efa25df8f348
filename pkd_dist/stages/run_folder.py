"""The run folder as a whole: who may use it, what a killed job left in it, and config.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from pkd_dist import __version__, lock
from pkd_dist.distributed.world import World
from pkd_dist.environment import Environment
from pkd_dist.errors import UserError
from pkd_dist.files import first_free, is_full, make_folder, move, remove, remove_leftovers, write_atomically
from pkd_dist.stages.base import NAMES, Artifacts, Markers
from pkd_dist.stages.context import Resolved
from pkd_dist.stages.translation import translate
from pkd_dist.telemetry.log import log, to_file

_LIBRARIES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy")


@contextlib.contextmanager
def opened(run: Resolved, world: World, artifacts: Iterable[Artifacts], fresh: bool) -> Iterator[None]:
    """Hold the run folder for the block; collective.

    Args:
        artifacts: of all stages, among which a killed job may have left half-written files.
        fresh: start over; an existing run folder is renamed first.

    Raises:
        UserError: another job uses the folder, or it cannot be written.
    """
    folder = run.paths.run
    held = lock.Lock(folder)

    def prepare() -> None:
        _require_own_results(run)
        if fresh and folder.exists():
            lock.Lock(folder).acquire(tick=world.beat).release()  # not while another job uses it
            kept = move_aside(folder)
            log.info("--fresh: the earlier run is kept in %s", kept)
            if kept and run.paths.results.exists():
                move(run.paths.results, kept / run.paths.results.name)
        with _writable("run.dir", folder):
            make_folder(folder)
            _set_aside_other_kinds(folder)
            held.acquire(tick=world.beat)
            _remove_leftovers(folder, list(artifacts))
            make_folder(folder / "stages")
        for key, other in _other_folders(run).items():
            with _writable(key, other):
                make_folder(other)
                if key == "evaluate.result_dir" and not os.access(other, os.W_OK):  # hours before it is written
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        content = {**run.config.model_dump(mode="json"), "resolved": dataclasses.asdict(environment(run, world))}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_atomically(folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))

    try:
        world.on_main(prepare)
        to_file(folder / "logs", world.rank)
        yield
    finally:
        held.release()


def _require_own_results(run: Resolved) -> None:
    """Raise UserError where `evaluate.result_dir` is no folder, or has the results of another run."""
    setting = run.config.evaluate.result_dir
    if setting and Path(setting).is_file():
        raise UserError(f"{setting} is a file; give a folder", "evaluate.result_dir")
    if not setting or not run.paths.results.exists():
        return
    try:
        marker = Markers(run.paths.run, translate).read("evaluate")
    except UserError:  # damaged: the stage will say so
        return
    if marker is None or marker.inputs.get("evaluate.result_dir") != setting:
        raise UserError(
            f"{run.paths.results} exists, but this run did not make it; choose another folder, or move it away",
            "evaluate.result_dir",
        )


def _set_aside_other_kinds(folder: Path) -> None:
    """Rename what is a file where a run has a folder, and the other way round."""
    files = [folder / "config.yaml", folder / lock.NAME, *(folder / "stages" / f"{name}.json" for name in NAMES)]
    folders = [folder / name for name in ("stages", "logs", "counters", "cache", "predictions")]
    for path in [*(path for path in folders if path.is_file()), *(path for path in files if path.is_dir())]:
        target = first_free(path)
        move(path, target)
        log.info("%s: is not a %s; it is kept as %s", path, "folder" if path in folders else "file", target)


def _other_folders(run: Resolved) -> dict[str, Path]:
    """Return the folders outside the run folder that a run writes to, by their setting."""
    return {
        "evaluate.result_dir": run.paths.results.parent,
        "cache.dir": Path(run.config.cache.dir or run.paths.run),
    }


def require_writable(run: Resolved) -> None:
    """Check that the folders of a run can be made and written; writes nothing.

    Raises:
        UserError: one of them cannot.
    """
    for key, folder in {"run.dir": run.paths.run, **_other_folders(run)}.items():
        with _writable(key, folder):
            nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
            if not nearest.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            shared = key == "cache.dir" and nearest == folder.absolute()  # complete, it is only read
            if not shared and not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def _writable(key: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"{key}: {folder} is not writable ({error.strerror}); choose another {key}") from None


def _remove_leftovers(folder: Path, artifacts: list[Artifacts]) -> None:
    """Remove temporary files that a killed job left where a run writes; the lock says that nobody writes there now."""
    made = {path for stage in artifacts for path in (*stage.kept, *stage.temporary)}
    for path in made:
        for leftover in path.parent.glob(f".{path.name}.*tmp"):  # beside results that are elsewhere
            remove(leftover)
    for path in {
        folder,
        folder / "stages",
        folder / "counters",
        *made,
        *folder.glob("data/*"),
        *folder.glob("predictions/*"),
    }:
        remove_leftovers(path)


def move_aside(folder: Path) -> Path | None:
    """Rename a run folder to the first free NAME.N; None where it does not exist."""
    folder = folder.resolve()
    if not folder.exists():
        return None
    target = first_free(folder)
    move(folder, target)
    return target


def environment(run: Resolved, world: World) -> Environment:
    """Return what the run was resolved to, beside its settings."""
    distill, pairs = run.config.distill, max(1, len(run.layer_map.pairs))
    beta_mean = distill.beta * {"mean": 1, "pair_sum": pairs, "sum": pairs * run.teacher_width}[distill.pt_reduction]
    libraries = {name: found for name in _LIBRARIES if (found := _version(name))}
    return Environment(
        versions={"pkd_dist": __version__, "python": platform.python_version(), **libraries},
        git_revision=_git_revision(),
        world_size=world.size,
        launcher=world.launcher,
        device=world.device.type,
        precision=run.precision,
        teacher_precision=run.teacher_precision,
        deepspeed=run.deepspeed,
        teacher_layers=None if run.has_answers else run.teacher_layers,
        student_layers=run.student_layers,
        copied_layers=None if run.copied_layers is None else list(run.copied_layers),
        patience_pairs=[list(pair) for pair in run.layer_map.pairs],
        beta_mean=beta_mean,
        beta_sum=beta_mean / (pairs * run.teacher_width),
    )


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the revision of this code: of the checkout, or of the snapshot that a SLURM job runs."""
    root = Path(__file__).resolve().parents[2]
    if (root / "REVISION").is_file():
        return (root / "REVISION").read_text().strip()
    if not (root / ".git").exists():  # installed: another project's repository may be around it
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None
