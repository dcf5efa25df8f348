"""`make bench-glue`: train all methods on each data set; rerun the same command to resume."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import DOCS, RESULTS, choices, read_json, run_program, table, write_page
from pkd_dist.evaluation.speed import machine
from pkd_dist.files import write_atomically, write_json

HERE = Path(__file__).parent
LOSSES: dict[str, dict[str, Any]] = {
    "finetune": {"distill.alpha": 0.0, "distill.beta": 0.0},
    "kd": {"distill.beta": 0.0},
    "pkd-skip": {"distill.patience": "skip"},
    "pkd-last": {"distill.patience": "last"},
    "kd+text": {"distill.beta": 0.0, "task.augment.copies": 2},
    "pkd+text": {"distill.patience": "skip", "task.augment.copies": 2},
    "strong": {"distill.preset": "strong"},
    "strong-neighbours": {"distill.preset": "strong", "task.augment.neighbours": 0.0},
    "strong-copies": {"distill.alpha": 0.9, "distill.beta": 0.0, "train.epochs": 42},
    "strong+state": {"distill.preset": "strong", "distill.beta": 10.0, "distill.pair_last_layer": True, "distill.normalize": False},
    "strong+epochs": {"distill.preset": "strong", "train.epochs": 4},
    "strong+rate": {"distill.preset": "strong", "train.learning_rate": 3.0e-4},
}  # fmt: skip
"""`+text`: three times the text; only the teacher labels the augmented copies. `strong` sets its own epochs. What follows it has one
part of it removed (`strong-copies`: as many steps on the training text alone, where there are 20 copies) or added."""
COPIED = {1: [5], 2: [2, 5], 3: [1, 3, 5]}


class Data(NamedTuple):
    """A data set in a folder of --glue-dir (None: embedded); each method has a run with each seed.

    `copied`: layers of the student -> those of the 6-layer teacher (from 0) that it copies. `text_epochs`: share of the
    epochs for `+text`.
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
    import torch

    from pkd_dist.comparison.study import open_comparison
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
    output = options.output / name
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else data.seeds
    summary = open_comparison(config, overrides, methods, seeds, output, jobs=options.jobs).run_all()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine()["processor"]
    return {**summary, "speed": speeds(output), "trained_on": device}


def collect(name: str, made: dict[str, Any]) -> None:
    """Add to the results with the same teacher; results with another teacher are dropped."""
    from pkd_dist.comparison.table import set_differences

    known = read_json(RESULTS / "glue.json")
    before = known.get(name, {})
    methods = {**(before["methods"] if before.get("teacher") == made["teacher"] else {}), **made["methods"]}
    methods = {key: methods[key] for key in sorted(methods, key=lambda key: [*LOSSES].index(key.rpartition("-")[0]))}
    set_differences(methods)
    write_json(RESULTS / "glue.json", known | {name: {**made, "methods": methods}})


def speeds(output: Path) -> dict[str, Any]:
    """Time the teacher and a student of each depth on the same inputs in turn; the weights do not matter."""
    import torch

    from pkd_dist.config.schema import Evaluate
    from pkd_dist.data.tokens import open_tokens
    from pkd_dist.evaluation.scoring import forward_of
    from pkd_dist.evaluation.speed import TimedInputs, measure_speed
    from pkd_dist.model.encoder import load_model, load_tokenizer

    teacher = output / "teacher" / "teacher"
    students = {depth: next(output.glob(f"*-{depth}/seed-*/student_init"), None) for depth in COPIED}
    folders = {str(depth): folder for depth, folder in (*students.items(), (6, teacher)) if folder}
    settings = Evaluate(batch_size=64, latency_samples=200, throughput_samples=512)
    tokens, pad_id = open_tokens(output / "teacher/data/dev"), load_tokenizer(str(teacher)).pad_token_id
    with torch.inference_mode():
        forwards = {depth: forward_of(load_model(str(folder))) for depth, folder in folders.items()}
        found = measure_speed(forwards, TimedInputs.choose(tokens, pad_id, torch.device("cpu"), settings))
    layers = {depth: timing.figures for depth, timing in found.items()}
    return {"machine": f"{torch.get_num_threads()} threads of {machine()['processor']}", "layers": layers}


def write_report() -> None:
    """Write docs/results.md and its plots."""
    from pkd_dist.comparison.table import plot

    measured = read_json(RESULTS / "glue.json")
    for made in measured.values():  # the deepest students first
        made["methods"] = dict(sorted(made["methods"].items(), key=lambda method: -method[1]["layers"]))
    write_page(DOCS / "results.md", {name: lambda made=made: _section(made) for name, made in measured.items()})
    for name, made in measured.items():
        figure = plot(made)
        write_atomically(DOCS / f"results-{name}.png", lambda tmp, figure=figure: figure.savefig(tmp, format="png"))


def _section(made: dict[str, Any]) -> str:
    """Return the table of `pkd compare` with two more columns, and the speeds."""
    from pkd_dist.comparison.table import rows

    head, body = rows(made)
    body[0] += ["", ""]
    first = next(loss for loss in LOSSES for name in made["methods"] if name.rpartition("-")[0] == loss)
    for row, method in zip(body[1:], made["methods"].values(), strict=True):
        against = method.get(f"minus {first}-{method['layers']}", {}).get("score", {})
        half = against.get("half_interval_95")
        shown = f"{100 * against['mean']:+.2f}" if against else ""
        row.append(shown if half is None else f"{shown} ± {100 * half:.2f}")
        row.append(f"{method['mean']['score'] / made['teacher']['score']:.3f}")
    device = f" Trained on {made['trained_on']}." if made.get("trained_on") else ""
    speeds, columns = made["speed"], ("reasoningTime", "latency_ms_p50", "latency_ms_p99")
    text = table([*head, f"against {first}", "kept"], body)
    text += f"\n*kept*: {made['metric']} divided by the teacher's on {' + '.join(made['pooled'])}.{device}\n"
    text += f"\nSpeed in float32 with {speeds['machine']}, all models on the same inputs in turn:\n\n"
    timed = ([layers, *(f"{found[name]:.4g}" for name in columns)] for layers, found in speeds["layers"].items())
    return text + table(["layers", "sentences per second", "latency at batch 1, p50, ms", "p99, ms"], timed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    parser.add_argument("--glue-dir", type=Path, help="holds SST-2/ and RTE/ in GLUE's format")
    parser.add_argument("--only", default=",".join(DATA), help="data sets, in this order")
    parser.add_argument("--losses", default=",".join(LOSSES), help="methods; the others are compared with the first")
    parser.add_argument("--seeds", help="seeds of the runs (default: those of each data set)")
    parser.add_argument("--tag", help="keep the results apart from those with another teacher, as DATA-TAG")
    parser.add_argument("--layers", default="2,3,1", help="layers of the students")
    parser.add_argument("--output", type=Path, default=Path("runs/glue-bench"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="only write docs/results.md from the results so far")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    options = parser.parse_intermixed_args()
    only = choices(options.only, DATA, "--only", parser)
    options.losses = choices(options.losses, LOSSES, "--losses", parser)
    options.layers = [int(depth) for depth in choices(options.layers, COPIED, "--layers", parser)]
    if not options.report and not options.glue_dir and any(DATA[name].folder for name in only):
        parser.error("sst2 and rte need --glue-dir; or use --only movie-reviews")

    def work() -> None:
        for name in [] if options.report else only:
            collect(f"{name}-{options.tag}" if options.tag else name, run(name, options))
        write_report()

    run_program(work)


if __name__ == "__main__":
    main()
