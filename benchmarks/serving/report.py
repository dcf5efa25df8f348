"""Write the figures of benchmarks/results/serving.json, and their plot, to docs/serving.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import table, write_page, write_plot


def write(results: dict[str, Any], page: Path) -> None:
    """Replace the figures of a page, and draw its .png."""
    picture = page.with_suffix(".png")
    write_page(page, {"serving": lambda: figures(results, picture.name)})
    write_plot(picture, plot(results))


def figures(results: dict[str, Any], picture: str) -> str:
    machine, models = results["machine"], results["models"]
    every_core = f"threads_{machine['cores']}"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    intro = (
        f"Task {results['task']}: {results['examples']} dev sentences; {results['requests']} requests to each model on "
        f"{machine['cores']} core(s) of {machine['processor']}, measured on {results['taken']} with {versions}.\n\n"
    )
    head = ["", "accuracy (95%)", "agrees with teacher", "MB", "batch 1: p50, p95, p99, ms", "per second",
            "against teacher", "one core, per second", "best batch, per second"]  # fmt: skip
    first, rows = next(iter(models.values()))[every_core]["per_second"], []
    for name, model in models.items():
        every, (low, high) = model[every_core], model["accuracy_interval_95"]
        rows.append([
            name, f"{100 * model['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * model['agreement_with_teacher']:.1f}%", f"{model['bytes'] / 1e6:.1f}",
            ", ".join(f"{every[f'latency_ms_p{share}']:.2f}" for share in (50, 95, 99)), f"{every['per_second']:.0f}",
            f"{every['per_second'] / first:.1f} times", f"{model['threads_1']['per_second']:.0f}",
            f"{every['best_per_second']:.0f} (batch {every['best_batch']})",
        ])  # fmt: skip
    text = f"{intro}{table(head, rows)}\n![accuracy against latency]({picture})\n"
    if load := results.get("load"):
        memory = load["memory_bytes"]
        text += (
            f"\n`pkd serve` under {load['clients']} clients for {load['seconds']:.0f} s: {load['answered']:,} requests "
            f"answered ({load['texts']:,} texts), {load['refused']:,} invalid ones rejected, {load.get('busy', 0):,} told to "
            f"retry; largest difference of a probability {load['largest_difference_of_a_probability']:.1e}; memory "
            f"{memory[0] / 1e6:.0f} MB at the start, {memory[len(memory) // 2] / 1e6:.0f} MB half-way, "
            f"{memory[-1] / 1e6:.0f} MB at the end.\n"
        )
    return text


def plot(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, cores = figure.subplots(), results["machine"]["cores"]
    for name, model in results["models"].items():
        every, accuracy = model[f"threads_{cores}"], 100 * model["accuracy"]
        low, high = (100 * bound for bound in model["accuracy_interval_95"])
        axes.errorbar(
            every["latency_ms_p50"], accuracy, xerr=[[0], [every["latency_ms_p99"] - every["latency_ms_p50"]]],
            yerr=[[accuracy - low], [high - accuracy]], fmt="o", capsize=3, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(f"latency at batch 1 on {cores} core(s), ms (point: p50, whisker: to p99)")
    axes.set_ylabel("dev accuracy, % (95% interval)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure
