"""`make bench-glue`: trains all methods on each data set, one after the other; goes on where it was stopped.

python -m benchmarks.glue --glue-dir DIR [--only movie-reviews,sst2,rte] [--jobs 2] [--output runs/glue-bench]
python -m benchmarks.glue --report       # docs/results.md and its plot from benchmarks/results/glue.json alone
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.glue import report
from pkd_dist.cli import guarded, leave
from pkd_dist.telemetry.log import to_terminal

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "glue.json"
LOSSES: dict[str, dict[str, Any]] = {
    "finetune": {"distill.alpha": 0.0, "distill.beta": 0.0},
    "kd": {"distill.beta": 0.0},
    "pkd-skip": {"distill.patience": "skip"},
    "pkd-last": {"distill.patience": "last"},
    "kd+text": {"distill.beta": 0.0, "task.augment.copies": 4},
    "pkd+text": {"distill.patience": "skip", "task.augment.copies": 4},
}
"""`+text`: with more text made of the training text, for which only the teacher has labels (`task.augment`)."""
COPIED = {1: [5], 2: [2, 5], 3: [1, 3, 5]}
"""Layers of the student -> the layers of the 6-layer teacher (from 0) that it is made of."""


@dataclass(frozen=True)
class DataSet:
    """What is trained on one data set, in this order.

    Attributes:
        folder: below --glue-dir; None: in the configuration.
        methods: (layers of the student, loss).
    """

    folder: str | None
    seeds: tuple[int, ...]
    methods: tuple[tuple[int, str], ...]


DATA = {
    "movie-reviews": DataSet(
        None, (1, 2, 3, 4, 5),
        (*((2, loss) for loss in LOSSES), *((depth, loss) for depth in (3, 1) for loss in ("finetune", "kd", "kd+text"))),
    ),
    "sst2": DataSet(
        "SST-2", (1, 2, 3),
        (
            (3, "kd"), (2, "kd"), (2, "finetune"), (2, "pkd-skip"), (2, "pkd-last"),
            (3, "finetune"), (3, "pkd-skip"), (1, "finetune"), (1, "kd"),
        ),
    ),
    "rte": DataSet(
        "RTE", (1, 2, 3),
        (*((2, loss) for loss in LOSSES), *((depth, loss) for depth in (3, 1) for loss in ("finetune", "kd", "kd+text"))),
    ),
}  # fmt: skip


def methods_of(data: DataSet) -> dict[str, dict[str, Any]]:
    return {f"{loss}-{depth}": {**LOSSES[loss], "student.layers": COPIED[depth]} for depth, loss in data.methods}


def run(glue_dir: Path | None, only: list[str], output: Path, jobs: int) -> None:
    from pkd_dist.compare import Comparison

    for name in only:
        data = DATA[name]
        overrides = [f"task.data={glue_dir}/{data.folder}"] if data.folder else []
        config = str(HERE / f"{name}.yaml")
        made = Comparison(config, overrides, methods_of(data), data.seeds, output / name, "", jobs).run()
        collect(name, made)


def collect(name: str, made: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, name: made}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    parser.add_argument("--glue-dir", type=Path, help="holds SST-2/ and RTE/ as GLUE ships them")
    parser.add_argument("--only", default=",".join(DATA), help="data sets, in this order")
    parser.add_argument("--output", type=Path, default=Path("runs/glue-bench"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--report", action="store_true", help="only write docs/results.md from benchmarks/results/glue.json"
    )
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(DATA):
        parser.error(f"--only: {', '.join(unknown)} is not known; allowed: {', '.join(DATA)}")
    if not options.report and not options.glue_dir and any(DATA[name].folder for name in only):
        parser.error("--glue-dir is needed for sst2 and rte; or give --only movie-reviews")
    if not options.report:
        to_terminal(True)
        if status := guarded(lambda: run(options.glue_dir, only, options.output, options.jobs)):
            leave(status)
    report.write(RESULTS)


if __name__ == "__main__":
    main()
    sys.exit(0)
