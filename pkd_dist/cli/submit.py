"""`pkd-submit`: submit a run to SLURM.

options + configuration, checked -> RUN/slurm/N with the code, the settings and train.sbatch -> sbatch

The job reads nothing else of the project, so every requeue runs the same code with the same settings.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from pkd_dist import __version__
from pkd_dist.cli.arguments import OneValue
from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load
from pkd_dist.config.paths import packaged_path, project_path
from pkd_dist.config.schema import Config
from pkd_dist.data import answers, sources, tasks, text
from pkd_dist.errors import UserError
from pkd_dist.files import write_json

DEFAULT_WORKERS = 4
PACKAGE = Path(__file__).resolve().parents[1]
_OF_A_JOB, _OF_THE_CLUSTER = ("SLURM_", "SLURMD_", "SRUN_"), ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _count(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: an integer in a range."""

    def parse(value: str) -> int:
        if not value.isascii() or not value.isdigit() or int(value) < low or (high is not None and int(value) > high):
            limit = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{value!r} is invalid; allowed: an integer {limit}")
        return int(value)

    return parse


def _gpus(value: str) -> str:
    if not re.fullmatch(r"([\w.-]+:)?[1-9]\d*", value, re.ASCII):
        raise argparse.ArgumentTypeError(f"{value!r} is invalid; allowed: an integer of at least 1, or TYPE:N")
    return value


def _nodes(value: str) -> str:
    low, _, high = value.partition("-")
    if not re.fullmatch(r"\d+(-\d+)?", value, re.ASCII) or not 1 <= int(low) <= int(high or low):
        raise argparse.ArgumentTypeError(f"{value!r} is invalid; allowed: N, or MIN-MAX for an elastic job")
    return value


def _time_limit(value: str) -> str:
    if not _TIME.fullmatch(value) or not _seconds(value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is invalid; allowed: minutes, minutes:seconds, hours:minutes:seconds, "
            "days-hours[:minutes[:seconds]]"
        )
    return value


def _seconds(time: str) -> int:
    """Return the seconds of a valid time limit in SLURM's notation."""
    matched = _TIME.fullmatch(time)
    assert matched is not None
    days, *parts = matched.groups()
    units = (3600, 60, 1) if days or parts[2] else (60, 1, 0)
    return int(days or 0) * 86400 + sum(int(part or 0) * unit for part, unit in zip(parts, units, strict=True))


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="pkd-submit",
        description="Submit a run to SLURM. The job is stopped, requeued and resumed until the run is done.",
        epilog="example: pkd-submit --config configs/demo.yaml --nodes 2 --gpus-per-node 4 --time 8:00:00; "
        "pkd-submit --sweep configs/sweep.yaml --workers 16 --gpus-per-node 1 --time 2:00:00",
        allow_abbrev=False,
    )
    parser.register("action", None, OneValue)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML of the run")
    what.add_argument(
        "--sweep", metavar="FILE", help="YAML of a sweep: a job array of its workers, and a job that trains the winner"
    )
    parser.add_argument("--workers", type=_count(1), metavar="W", help="--sweep: jobs of the array (default 4)")
    parser.add_argument("--nodes", type=_nodes, default="1", metavar="N", help="nodes, or MIN-MAX (default 1)")
    parser.add_argument("--gpus-per-node", type=_gpus, metavar="[TYPE:]G", help="GPUs per node, one rank each")
    parser.add_argument("--tasks-per-node", type=_count(1), metavar="T", help="ranks per node without GPUs (default 1)")
    parser.add_argument("--cpus-per-task", type=_count(1), metavar="C", help="CPU cores per rank")
    parser.add_argument("--time", type=_time_limit, help="time limit of each start, such as 8:00:00")
    for name in ("partition", "account", "qos", "constraint"):
        parser.add_argument(f"--{name}", metavar="NAME", help="passed to sbatch")
    parser.add_argument(
        "--signal-seconds", type=_count(1, 65535), default=120, metavar="S",
        help="stop the run S seconds before its time limit (default 120)",
    )  # fmt: skip
    parser.add_argument("--max-restarts", type=_count(0), default=50, metavar="R", help="maximum requeues (default 50)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="further options of sbatch, such as '--mem=0'"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch command and script; write nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    return parser


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _make_parser()
    joined: list[str] = []
    for argument in argv:  # argparse takes a value that starts with a dash for an option of its own
        if joined and joined[-1] == "--sbatch":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    options = parser.parse_intermixed_args(joined)
    if options.gpus_per_node and options.tasks_per_node:
        parser.error("--tasks-per-node is for nodes without GPUs; --gpus-per-node starts one rank per GPU")
    if options.workers and not options.sweep:
        parser.error("--workers is for --sweep")
    if options.sweep and (options.nodes != "1" or options.tasks_per_node):
        parser.error("--sweep: each job of the array has one node and one task; leave --nodes and --tasks-per-node out")
    if options.time and options.signal_seconds >= _seconds(options.time):
        parser.error(
            f"--signal-seconds {options.signal_seconds} is not less than --time {options.time} "
            f"({_seconds(options.time)} s), so the run would stop at once; raise --time or lower --signal-seconds"
        )
    return options


def _tasks_per_node(options: argparse.Namespace) -> int:
    if options.sweep:  # one `pkd sweep`, with a worker for each GPU
        return 1
    return int(options.gpus_per_node.rpartition(":")[2]) if options.gpus_per_node else options.tasks_per_node or 1


def _sbatch_command(
    options: argparse.Namespace, folder: Path, own: Sequence[str] = (), program: Sequence[str] = ()
) -> list[str]:
    """Return the command that submits a job.

    Args:
        own: Options of sbatch for this job.
        program: A file in the snapshot and its arguments; empty: the launcher.
    """
    tasks = _tasks_per_node(options)
    # With a number of tasks SLURM allocates only the smallest number of a range of nodes.
    size = {"mincpus": tasks * (options.cpus_per_task or 1)} if "-" in options.nodes else {"ntasks-per-node": tasks}
    given = {
        "job-name": f"pkd-{folder.parent.parent.name}",
        "chdir": Path.cwd(),  # relative paths in the YAML keep their meaning
        "output": folder / "logs" / "%j.log",
        "nodes": options.nodes,
        **size,
        "signal": f"B:USR1@{options.signal_seconds}",
    } | {
        name: getattr(options, name.replace("-", "_"))
        for name in ("gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos", "constraint")
    }
    try:
        extra = [word for option in options.sbatch for word in shlex.split(option)]
    except ValueError as error:
        raise UserError(f"--sbatch: {' '.join(options.sbatch)!r} cannot be parsed: {error}") from None
    return [
        "sbatch", "--parsable", *(f"--{name}={value}" for name, value in given.items() if value is not None), *own, *extra,
        *map(str, (folder / "train.sbatch", folder, sys.executable, tasks, options.max_restarts)), *program,
    ]  # fmt: skip


def _sweep(folder: Path, *more: str) -> list[str]:
    """Return the program of a job that takes part in a sweep, whose output folder is run.dir."""
    output = str(folder.parents[1])
    return ["pkd_dist/cli/__main__.py", "sweep", "--config", str(folder / "run.yaml"), "--output", output, *more]


def _commands(options: argparse.Namespace, folder: Path) -> list[list[str]]:
    """Return the commands that submit a run's job, or a sweep's array and, after it, the job that trains the winner."""
    if not options.sweep:
        return [_sbatch_command(options, folder)]
    array = [f"--array=0-{(options.workers or DEFAULT_WORKERS) - 1}"]
    return [
        _sbatch_command(options, folder, array, _sweep(folder, "--trials-only")),
        _sbatch_command(options, folder, ["--dependency=afterany:ARRAY"], _sweep(folder)),
    ]


def _revision() -> str:
    """Return the git revision of a checkout, with `-dirty` if files differ from it; else the version of the package."""
    if (PACKAGE.parent / ".git").exists():
        try:
            argv = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            done = subprocess.run(argv, cwd=PACKAGE, capture_output=True, text=True, check=False)
        except OSError:  # git is not installed
            return f"v{__version__}"
        if revision := done.stdout.strip():
            return revision
    return f"v{__version__}"


def _snapshot(config: Config, folder: Path) -> None:
    """Copy into `folder` everything that the job reads of the project."""
    code = folder / "code"
    shutil.copytree(PACKAGE, code / "pkd_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "launcher").mkdir()
    # A file in a folder of its own, not `-m`: Python would look for the package in the working folder first.
    shutil.copy(packaged_path("launcher/train.py"), code / "launcher")
    (code / "REVISION").write_text(f"{_revision()}\n", encoding="utf-8")
    shutil.copy(packaged_path("slurm/train.sbatch"), folder)
    shutil.copy(project_path(config.train.deepspeed), folder / "deepspeed.json")
    resolved = config.model_dump(mode="json")
    resolved["train"]["deepspeed"] = str(folder / "deepspeed.json")
    if not config.task.data.startswith("hub:"):  # may be part of the project, but is not copied
        resolved["task"]["data"] = str(project_path(config.task.data).absolute())
    resolved["task"]["unlabeled"] = [str(project_path(name).absolute()) for name in config.task.unlabeled]
    if config.teacher.answers:
        resolved["teacher"]["answers"] = [str(Path(name).absolute()) for name in config.teacher.answers]
    (folder / "run.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "logs").mkdir()


def _checked_config(options: argparse.Namespace) -> Config:
    """Load the configuration and check what a job would otherwise fail on after hours in the queue."""
    file = options.sweep or options.config
    config = load(file, options.overrides)
    if options.sweep:
        _require_space(options, config)
    load_deepspeed(config, file)
    task = tasks.resolve(config.task)
    sources.require(config.task.data, "train", task)
    if sources.is_file(config.task.data):
        text.read_all(config.task.data, task)
    sources.unlabeled_paths(config.task.unlabeled, task)
    answers.paths_of(config.teacher.answers or ())
    return config


def _require_space(options: argparse.Namespace, config: Config) -> None:
    """Check what a sweep searches, as far as it does not depend on the teacher."""
    if not config.sweep.space:
        raise UserError("is missing; name the keys to search and their values", "sweep.space", options.sweep)
    if config.sweep.space == "shape":
        return
    from pkd_dist.search.shared import SweepConfig
    from pkd_dist.search.space import Space

    sweep = SweepConfig(options.sweep, tuple(options.overrides), Path(config.run.dir))
    Space.of(sweep, None)


def _require_training(extra: str) -> None:
    """Check that this Python, which runs the job, has what it imports.

    Args:
        extra: `train` or `sweep`.

    Raises:
        UserError: the extra is not installed.
    """
    needed = (
        "torch",
        "transformers",
        "datasets",
        "deepspeed",
        *(("optuna", "plotly", "pandas") if extra == "sweep" else ()),
    )
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"the job would run {sys.executable}, which lacks the Python package {missing[0]}: pip install 'pkd_dist[{extra}]', "
            "or call pkd-submit from the environment that trains"
        )


def _next_folder(config: Config) -> Path:
    submissions = Path(config.run.dir).absolute() / "slurm"
    if "%" in str(submissions):
        raise UserError(f"run.dir: {config.run.dir}: SLURM expands % in the path of a log; choose another run.dir")
    number = 1 + max((int(path.name) for path in submissions.glob("*") if path.name.isdigit()), default=0)
    return submissions / str(number)


def submit(argv: Sequence[str]) -> None:
    """Submit the run that the arguments describe, or print the submission for `--dry-run`.

    Raises:
        UserError: Invalid options or configuration, no sbatch, or a job that sbatch rejects; nothing is left behind.
    """
    options = _parse_arguments(argv)
    _require_training("sweep" if options.sweep else "train")
    config = _checked_config(options)
    folder = _next_folder(config)
    commands = _commands(options, folder)
    if options.dry_run:
        script = packaged_path("slurm/train.sbatch").read_text(encoding="utf-8")
        print(*map(shlex.join, commands), script, sep="\n\n", end="")
        return
    if not shutil.which("sbatch"):
        raise UserError("sbatch is not on PATH; submit from a SLURM login node (--dry-run works without)")
    try:
        folder.mkdir(parents=True)
        try:
            _snapshot(config, folder)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(
            f"run.dir: {folder} cannot be written ({error.strerror or error}); choose another run.dir"
        ) from None
    jobs: list[str] = []
    for command in commands:
        done = subprocess.run(
            [argument.replace("afterany:ARRAY", f"afterany:{''.join(jobs[:1])}") for argument in command],
            capture_output=True, text=True, check=False, env=_outside_of_jobs(),
        )  # fmt: skip
        if done.returncode:
            if jobs:
                subprocess.run(["scancel", *jobs], check=False)
            shutil.rmtree(folder)
            raise UserError(f"sbatch rejected the job: {'; '.join(done.stderr.split(chr(10))).strip('; ')}")
        jobs.append(done.stdout.strip().split(";")[0])
    write_json(folder / "job.json", {"job": jobs[0], "command": commands[0], "config": options.sweep or options.config})
    if options.sweep:
        _print_sweep(jobs, options, folder)
    else:
        _print_job(jobs[0], options, folder)


def _outside_of_jobs() -> dict[str, str]:
    """Return the environment without what describes the job in which the command may have been called: sbatch passes it on."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_OF_A_JOB) or name in _OF_THE_CLUSTER
    }


def _print_sweep(jobs: Sequence[str], options: argparse.Namespace, folder: Path) -> None:
    logs, output = folder / "logs", shlex.quote(str(folder.parents[1]))
    print(
        f"job {jobs[0]}: an array of {options.workers or DEFAULT_WORKERS} workers; then job {jobs[1]}: the winner",
        f"snapshot: {folder}",
        f"logs:     {logs}/JOB.log and JOB-rank0.log, a JOB for each worker",
        f"watch:    pkd sweep show {output}",
        f"state:    squeue --jobs={','.join(jobs)}",
        f"cancel:   scancel {' '.join(jobs)}    (submit the same sweep again to resume)",
        sep="\n",
    )


def _print_job(job: str, options: argparse.Namespace, folder: Path) -> None:
    logs = folder / "logs"
    print(
        f"job {job}: {options.nodes} node(s) x {_tasks_per_node(options)} rank(s), "
        + ("one per GPU" if options.gpus_per_node else "no GPUs"),
        f"snapshot: {folder}",
        f"log:      {logs}/{job}.log",
        f"ranks:    {logs}/{job}-rank0.log and so on",
        f"watch:    tail -F {shlex.quote(f'{logs}/{job}.log')} {shlex.quote(f'{logs}/{job}-rank0.log')}",
        f"state:    squeue --jobs={job}",
        f"preempt:  scancel --signal=USR1 --batch {job}    (commits a checkpoint, requeues)",
        f"cancel:   scancel {job}",
        sep="\n",
    )


def main() -> int:
    """Entry point of `pkd-submit`; return the exit status."""
    try:
        submit(sys.argv[1:])
    except UserError as error:
        print(f"pkd-submit: {error}", file=sys.stderr)
        return error.exit_status
    return 0
