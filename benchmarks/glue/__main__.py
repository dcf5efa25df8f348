"""`make bench-glue`: trains all methods on each data set, one after the other; goes on where it was stopped.

python -m benchmarks.glue --glue-dir DIR [--only movie-reviews,sst2,rte] [--jobs 2] [--output runs/glue-bench] [key=value ...]
python -m benchmarks.glue --report       # docs/results.md and its plot from benchmarks/results/glue.json alone
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.glue import report
from benchmarks.watch import processor
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.telemetry.log import to_terminal

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "glue.json"
LOSSES: dict[str, dict[str, Any]] = {
    "finetune": {"distill.alpha": 0.0, "distill.beta": 0.0},
    "kd": {"distill.beta": 0.0},
    "pkd-skip": {"distill.patience": "skip"},
    "pkd-last": {"distill.patience": "last"},
    "kd+text": {"distill.beta": 0.0, "task.augment.copies": 2},
    "pkd+text": {"distill.patience": "skip", "task.augment.copies": 2},
}
"""`+text`: three times the text; of what is made of the training text (`task.augment`) only the teacher has labels."""


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        folder: below --glue-dir; None: embedded.
        seeds: one run of each method with each.
        copied: layers of the student -> the layers of the 6-layer teacher (from 0) that it is made of.
        text_epochs: share of the epochs that `+text` gets.
    """

    folder: str | None
    seeds: tuple[int, ...]
    copied: dict[int, list[int]]
    text_epochs: float = 0.5


COPIED = {1: [5], 2: [2, 5], 3: [1, 3, 5]}
DATA = {
    "movie-reviews": Data(None, (1, 2, 3, 4, 5), COPIED),
    # of the 2-layer students of one epoch on 20,000 sentences this one was the best (docs/log.md)
    "sst2": Data("SST-2", (1, 2, 3), COPIED | {2: [1, 3]}, text_epochs=1.0),
    "rte": Data("RTE", (1, 2, 3), COPIED),
}


def run(
    name: str, glue_dir: Path | None, losses: list[str], depths: list[int], seeds: int, output: Path, jobs: int,
    settings: list[str],
) -> dict[str, Any]:  # fmt: skip
    from pkd_dist.comparison.runner import Comparison
    from pkd_dist.config.load import load

    data = DATA[name]
    overrides = [*([f"task.data={glue_dir}/{data.folder}"] if data.folder else []), *settings]
    config = str(HERE / f"{name}.yaml")
    fewer = {"train.epochs": int(load(config).train.epochs * data.text_epochs)}
    methods = {
        f"{loss}-{depth}": {
            **LOSSES[loss], "student.layers": data.copied[depth], **(fewer if loss.endswith("+text") else {})
        }
        for depth in depths
        for loss in losses
    }  # fmt: skip
    return Comparison(config, overrides, methods, data.seeds[:seeds], output / name, "", jobs).run()


def collect(name: str, made: dict[str, Any]) -> None:
    """Adds to what other calls have measured with the same teacher; what was measured with another goes, but speeds."""
    from pkd_dist.comparison.table import set_differences

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    before = known.get(name, {})
    if before.get("teacher") != made["teacher"]:
        before = {key: before[key] for key in before if key == "speed"}
    methods = {**before.get("methods", {}), **made["methods"]}
    methods = {
        name: methods[name] for name in sorted(methods, key=lambda name: list(LOSSES).index(name.rpartition("-")[0]))
    }
    set_differences(methods)
    merged = {**before, **made, "methods": methods}
    RESULTS.write_text(json.dumps({**known, name: merged}, indent=1) + "\n")


def speeds(output: Path) -> dict[str, Any]:
    """Teacher and a student of each depth, in turn on the same inputs; weights do not matter for speed."""
    import torch

    from pkd_dist.config.schema import Evaluate
    from pkd_dist.data.tokens import open_tokens
    from pkd_dist.evaluation.speed import TimedInputs, measure_speed
    from pkd_dist.model.encoder import load_model, load_tokenizer

    teacher = output / "teacher" / "teacher"
    folders = {6: teacher} | {
        depth: found for depth in COPIED if (found := next(output.glob(f"*-{depth}/seed-*/student_init"), None))
    }
    models: dict[str, Any] = {str(depth): load_model(str(folder)) for depth, folder in sorted(folders.items())}
    forwards = {depth: lambda inputs, model=model: model(**inputs).logits for depth, model in models.items()}
    pad_id = load_tokenizer(str(teacher)).pad_token_id
    with torch.inference_mode():
        dev, settings = open_tokens(output / "teacher/data/dev"), Evaluate()
        found = measure_speed(forwards, TimedInputs.choose(dev, pad_id, torch.device("cpu"), settings))
    layers = {depth: timing.figures for depth, timing in found.items()}
    return {"machine": f"{torch.get_num_threads()} threads of {processor()}", "layers": layers}


def trainer() -> str:
    """The device that runs train on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def chosen(text: str, allowed: Any, option: str, parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in map(str, allowed)]:
        parser.error(f"{option}: {unknown[0]!r} is not known; allowed: {', '.join(map(str, allowed))}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    parser.add_argument("--glue-dir", type=Path, help="holds SST-2/ and RTE/ as GLUE ships them")
    parser.add_argument("--only", default=",".join(DATA), help="data sets, in this order")
    parser.add_argument(
        "--losses", default=",".join(LOSSES), help="what is compared; the first is what others are held against"
    )
    parser.add_argument("--layers", default="2,3,1", help="layers of the students")
    parser.add_argument("--seeds", type=int, default=5, help="of each method, at most; SST-2 and RTE have 3")
    parser.add_argument("--output", type=Path, default=Path("runs/glue-bench"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--no-speed", action="store_true", help="keep the known speeds: this machine is too busy")
    parser.add_argument("--report", action="store_true", help="only write docs/results.md from what is measured")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    options = parser.parse_intermixed_args()
    only = chosen(options.only, DATA, "--only", parser)
    losses = chosen(options.losses, LOSSES, "--losses", parser)
    depths = [int(depth) for depth in chosen(options.layers, COPIED, "--layers", parser)]
    if not options.report and not options.glue_dir and any(DATA[name].folder for name in only):
        parser.error("--glue-dir is needed for sst2 and rte; or give --only movie-reviews")
    to_terminal(True)
    for name in [] if options.report else only:

        def work(name: str = name) -> None:
            made = run(name, options.glue_dir, losses, depths, options.seeds, options.output, options.jobs,
                       options.overrides)  # fmt: skip
            timed = {} if options.no_speed else {"speed": speeds(options.output / name)}
            collect(name, {**made, "trained_on": trainer(), **timed})

        if status := guarded(work):
            leave(status)
    report.write(RESULTS)


if __name__ == "__main__":
    main()
