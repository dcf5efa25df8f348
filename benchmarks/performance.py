"""Write the figures of docs/performance.md from benchmarks/results: python -m benchmarks.performance"""

from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS, read_json, table, write_page

PAGE = DOCS / "performance.md"
COMMANDS = {
    "peers-amx": "make bench-peers ARGS='--results benchmarks/results/peers-amx.json'",
    "peers": "make bench-peers", "peers-avx512": "make bench-peers ARGS='--results benchmarks/results/peers-avx512.json'",
    "peers-avx2": "make bench-peers ARGS='--results benchmarks/results/peers-avx2.json'", "peers-cuda": "make bench-peers ARGS='--device cuda'", "profile": "make bench-profile",
    "scaling": "make bench-ranks",
}  # fmt: skip
"""Result file -> the command that measures it."""
CPUS = {
    "peers-amx": "Intel Xeon, AMX",
    "peers": "AMD EPYC (Zen 4), AVX512 with bfloat16", "peers-avx512": "Intel Xeon, AVX512 without bfloat16",
    "peers-avx2": "AMD EPYC, AVX2 alone",
}  # fmt: skip
"""Result file -> the kind of its CPU."""
WAYS = {"plain": "plain loop", "engine": "through DeepSpeed's engine", "loop": "the complete training loop"}


def peers_file(device: str) -> str:
    return "peers.json" if device == "cpu" else f"peers-{device}.json"


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {name: read_json(folder / f"{name}.json") for name in COMMANDS}


def write() -> None:
    write_page(PAGE, figures(read()))


def figures(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return name of a figure -> function that returns its text."""
    scaling = measured["scaling"]
    made = {
        "cpus": (cpus, {name: measured[name] for name in CPUS if "ratio_best_peer" in measured[name]}, "peers"),
        **{name: (peers, measured[name], name) for name in (*CPUS, "peers-cuda")},
        "profile": (profile, measured["profile"], "profile"), "memory": (memory, scaling.get("memory"), "scaling"),
        "startup": (startup, scaling.get("startup"), "scaling"),
    }  # fmt: skip

    def shown(name: str) -> str:
        function, found, file = made[name]
        measured = found and found.get("contestants", True)
        return function(found) if measured else f"Not measured yet: `{COMMANDS[file]}`.\n"

    return {name: lambda name=name: shown(name) for name in made}


def cpus(made: dict[str, dict[str, Any]]) -> str:
    """Set the main figures of several CPUs side by side."""

    def column(name: str) -> list[str]:
        found = made[name]
        ours, peer = (found["contestants"][found[key]] for key in ("best_ours", "best_peer"))
        peaks, quality = found["peak_flops_per_second"], found.get("time_to_quality")
        reached = quality["reached"] if quality else {}
        seconds = [each["seconds"] for key, each in reached.items() if key.startswith("ours") and each["seconds"]]
        return [
            CPUS[name],
            *(f"{peaks[precision] / 1e9:,.0f} GFLOP/s" for precision in ("float32", "bfloat16")),
            f"{ours['seconds']:.0f} s, {ours['precision']}", f"{peer['seconds']:.0f} s, {peer['precision']}",
            f"**{found['ratio_best_peer']:.2f}**", f"{found['gemm_share']:.0%}",
            f"{min(seconds):.0f} s" if seconds else "not measured",
            f"{reached[found['best_peer']]['epochs'][-1]['seconds']:.0f} s" if reached else "not measured",
        ]  # fmt: skip

    heads = [
        "2 cores", "matrix multiplications in float32", "in bfloat16",
        "ours: the teacher's pass and 4 epochs", "the fastest other", "times as fast", "our steps, share of the peak",
        "ours until the quality with which the fastest other ends, from the command", "the fastest other until then",
    ]  # fmt: skip
    columns = [column(name) for name in made]
    rows = [[head, *cells] for head, *cells in zip(heads, *columns, strict=True)]
    return table(rows[0], rows[1:])


def peers(made: dict[str, Any]) -> str:
    s, machine, peaks = made["settings"], made["machine"], made["peak_flops_per_second"]
    gpu = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    speeds = " and ".join(f"{peaks[name] / 1e9:,.0f} GFLOP/s in {name}" for name in peaks)
    text = (
        f"Machine: {gpu}{machine['cores']} cores of {machine['processor']}; matrix multiplications reach {speeds}, measured in the "
        f"same run. Data: {s['examples']:,} sentences ({s['tokens']:,} tokens). Student: layers {s['student_layers']} (from "
        f"0) of the {s['teacher_layers']}-layer teacher. Batch {s['batch_size']}, learning rate {s['learning_rate']:g}, "
        f"{s['epochs']} epochs, seeds {', '.join(map(str, s['seeds']))}.\n"
    )
    head = ["", "precision", "ranks", "measured", "seconds", "command", "samples/s", "useful", "executed", "accuracy", "memory"]  # fmt: skip
    rows = table(head, map(_row, sorted(made["contestants"].values(), key=lambda found: found["seconds"])))
    star = "\\* from full runs with the same arithmetic, started in another way.\n"
    return "\n".join([text, rows, star, _verdict(made) + _notes(made), *_quality(made), *_own_parts(made)])


def _quality(made: dict[str, Any]) -> list[str]:
    """Return who reaches the agreement with the teacher that the fastest peer ends with, and when."""
    if "time_to_quality" not in made:
        return []
    reference, reached = made["time_to_quality"]["reference"], made["time_to_quality"]["reached"]
    until, agreement = reached[reference]["epochs"][-1]["seconds"], made["time_to_quality"]["agreement"]
    text = (
        f"Time to quality: seconds from the command to the end of the first epoch with the agreement with the teacher on dev that the "
        f"fastest peer, {reached[reference]['title']}, ends with: {agreement:.2%} (means over the rounds; seconds are medians).\n"
    )
    rows = [
        [found["title"], *(["not reached", ""] if found["seconds"] is None else
         [f"{found['seconds']:.0f}", f"{until / found['seconds']:.1f}"]),
         *(f"{100 * found['epochs'][-1][key]:.2f}" for key in ("agreement", "accuracy"))]
        for found in sorted(reached.values(), key=lambda found: found["seconds"] or float("inf"))
    ]  # fmt: skip
    return [text, table(["", "seconds", "times as fast", "agreement at its end", "accuracy at its end"], rows)]


def _notes(made: dict[str, Any]) -> str:
    """Return the notes that were added to the results by hand."""
    return "".join(f"- {note}\n" for note in made.get("notes", []))


def _row(found: dict[str, Any]) -> list[str]:
    def _form(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    each, accuracy, error = found["seconds_each"], found["accuracy"], found["accuracy_error"]
    scored = _form(accuracy and 100 * accuracy, "{:.2f}") + _form(error and 100 * error, " ± {:.2f}")
    return [
        found["title"], found["precision"], str(found["ranks"]),
        "in full" if found["measured"] == "whole" else found["measured"],
        f"{found['seconds']:.0f}" + (f" ({min(each):.0f} to {max(each):.0f})" if each else ""),
        _form(found["command_seconds"], "{:.0f}"), f"{found['samples_per_second']:.0f}",
        _form(found["useful_share"], "{:.0%}"), _form(found["executed_share"], "{:.0%}"),
        scored + " *" * bool(scored and found["scored_by"]), f"{found['peak_bytes'] / 1e9:.1f} GB",
    ]  # fmt: skip


def _verdict(made: dict[str, Any]) -> str:
    text = ""
    if "ratio_best_peer" in made:
        peer = "{title}, {precision}, {ranks} rank(s)".format(**made["contestants"][made["best_peer"]])
        text += f"- **{made['ratio_best_peer']:.1f} times** as fast as the fastest peer ({peer}).\n"
    if "ratio_authors" in made:
        text += f"- **{made['ratio_authors']:.1f} times** as fast as the authors' computation.\n"
    if "gemm_share" in made:
        text += f"- Our training steps reach **{made['gemm_share']:.0%}** of the peak of matrix multiplications (executed).\n"
    if "accuracy_holds" in made:
        ahead, held = max(made["accuracy_ahead"].values()), "not more" if made["accuracy_holds"] else "more"
        text += f"- Accuracy: the best other is {100 * ahead:+.2f} points from ours, {held} than the standard error of our mean.\n"
    if found := made.get("accuracy_difference"):
        peer, seeds = made["contestants"][made["best_peer"]]["title"], len(found["seeds"])
        text += (
            f"- Seed by seed over {seeds} seeds, the fastest peer ({peer}) is {100 * found['mean']:+.2f} ± {100 * found['error']:.2f} points "
            "from ours.\n"
        )
    return text


def _own_parts(made: dict[str, Any]) -> list[str]:
    parts = []
    if found := made.get("teacher_pass"):
        parts.append(
            f"The teacher's pass alone, {found['examples']:,} sentences in {found['batches']} batches, {found['precision']}: "
            f"{found['seconds']:.2f} s, **{found['gemm_share']:.0%}** of the "
            f"{'float32' if found['precision'] == 'float32' else 'bfloat16'} peak (executed).\n"
        )
    if found := made.get("job"):
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["stages"].items())
        parts.append(
            f"From raw text to a verified export (safetensors; 20 single sentences timed for the model card): "
            f"**{found['seconds']:.1f} s** in all stages ({stages}), {found['command_seconds']:.1f} s for the command, "
            "imports included.\n"
        )
    if found := made.get("engine"):
        intro = (
            f"Cost of DeepSpeed and of the training loop: one step at ZeRO {found['zero_stage']}, {found['precision']}, one rank "
            f"with {found['threads']} threads.\n\n"
        )
        rows = ([WAYS[w], f"{1000 * found['step_seconds'][w]:.1f}", f"{found['overhead'][w]:.3f}"] for w in WAYS)
        parts.append(intro + table(["", "ms a step", "relative to the plain loop"], rows))
    return parts


def profile(entries: dict[str, Any]) -> str:
    where = [f["processor"] if f["device"] == "cpu" else f["device"] for f in entries.values()]
    heads = [f"{name}, {f['ranks']} rank(s)" for name, f in zip(where, entries.values(), strict=True)]

    def share(seconds: float | None, total: float) -> str:
        return "" if seconds is None else f"{1000 * seconds:.2f} ms, {seconds / total:.0%}"

    def shares(key: str, total: str) -> list[list[str]]:
        labels = dict.fromkeys(label for found in entries.values() for label in found[key])
        rows = [[label, *(share(f[key].get(label), f[total]) for f in entries.values())] for label in labels]
        title = total.removesuffix("_seconds").replace("_", " ")
        return [*rows, [title, *(f"{1000 * f[total]:.1f} ms" for f in entries.values())]]

    groups = shares("group_seconds", "profiled_step_seconds")
    groups.append(["operations in a step", *(f"{f['operations_per_step']:.0f}" for f in entries.values())])
    phases = shares("phase_seconds", "step_seconds")
    return table(["group", *heads], groups) + "\n" + table(["phase", *heads], phases)


def memory(made: dict[str, Any]) -> str:
    settings = f"; settings `{' '.join(made['overrides'])}`" if made["overrides"] else ""
    intro = (
        f"{made['ranks']} rank(s) on {made['cores']} cores of {made['processor']}; a teacher of {made['teacher_layers']} "
        f"layers{settings}.\n\n"
    )
    stages = {"data": "data (one rank)", "cache": "cache", "distill": "distill"}
    head = ["examples", "tokens", "cache", *(f"{s}: own + mapped" for s in stages.values())]
    rows = []
    for size in made["sizes"]:
        found = [size[stage] for stage in stages]
        rows.append([
            f"{size['examples']:,}", f"{size['tokens']:,}", f"{size['cache_bytes'] / 1e6:.0f} MB",
            *(f"{stage['anonymous_bytes'] / 1e6:.0f} + {stage['file_bytes'] / 1e6:.0f} MB" for stage in found),
            *(f"{1000 * stage['seconds_per_example']:.2f}" for stage in found),
        ])  # fmt: skip
    return intro + table([*head, *(f"{s}: ms an example" for s in stages.values())], rows) + "\n" + _notes(made)


def startup(made: dict[str, Any]) -> str:
    ways = ", ".join(f"{way['median']:.1f} ({name})" for name, way in made["to_first_step_seconds"].items())
    intro = (
        f"A resumed run on {made['cores']} cores of {made['processor']}: seconds from the command to the end of its first "
        f"step: {ways}. Parts, on one rank, {made['followed']['seconds']:.1f} s:\n\n"
    )
    parts = sorted(made["followed"]["parts"].items(), key=lambda item: -item[1])
    rows = [[name, f"{seconds:.2f}"] for name, seconds in parts if seconds >= 0.005]
    imports = [[name, f"{seconds:.2f}"] for name, seconds in list(made["imports"].items())[:12]]
    under = "\nImports under `python -X importtime`, which adds to them:\n\n"
    return intro + table(["part", "s"], rows) + under + table(["package", "s, itself"], imports)


if __name__ == "__main__":
    write()
