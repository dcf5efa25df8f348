"""Write docs/results.md and docs/results.png from benchmarks/results/glue.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import DOCS, read_json, table, write_page, write_plot

TITLES = {"movie-reviews": "Film reviews (embedded)", "sst2": "SST-2", "rte": "RTE"}
COLOURS = {
    "finetune": "#8a8a8a", "kd": "#1f6fb4", "pkd-skip": "#c2571a", "pkd-last": "#7a3fa0", "kd+text": "#2b8a57",
    "pkd+text": "#b0892a",
}  # fmt: skip


def write(results: Path) -> None:
    measured = read_json(results)
    write_page(DOCS / "results.md", {name: lambda made=made: _section(made) for name, made in measured.items()})
    write_plot(DOCS / "results.png", _plot(measured))


def _section(made: dict[str, Any]) -> str:
    teacher, pooled = made["teacher"], made["pooled"] if len(made["pooled"]) > 1 else []
    columns = [*made["splits"], *(["score"] if pooled else []), "agreement"]
    shown = {"score": " + ".join(pooled), "agreement": "agreement with the teacher"}
    head = ["layers", "method", "seeds", *(shown.get(c, c) for c in columns), "against finetune", "kept", "parameters"]
    rows = [["6", "teacher", "1", *(_percent(teacher[c]) for c in columns), "", "", _millions(teacher)]]
    order = [*COLOURS]
    for key, method in sorted(
        made["methods"].items(), key=lambda m: (-m[1]["layers"], order.index(m[0].rpartition("-")[0]))
    ):
        mean, half = method["mean"], method["half_interval_95"]
        against = method.get(f"minus finetune-{method['layers']}", {}).get("score")
        rows.append([
            str(method["layers"]), key.rpartition("-")[0], str(len(method["seeds"])),
            *(_percent(mean[c], half[c]) for c in columns),
            _percent(against["mean"], against["half_interval_95"], sign=True) if against else "",
            f"{mean['score'] / teacher['score']:.3f}", _millions(mean),
        ])  # fmt: skip
    device = f" Trained on {made['trained_on']}." if made.get("trained_on") else ""
    kept = f"*kept*: {made['metric']} divided by the teacher's{' on ' + shown['score'] if pooled else ''}.{device}\n"
    text = [table(head, rows), kept]
    if speeds := made.get("speed"):
        text.append(f"Speed in float32 with {speeds['machine']}, all models on the same inputs in turn:\n")
        head = ["layers", "sentences per second", "latency at batch 1, p50, ms", "p99, ms"]
        text.append(table(head, (
            [layers, f"{s['reasoningTime']:.0f}", f"{s['latency_ms_p50']:.2f}", f"{s['latency_ms_p99']:.2f}"]
            for layers, s in speeds["layers"].items()
        )))  # fmt: skip
    return "\n".join(text)


def _percent(mean: float, half: float | None = None, sign: bool = False) -> str:
    return f"{100 * mean:{'+' if sign else ''}.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


def _millions(figures: dict[str, Any]) -> str:
    return f"{figures['parameters'] / 1e6:.1f} M"


def _plot(measured: dict[str, Any]) -> Figure:
    """Draw score and agreement by depth for each data set: a point for each seed, the mean with its interval."""
    figure = Figure(figsize=(10, 3.6 * len(measured)), layout="constrained")
    for panels, (name, made) in zip(figure.subplots(len(measured), 2, squeeze=False), measured.items(), strict=True):
        score = f"{made['metric']} on {' + '.join(made['pooled'])}, %"
        for axes, (key, label) in zip(panels, (("score", score), ("agreement", "agreement, %")), strict=True):
            _panel(axes, made, key)
            axes.set_title(f"{TITLES[name]}: {label}", fontsize=10)
            if name == next(iter(measured)) and key == "score":
                axes.legend(fontsize=8, frameon=False)
    return figure


def _panel(axes: Any, made: dict[str, Any], key: str) -> None:
    depths = sorted({method["layers"] for method in made["methods"].values()})
    losses = [loss for loss in COLOURS if any(m.rpartition("-")[0] == loss for m in made["methods"])]
    labelled = set()
    for name, method in made["methods"].items():
        loss = name.rpartition("-")[0]
        place = depths.index(method["layers"]) + 0.13 * (losses.index(loss) - (len(losses) - 1) / 2)
        values = [100 * figures[key] for figures in method["seeds"].values()]
        axes.plot([place] * len(values), values, "o", color=COLOURS[loss], alpha=0.35, markersize=4, markeredgewidth=0)
        half = method["half_interval_95"][key]
        axes.errorbar(
            [place], [100 * method["mean"][key]], yerr=None if half is None else [100 * half], fmt="D",
            color=COLOURS[loss], capsize=3, markersize=5, label=None if loss in labelled else loss,
        )  # fmt: skip
        labelled.add(loss)
    if key == "score":
        axes.axhline(100 * made["teacher"][key], color="#333333", linestyle="--", linewidth=1, label="teacher")
    axes.set_xticks(range(len(depths)), [f"{depth} layer{'s' if depth > 1 else ''}" for depth in depths])
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
