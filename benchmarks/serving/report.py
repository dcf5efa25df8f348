"""The figures of `benchmarks/results/serving.json` in docs/serving.md, and their plot beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: make bench-serving -->", "<!-- end of figures -->"


def write(results: dict[str, Any], page: Path) -> None:
    """Replaces what stands between the marks of a page, and draws its .png."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(results, page.with_suffix('.png').name)}\n{END}{after}", encoding="utf-8")
    plot(results, page.with_suffix(".png"))


def table(results: dict[str, Any], picture: str) -> str:
    machine, cores = results["machine"], results["machine"]["cores"]
    lines = [
        f"{results['task']}, {results['examples']} dev sentences; {results['requests']} requests of each model on {cores} core(s) of "
        f"{machine['processor']}, taken {results['taken']} with "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + ".",
        "",
        "| | accuracy (95%) | agrees with teacher | MB | batch 1: p50, p95, p99, ms | per second | against teacher | one core, "
        "per second | best batch, per second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = next(iter(results["models"].values()))[f"threads_{cores}"]["per_second"]
    for name, model in results["models"].items():
        every, one = model[f"threads_{cores}"], model["threads_1"]
        low, high = model["accuracy_interval_95"]
        lines.append(
            f"| {name} | {100 * model['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f}) | "
            f"{100 * model['agreement_with_teacher']:.1f}% | {model['bytes'] / 1e6:.1f} | {every['latency_ms_p50']:.2f}, "
            f"{every['latency_ms_p95']:.2f}, {every['latency_ms_p99']:.2f} | {every['per_second']:.0f} | "
            f"{every['per_second'] / first:.1f} times | {one['per_second']:.0f} | "
            f"{every['best_per_second']:.0f} (batch {every['best_batch']}) |"
        )
    lines += ["", f"![accuracy against latency]({picture})"]
    if load := results.get("load"):
        memory = load["memory_bytes"]
        lines += [
            "",
            f"`pkd serve` under {load['clients']} clients for {load['seconds']:.0f} s: {load['answered']:,} requests answered "
            f"({load['texts']:,} texts), {load['refused']:,} bad ones refused, {load.get('busy', 0):,} told to come again; largest "
            f"difference of a probability {load['largest_difference_of_a_probability']:.1e}; memory {memory[0] / 1e6:.0f} MB at "
            f"the start, {memory[len(memory) // 2] / 1e6:.0f} MB half-way, {memory[-1] / 1e6:.0f} MB at the end.",
        ]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    cores = results["machine"]["cores"]
    for name, model in results["models"].items():
        every = model[f"threads_{cores}"]
        low, high = model["accuracy_interval_95"]
        axes.errorbar(
            every["latency_ms_p50"], 100 * model["accuracy"],
            xerr=[[0], [every["latency_ms_p99"] - every["latency_ms_p50"]]],
            yerr=[[100 * (model["accuracy"] - low)], [100 * (high - model["accuracy"])]],
            fmt="o", capsize=3, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(f"latency at batch 1 on {cores} core(s), ms (point: p50, whisker: to p99)")
    axes.set_ylabel("dev accuracy, % (95% interval)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
