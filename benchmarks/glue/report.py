"""Write docs/results.md and its plots from benchmarks/results/glue.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, read_json, table, write_page
from pkd_dist.comparison.table import plot
from pkd_dist.files import write_atomically


def write(results: Path) -> None:
    measured = read_json(results)
    for made in measured.values():  # the deepest students first
        made["methods"] = dict(sorted(made["methods"].items(), key=lambda method: -method[1]["layers"]))
    write_page(DOCS / "results.md", {name: lambda made=made: _section(made) for name, made in measured.items()})
    for name, made in measured.items():
        figure = plot(made)
        write_atomically(DOCS / f"results-{name}.png", lambda tmp, figure=figure: figure.savefig(tmp, format="png"))


def _section(made: dict[str, Any]) -> str:
    teacher, pooled = made["teacher"], made["pooled"] if len(made["pooled"]) > 1 else []
    columns = [*made["splits"], *(["score"] if pooled else []), "agreement"]
    shown = {"score": " + ".join(pooled), "agreement": "agreement with the teacher"}
    head = ["layers", "method", "seeds", *(shown.get(c, c) for c in columns), "against finetune", "kept", "parameters"]
    rows = [["6", "teacher", "1", *(_percent(teacher[c]) for c in columns), "", "", _millions(teacher)]]
    for key, method in made["methods"].items():
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
