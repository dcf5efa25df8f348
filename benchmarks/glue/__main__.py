"""`make bench-glue`: train all methods on each data set; rerun the same command to resume.

python -m benchmarks.glue --glue-dir DIR [--only movie-reviews,sst2,rte] [--jobs 2] [--output runs/glue-bench] [key=value ...]
python -m benchmarks.glue --report       # docs/results.md and its plot from benchmarks/results/glue.json
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, choices, read_json
from benchmarks.glue import report
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.evaluation.speed import machine
from pkd_dist.files import write_json
from pkd_dist.telemetry.log import to_terminal

HERE = Path(__file__).parent
LOSSES: dict[str, dict[str, Any]] = {
    "finetune": {"distill.alpha": 0.0, "distill.beta": 0.0},
    "kd": {"distill.beta": 0.0},
    "pkd-skip": {"distill.patience": "skip"},
    "pkd-last": {"distill.patience": "last"},
    "kd+text": {"distill.beta": 0.0, "task.augment.copies": 2},
    "pkd+text": {"distill.patience": "skip", "task.augment.copies": 2},
}
"""`+text`: three times the text; only the teacher labels the augmented copies."""
COPIED = {1: [5], 2: [2, 5], 3: [1, 3, 5]}


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        folder: below --glue-dir; None: embedded.
        seeds: one run of each method with each.
        copied: layers of the student -> the layers of the 6-layer teacher (from 0) that it copies.
        text_epochs: share of the epochs for `+text`.
    """

    folder: str | None
    seeds: tuple[int, ...]
    copied: dict[int, list[int]]
    text_epochs: float = 0.5


DATA = {
    "movie-reviews": Data(None, (1, 2, 3, 4, 5), COPIED),
    # layers 1 and 3 made the best 2-layer student of one epoch on 20,000 sentences (docs/log.md)
    "sst2": Data("SST-2", (1, 2, 3), COPIED | {2: [1, 3]}, text_epochs=1.0),
    "rte": Data("RTE", (1, 2, 3), COPIED),
}


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train all chosen methods on one data set; return their figures."""
    from pkd_dist.comparison.runner import Comparison
    from pkd_dist.config.load import load

    data, config = DATA[name], str(HERE / f"{name}.yaml")
    overrides = [*([f"task.data={options.glue_dir}/{data.folder}"] if data.folder else []), *options.overrides]
    fewer = {"train.epochs": int(load(config).train.epochs * data.text_epochs)}
    methods = {
        f"{loss}-{depth}": {
            **LOSSES[loss], "student.layers": data.copied[depth], **(fewer if loss.endswith("+text") else {})
        }
        for depth in options.layers for loss in options.losses
    }  # fmt: skip
    seeds, output = data.seeds[: options.seeds], options.output / name
    return Comparison(config, overrides, methods, seeds, output, "", options.jobs).run()


def collect(name: str, made: dict[str, Any]) -> None:
    """Merge into the results with the same teacher; results with another teacher are dropped, except speeds."""
    from pkd_dist.comparison.runner import hold_against_first

    known = read_json(RESULTS / "glue.json")
    before = known.get(name, {})
    if before.get("teacher") != made["teacher"]:
        before = {key: before[key] for key in before if key == "speed"}
    methods = {**before.get("methods", {}), **made["methods"]}
    methods = {key: methods[key] for key in sorted(methods, key=lambda key: [*LOSSES].index(key.rpartition("-")[0]))}
    hold_against_first(methods)
    write_json(RESULTS / "glue.json", known | {name: {**before, **made, "methods": methods}})


def speeds(output: Path) -> dict[str, Any]:
    """Time the teacher and a student of each depth on the same inputs in turn; the weights do not matter."""
    import torch

    from pkd_dist.data.tokens import open_tokens
    from pkd_dist.evaluation.speed import speed
    from pkd_dist.model.encoder import load_model, load_tokenizer

    teacher = output / "teacher" / "teacher"
    students = {depth: next(output.glob(f"*-{depth}/seed-*/student_init"), None) for depth in COPIED}
    folders = {depth: folder for depth, folder in (*students.items(), (6, teacher)) if folder}
    models: dict[str, Any] = {str(depth): load_model(str(folder)) for depth, folder in sorted(folders.items())}
    forwards = {depth: lambda inputs, model=model: model(**inputs).logits for depth, model in models.items()}
    pad_id = load_tokenizer(str(teacher)).pad_token_id
    with torch.inference_mode():
        found = speed(forwards, open_tokens(output / "teacher/data/dev"), torch.device("cpu"), 64, 200, 512, pad_id)
    layers = {depth: timing.figures for depth, timing in found.items()}
    return {"machine": f"{torch.get_num_threads()} threads of {machine()['processor']}", "layers": layers}


def trained_on() -> str:
    """Return the device that runs train on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine()["processor"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    parser.add_argument("--glue-dir", type=Path, help="holds SST-2/ and RTE/ in GLUE's format")
    parser.add_argument("--only", default=",".join(DATA), help="data sets, in this order")
    parser.add_argument("--losses", default=",".join(LOSSES), help="methods; the others are compared with the first")
    parser.add_argument("--layers", default="2,3,1", help="layers of the students")
    parser.add_argument("--seeds", type=int, default=5, help="of each method, at most; SST-2 and RTE have 3")
    parser.add_argument("--output", type=Path, default=Path("runs/glue-bench"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--no-speed", action="store_true", help="keep the known speeds, if this machine is busy")
    parser.add_argument("--report", action="store_true", help="only write docs/results.md from the results so far")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    options = parser.parse_intermixed_args()
    only = choices(options.only, DATA, "--only", parser)
    options.losses = choices(options.losses, LOSSES, "--losses", parser)
    options.layers = [int(depth) for depth in choices(options.layers, COPIED, "--layers", parser)]
    if not options.report and not options.glue_dir and any(DATA[name].folder for name in only):
        parser.error("sst2 and rte need --glue-dir; or use --only movie-reviews")
    to_terminal(True)
    for name in [] if options.report else only:

        def work(name: str = name) -> None:
            made = run(name, options)
            timed = {} if options.no_speed else {"speed": speeds(options.output / name)}
            collect(name, {**made, "trained_on": trained_on(), **timed})

        if status := guarded(work):
            leave(status)
    report.write(RESULTS / "glue.json")


if __name__ == "__main__":
    main()
