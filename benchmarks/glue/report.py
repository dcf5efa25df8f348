"""benchmarks/results/glue.json -> docs/results.md and docs/results.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pkd_dist.files import write_atomically

DOCS = Path(__file__).resolve().parents[2] / "docs"
TITLES = {"movie-reviews": "Film reviews (embedded)", "sst2": "SST-2", "rte": "RTE"}
COLOURS = {
    "finetune": "#8a8a8a",
    "kd": "#1f6fb4",
    "pkd-skip": "#c2571a",
    "pkd-last": "#7a3fa0",
    "kd+text": "#2b8a57",
    "pkd+text": "#b0892a",
}
HEAD = """\
# Results

Made by `python -m benchmarks.glue --report` from [benchmarks/results/glue.json](../benchmarks/results/glue.json), which
`make bench-glue` writes ([how](../benchmarks/glue/README.md)). The teacher is a 6-layer MiniLM (hidden 384, 22.7 M parameters),
fine-tuned once on each data set; students copy its layers 6 (1 layer), 3 and 6 (2 layers; on SST-2: 2 and 4), or 2, 4 and 6
(3 layers) and are trained from its cache. Every setting but the loss is the same for all methods; nothing was tuned for one
of them. What is not in a table is not measured yet: the same command goes on and adds it.

Scores and agreement in percent: mean over seeds, ± half of its 95% interval (Student's t). *against finetune*: difference
of the scores seed by seed, with the same interval: where it does not reach over 0 the difference is unlikely to be chance.
The interval is that of training's randomness on one teacher, not that of the small dev sets: one standard error of an
accuracy is about 1.1 points on 1,050 examples or on SST-2's 872, and 2.9 on RTE's 277. The best epoch is chosen on dev.

![Scores of all methods](results.png)
"""
METHODS = """\
| method | |
| --- | --- |
| finetune | labels alone |
| kd | and the teacher's predictions (alpha 0.5, temperature 5) |
| pkd-skip, pkd-last | and its [CLS] states (beta 100, normalised, mean), paired by skip or last |
| kd+text, pkd+text | kd and pkd-skip on three times the text (film reviews, RTE: for half of the epochs): copies of the training text, changed at random, that the teacher labels |

With one layer there is nothing to pair, so PKD is KD.
"""
PUBLISHED = """\
## Published, with another teacher

The paper's teacher is BERT-base of 12 layers, its students the first layers of BERT-base; best dev accuracy in percent, from
the authors' result files. They cannot be compared with the tables above number by number: the teacher has twice the layers
and four times the parameters.

| | MRPC | SST-2 | RTE | MNLI | QNLI | QQP |
| --- | --- | --- | --- | --- | --- | --- |
| teacher 12 | 87.5 | 93.0 | 72.9 | 83.7 | 91.1 | 91.0 |
| fine-tuned 6 | 82.6 | 90.0 | 66.8 | 80.3 | 87.7 | 90.1 |
| KD 6 | 84.8 | 91.4 | 67.5 | 80.8 | 88.9 | 90.6 |
| PKD 6 | 84.6 | 91.1 | 68.2 | 82.3 | 89.7 | 90.8 |
| fine-tuned 3 | 75.7 | 88.1 | 59.9 | 75.1 | 84.5 | 88.9 |
| KD 3 | 77.0 | 88.0 | 61.0 | 76.0 | 84.6 | 89.5 |
| PKD 3 | 76.2 | 88.1 | 62.5 | 77.6 | 85.6 | 89.5 |

The seed, SST-2 dev: teacher 92.2, 3-layer student 88.4 (81.5 from random weights): 0.959 of the teacher; 110 M to 45.7 M
parameters, 4.04 s to 1.69 s of inference.
"""


def write(results: Path) -> None:
    measured: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    parts = [HEAD, METHODS, *(_section(name, made) for name, made in measured.items()), PUBLISHED]
    write_atomically(DOCS / "results.md", lambda tmp: tmp.write_text("\n".join(parts), encoding="utf-8"))
    write_atomically(DOCS / "results.png", lambda tmp: _plot(measured).savefig(tmp, format="png", dpi=130))


def _by_depth(made: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, figures): deep students first, the methods of one depth in the order of `COLOURS`."""
    order = list(COLOURS)
    return sorted(made["methods"].items(), key=lambda m: (-m[1]["layers"], order.index(m[0].rpartition("-")[0])))


def _section(name: str, made: dict[str, Any]) -> str:
    splits, teacher = made["splits"], made["teacher"]
    pooled = len(made["pooled"]) > 1
    columns = [*splits, *(["score"] if pooled else []), "agreement"]
    shown = {"score": " + ".join(made["pooled"]), "agreement": "agreement with the teacher"}
    head = ["layers", "method", "seeds", *(shown.get(c, c) for c in columns), "against finetune", "kept", "parameters"]
    lines = [head, ["---"] * len(head)]
    lines.append(["6", "teacher", "1", *(_percent(teacher[c]) for c in columns), "", "", _millions(teacher)])
    for key, method in _by_depth(made):
        mean, half = method["mean"], method["half_interval_95"]
        against = method.get(f"minus finetune-{method['layers']}", {}).get("score")
        lines.append([
            str(method["layers"]), key.rpartition("-")[0], str(len(method["seeds"])),
            *(_percent(mean[c], half[c]) for c in columns),
            _percent(against["mean"], against["half_interval_95"], sign=True) if against else "",
            f"{mean['score'] / teacher['score']:.3f}", _millions(mean),
        ])  # fmt: skip
    text = [f"## {TITLES[name]}", "", *("| " + " | ".join(line) + " |" for line in lines), ""]
    text.append(f"*kept*: {made['metric']} over the teacher's{' on ' + shown['score'] if pooled else ''}.")
    if device := made.get("trained_on"):
        text[-1] += f" Trained on {device}."
    if speeds := made.get("speed"):
        text += ["", f"Speed, float32, {speeds['machine']}, all models on the same inputs in turn:", ""]
        text += [
            "| layers | sentences per second | latency at batch 1, p50, ms | p99, ms |",
            "| --- | --- | --- | --- |",
        ]
        text += [
            f"| {layers} | {s['reasoningTime']:.0f} | {s['latency_ms_p50']:.2f} | {s['latency_ms_p99']:.2f} |"
            for layers, s in speeds["layers"].items()
        ]
    return "\n".join([*text, ""])


def _percent(mean: float, half: float | None = None, sign: bool = False) -> str:
    return f"{100 * mean:{'+' if sign else ''}.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


def _millions(figures: dict[str, Any]) -> str:
    return f"{figures['parameters'] / 1e6:.1f} M"


def _plot(measured: dict[str, Any]) -> Figure:
    """A row of panels per data set: score and agreement by depth; a point a seed, the mean with its interval."""
    figure = Figure(figsize=(10, 3.6 * len(measured)), layout="constrained")
    for panels, (name, made) in zip(figure.subplots(len(measured), 2, squeeze=False), measured.items(), strict=True):
        score = f"{made['metric']} on {' + '.join(made['pooled'])}, %"
        for axes, (key, label) in zip(panels, (("score", score), ("agreement", "agreement, %")), strict=True):
            _panel(axes, made, key, name == next(iter(measured)) and key == "score")
            axes.set_title(f"{TITLES[name]}: {label}", fontsize=10)
    return figure


def _panel(axes: Any, made: dict[str, Any], key: str, legend: bool) -> None:
    depths = sorted({method["layers"] for method in made["methods"].values()})
    losses = [loss for loss in COLOURS if any(m.rpartition("-")[0] == loss for m in made["methods"])]
    for name, method in made["methods"].items():
        loss = name.rpartition("-")[0]
        place = depths.index(method["layers"]) + 0.13 * (losses.index(loss) - (len(losses) - 1) / 2)
        values = [100 * figures[key] for figures in method["seeds"].values()]
        axes.plot([place] * len(values), values, "o", color=COLOURS[loss], alpha=0.35, markersize=4, markeredgewidth=0)
        half = method["half_interval_95"][key]
        first = method["layers"] == depths[0] or all(
            m["layers"] >= method["layers"] for n, m in made["methods"].items() if n.rpartition("-")[0] == loss
        )
        axes.errorbar(
            [place], [100 * method["mean"][key]], yerr=None if half is None else [100 * half], fmt="D",
            color=COLOURS[loss], capsize=3, markersize=5, label=loss if first else None,
        )  # fmt: skip
    if key == "score":
        axes.axhline(100 * made["teacher"][key], color="#333333", linestyle="--", linewidth=1, label="teacher")
    axes.set_xticks(range(len(depths)), [f"{depth} layer{'s' if depth > 1 else ''}" for depth in depths])
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)
