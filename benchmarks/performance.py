"""benchmarks/results/{peers,peers-cuda,profile,scaling}.json -> docs/performance.md and its plots.

python -m benchmarks.performance
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pkd_dist.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
COLOURS = {"ours": "#c2571a", "peer": "#1f6fb4", "authors": "#8a8a8a"}
HEAD = """\
# Performance

Made by `python -m benchmarks.performance` from `peers.json`, `peers-cuda.json`, `profile.json` and `scaling.json` in
[benchmarks/results](../benchmarks/results), which `make bench-peers`, `make bench-profile` and `make bench-ranks` write. What is not measured yet says so.
Of GPUs one at a time was at hand: steps of several ranks through NCCL, ZeRO on GPUs, and training in float16 are written but not measured.
"""
PEERS = """\
## Against other implementations, {where}

One machine, one run, in turn: every contestant trains the same student (layers {layers} of the {teacher_layers}-layer teacher, from
0) from the same fine-tuned teacher on the same {examples:,} sentences ({tokens:,} tokens) with the loss of the authors' code,
batch {batch_size}, learning rate {learning_rate:g}, {epochs} epochs, dropout on, seeds {seeds} ([how](../benchmarks/peers/README.md)).
Machine: {machine}; matrix products reach {float32:.0f} GFLOP/s in float32 and {bfloat16:.0f} in bfloat16, measured
in the same run. Each has the whole machine: {cores} threads for one rank, one for each of two.

*Seconds*: teacher's pass and all epochs, the median of the rounds. Of ours that is the stages cache, init and distill as the
run records them, so with evaluation, checkpoints and DeepSpeed; of the others training alone. A contestant timed on some
steps is scaled by tokens. *Command*: from its start to its end, imports included. *Useful*, *executed*: what the task needs,
and what the contestant computes, over the peak of its precision in the same time. *Accuracy*: on dev, the best epoch, mean
over seeds ± standard error. *Memory*: peak resident set of all its processes.

![Seconds of all contestants]({plot})
"""
NOT_COMPARED = "## Against other implementations, {where}\n\nNot measured yet: `{command}`.\n"
DEVICES = {"cpu": ("on a CPU", "make bench-peers"), "cuda": ("on a GPU", "make bench-peers ARGS='--device cuda'")}
NOT_MEASURED = "Not measured yet: `{command}`.\n"


def write() -> None:
    """Writes the document and the plots of what there is."""
    measured = read()
    write_atomically(DOCS / "performance.md", lambda tmp: tmp.write_text(document(measured), encoding="utf-8"))
    for name, draw in (("peers", _plot_peers), ("peers-cuda", _plot_peers), ("profile", _plot_profile)):
        if measured[name]:
            path = DOCS / f"performance-{name}.png"
            write_atomically(
                path, lambda tmp, draw=draw, name=name: draw(measured[name]).savefig(tmp, format="png", dpi=130)
            )


def peers_file(device: str) -> str:
    """Of a comparison's results."""
    return "peers.json" if device == "cpu" else f"peers-{device}.json"


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    names = ("peers", "peers-cuda", "profile", "scaling")
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) if path.exists() else {} for name, path in paths.items()}


def document(measured: dict[str, dict[str, Any]]) -> str:
    profile, scaling = measured["profile"], measured["scaling"]
    return "\n".join([
        HEAD,
        *(_peers(measured[Path(peers_file(device)).stem], device) for device in DEVICES),
        _profile(profile),
        _memory(scaling.get("memory")),
        _startup(scaling.get("startup")),
    ])  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --------------------------------------------------------------------------------------------------------------- peers


def _peers(made: dict[str, Any], device: str) -> str:
    where, command = DEVICES[device]
    if not made.get("contestants"):
        return NOT_COMPARED.format(where=where, command=command)
    settings, peaks = made["settings"], made["peak_flops_per_second"]
    text = PEERS.format(
        **{**settings, "seeds": ", ".join(map(str, settings["seeds"])), "layers": settings["student_layers"]},
        **{name: peaks.get(name, float("nan")) / 1e9 for name in ("float32", "bfloat16")},
        machine=_machine(made["machine"]),
        cores=made["machine"]["cores"],
        where=where,
        plot=f"performance-{Path(peers_file(device)).stem}.png",
    )
    head = ["", "precision", "ranks", "measured", "seconds", "command", "samples/s", "useful", "executed", "accuracy", "memory"]  # fmt: skip
    ordered = sorted(made["contestants"].values(), key=lambda found: found["seconds"])
    rows = table(head, (_row(found) for found in ordered))
    return "\n".join([text, rows + _notes(made), _verdict(made), _job(made), _engine(made)])


def _notes(made: dict[str, Any]) -> str:
    """What was added to the measurements by hand, after a blank line."""
    notes = made.get("notes", [])
    return "\n" * bool(notes) + "".join(f"- {note}\n" for note in notes)


def _machine(machine: dict[str, Any]) -> str:
    gpu = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return f"{gpu}{machine['cores']} cores of {machine['processor']}"


def _row(found: dict[str, Any]) -> list[str]:
    spread = f" ({min(found['seconds_each']):.0f} to {max(found['seconds_each']):.0f})" if found["seconds_each"] else ""
    return [
        found["title"], found["precision"], str(found["ranks"]), found["measured"], f"{found['seconds']:.0f}{spread}",
        _number(found["command_seconds"], "{:.0f}"), f"{found['samples_per_second']:.0f}",
        _number(found["useful_share"], "{:.0%}"), _number(found["executed_share"], "{:.0%}"), _scored(found),
        f"{found['peak_bytes'] / 1e9:.1f} GB",
    ]  # fmt: skip


def _scored(found: dict[str, Any]) -> str:
    if found["accuracy"] is None:
        return ""
    error = "" if found["accuracy_error"] is None else f" ± {100 * found['accuracy_error']:.2f}"
    return f"{100 * found['accuracy']:.2f}{error}" + (" *" if found["scored_by"] else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _verdict(made: dict[str, Any]) -> str:
    lines = ["\\* of the runs of the same arithmetic, started otherwise.", ""]
    if "ratio_best_peer" in made:
        peer = made["contestants"][made["best_peer"]]
        lines.append(
            f"- **{made['ratio_best_peer']:.1f} times** as fast as the fastest peer ({peer['title']}, {peer['precision']}, "
            f"{peer['ranks']} rank(s))."
        )
    if "ratio_authors" in made:
        lines.append(f"- **{made['ratio_authors']:.1f} times** as fast as the authors' computation.")
    if "gemm_share" in made:
        lines.append(
            f"- **{made['gemm_share']:.0%}** of the matrix products' peak in executed arithmetic over the steps."
        )
    if "accuracy_holds" in made:
        ahead = max(made["accuracy_ahead"].values())
        held = "within" if made["accuracy_holds"] else "beyond"
        lines.append(
            f"- Accuracy: the best of the others is {100 * ahead:+.2f} points from ours, {held} the standard error of our mean."
        )
    return "\n".join([*lines, ""])


def _job(made: dict[str, Any]) -> str:
    parts = []
    if "teacher_pass" in made:
        found = made["teacher_pass"]
        parts.append(
            f"The teacher's pass alone, {found['examples']:,} sentences in {found['batches']} batches, {found['precision']}: "
            f"{found['seconds']:.2f} s, **{found['gemm_share']:.0%}** of the bfloat16 peak in executed arithmetic.\n"
        )
    if "job" in made:
        found = made["job"]
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["stages"].items())
        parts.append(
            f"From raw text to a verified export (safetensors; 20 single sentences timed for the model card): **{found['seconds']:.1f} s** in its stages ({stages}), "
            f"{found['command_seconds']:.1f} s from the command to its end, imports included.\n"
        )
    return "\n".join(parts)


def _engine(made: dict[str, Any]) -> str:
    head = "### What DeepSpeed costs\n\n"
    if "engine" not in made:
        return head + NOT_MEASURED.format(command="make bench-peers")
    found = made["engine"]
    text = (
        f"A step of ours at ZeRO {found['zero_stage']}, {found['precision']}, one rank of {found['threads']} threads: the same "
        "model on the same batches in a plain torch loop, through the project's engine, and in its whole training loop "
        "(metrics, records, agreement on stop signals; on a GPU one launch in place of the engine's step); blocks of steps in turn.\n\n"
    )
    names = {"plain": "plain loop", "engine": "through DeepSpeed's engine", "loop": "the whole training loop"}
    rows = (
        [names[way], f"{1000 * found['step_seconds'][way]:.1f}", f"{found['overhead'][way]:.3f}"] for way in names
    )  # fmt: skip
    return head + text + table(["", "ms a step", "times the plain loop"], rows)


def _plot_peers(made: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    found = sorted(made["contestants"].values(), key=lambda one: -one["seconds"])
    figure = Figure(figsize=(9, 0.45 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(found):
        axes.barh(place, one["seconds"], color=COLOURS[one["role"]], height=0.7)
        axes.annotate(f"{one['seconds']:.0f} s", (one["seconds"], place), (4, 0), textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    labels = [f"{one['title']}, {one['precision']}, {one['ranks']} rank{'s' * (one['ranks'] > 1)}" for one in found]
    axes.set_yticks(range(len(found)), labels, fontsize=9)
    axes.set_xlabel(f"teacher's pass and {made['settings']['epochs']} epochs, seconds")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ------------------------------------------------------------------------------------------------------------- profile


def _profile(entries: dict[str, Any]) -> str:
    parts = [
        "## Where a step's time goes\n",
        "The project's own pipeline, trainer and engine with the student and data of the comparison above; "
        "`torch.profiler`. Groups: time of the operations themselves (on a GPU of its kernels), per step; *host, Python* is "
        "what is in none of them. Phases: steps without the profiler, on the host's clock; on a GPU *rest* is mostly the wait for the "
        "step before.\n",
    ]
    if not entries:
        return "\n".join([*parts, NOT_MEASURED.format(command="make bench-profile")])
    if not any(name.startswith("cuda") for name in entries):
        parts.append("On a GPU: not measured yet (`make bench-profile ARGS='--device cuda'`).\n")
    parts.append("![Time of a step by group](performance-profile.png)\n")
    heads = [f"{_device(found)}, {found['ranks']} rank{'s' * (found['ranks'] > 1)}" for found in entries.values()]
    names = list(dict.fromkeys(name for found in entries.values() for name in found["group_seconds"]))
    rows = [
        [name, *(_of(found["group_seconds"].get(name), sum(found["group_seconds"].values())) for found in entries.values())]
        for name in names
    ]  # fmt: skip
    rows.append(["profiled step", *(f"{1000 * found['profiled_step_seconds']:.1f} ms" for found in entries.values())])
    rows.append(["operations in a step", *(f"{found['operations_per_step']:.0f}" for found in entries.values())])
    parts.append(table(["group", *heads], rows))
    phases = list(dict.fromkeys(name for found in entries.values() for name in found["phase_seconds"]))
    rows = [
        [name, *(_of(found["phase_seconds"].get(name), found["step_seconds"]) for found in entries.values())]
        for name in phases
    ]
    rows.append(["step", *(f"{1000 * found['step_seconds']:.1f} ms" for found in entries.values())])
    return "\n".join([*parts, table(["phase", *heads], rows)])


def _device(found: dict[str, Any]) -> str:
    return found["processor"] if found["device"] == "cpu" else found["device"]


def _of(seconds: float | None, whole: float) -> str:
    return "" if seconds is None else f"{1000 * seconds:.2f} ms, {seconds / whole:.0%}"


def _plot_profile(entries: dict[str, Any]) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 * len(entries) + 1.8), layout="constrained")
    axes, palette = figure.subplots(), colormaps["tab20"]
    names = list(dict.fromkeys(name for found in entries.values() for name in found["group_seconds"]))
    for place, found in enumerate(entries.values()):
        whole, left = sum(found["group_seconds"].values()), 0.0
        for number, name in enumerate(names):
            share = 100 * found["group_seconds"].get(name, 0.0) / whole
            axes.barh(place, share, left=left, color=palette(number), label=name if place == 0 else None)
            left += share
    axes.set_yticks(range(len(entries)), [f"{_device(f)}, {f['ranks']} rank(s)" for f in entries.values()], fontsize=9)
    axes.set_xlabel("share of a step, %")
    axes.set_xlim(0, 100)
    axes.legend(ncols=5, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ------------------------------------------------------------------------------------------------- memory and start-up


def _memory(made: dict[str, Any] | None) -> str:
    head = "## Memory of a rank, and time, as the data grows\n\n"
    if not made:
        return head + NOT_MEASURED.format(command="make bench-ranks")
    text = (
        f"The embedded data once and many times (each copy of a sentence with another word in it), {made['ranks']} rank(s) on "
        f"{made['cores']} cores; a teacher of {made['teacher_layers']} layers"
        + (f" (settings: `{' '.join(made['overrides'])}`)" if made["overrides"] else "")
        + ". *Own*: memory that a rank cannot do without, its largest rank; *mapped*: pages of memory-mapped "
        "files that happen to be in memory, which the kernel drops where it needs the room.\n\n"
    )
    rows = []
    for size in made["sizes"]:
        stages = [size[stage] for stage in ("data", "cache", "distill")]
        rows.append([
            f"{size['examples']:,}", f"{size['tokens']:,}", f"{size['cache_bytes'] / 1e6:.0f} MB",
            *(f"{stage['anonymous_bytes'] / 1e6:.0f} + {stage['file_bytes'] / 1e6:.0f} MB" for stage in stages),
            *(f"{1000 * stage['seconds_per_example']:.2f}" for stage in stages),
        ])  # fmt: skip
    stages = ("data (one rank)", "cache", "distill")
    columns = [*(f"{s}: own + mapped" for s in stages), *(f"{s}: ms an example" for s in stages)]
    return head + text + table(["examples", "tokens", "cache", *columns], rows) + _notes(made)


def _startup(made: dict[str, Any] | None) -> str:
    head = "## Start-up\n\n"
    if not made:
        return head + NOT_MEASURED.format(command="make bench-ranks")
    ways = made["to_first_step_seconds"]
    text = (
        f"A resumed run on {made['cores']} cores of {made['processor']}: seconds from the command to the end of its first step: "
        + ", ".join(f"{found['median']:.1f} ({name})" for name, found in ways.items())
        + f". Followed part by part, one rank, {made['followed']['seconds']:.1f} s:\n\n"
    )
    parts = sorted(made["followed"]["parts"].items(), key=lambda item: -item[1])
    shown = table(["part", "s"], ([name, f"{seconds:.2f}"] for name, seconds in parts if seconds >= 0.005))
    imports = table(
        ["imports of", "s, by itself"],
        ([name, f"{seconds:.2f}"] for name, seconds in list(made["imports"].items())[:12]),
    )
    return head + text + shown + "\nUnder `python -X importtime`, which adds to them:\n\n" + imports


if __name__ == "__main__":
    write()
