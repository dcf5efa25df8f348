"""`make bench-serving`: speed and accuracy of the export of a finished run, and `pkd serve` under 64 clients.

Writes benchmarks/results/serving.json and the figures of docs/serving.md. Example: python -m benchmarks.serving --run runs/demo
"""

import argparse
import asyncio
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import DOCS, RESULTS, run_program, table, write_page
from benchmarks.serving.load import load, server
from benchmarks.serving.measure import Subject, accuracies, measure
from benchmarks.watch import cores
from pkd_dist.data.tokens import open_tokens
from pkd_dist.evaluation.intervals import wilson_interval
from pkd_dist.evaluation.metrics import agreement
from pkd_dist.evaluation.speed import machine
from pkd_dist.export import independence, manifest
from pkd_dist.export.runtime import ONNX_FILES
from pkd_dist.files import write_json

TEACHER, STUDENT = "teacher, PyTorch", "student, PyTorch"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of a classification task")
    parser.add_argument("--requests", type=int, default=500, help="single sentences timed for each model")
    parser.add_argument("--load-seconds", type=float, default=60.0, help="of the load by 64 clients; 0: none")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--page", type=Path, default=DOCS / "serving.md", help="page whose figures are replaced")
    options = parser.parse_args()

    def work() -> None:
        results = run(options.run, options.requests, options.load_seconds)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.results, results)
        write_page(options.page, {"serving": lambda: figures(results)})
        print(f"results: {options.results}\npage:    {options.page}")

    run_program(work)


def run(folder: Path, requests: int, load_seconds: float) -> dict[str, Any]:
    """Return all results."""
    export, dev, trimmed = folder / "export", folder / "data/dev", folder / "data/trimmed/dev"
    made, labels_N = manifest.verify(export), np.asarray(open_tokens(dev).labels_N)
    teacher = Path(json.loads((folder / "stages/teacher.json").read_text())["outputs"]["folder"])
    onnx = {f"student, {name}": export / file for name, file in ONNX_FILES.items() if file in made["files"]}
    own = trimmed if trimmed.exists() else dev  # with student.vocabulary `used`, the student has other tokens
    students = {name: Subject(path, export, own) for name, path in ({STUDENT: export} | onnx).items()}
    subjects = {TEACHER: Subject(teacher, teacher, dev)} | students
    logits, models = accuracies(subjects), {}
    for name, (path, *_) in subjects.items():
        share = float((logits[name].argmax(1) == labels_N).mean())
        models[name] = {
            "accuracy": share, "accuracy_interval_95": list(wilson_interval(share, len(labels_N))),
            "agreement_with_teacher": agreement(logits[name], logits[TEACHER]),
            "bytes": (path / "model.safetensors" if path.is_dir() else path).stat().st_size,
        }  # fmt: skip
    for threads in sorted({1, cores()}):
        for name, timings in measure(subjects, threads, requests).items():
            models[name][f"threads_{threads}"] = timings
    return {
        "taken": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "task": made["task"], "examples": len(labels_N), "requests": requests, "models": models,
    } | ({"load": under_load(folder, load_seconds)} if load_seconds else {})  # fmt: skip


def under_load(folder: Path, seconds: float) -> dict[str, Any]:
    """Run `pkd serve` with its default file under 64 clients, a third of whose requests are invalid.

    Raises:
        AssertionError: An answer differs from that to the text alone.
    """
    from pkd_dist.serve.model import ServedModel

    texts = json.loads((folder / "data/sample.json").read_text())["texts"][0]
    rng, words = np.random.default_rng(0), " ".join(texts).split()
    texts += [" ".join(rng.choice(words, size=rng.integers(1, 120))) for _ in range(200)]
    alone = ServedModel(folder / "export", threads=1)
    wanted = {text: alone.answer([(text,)])[0] for text in texts}
    memory: list[int] = []
    worst = 0.0

    def check(text: str, answer: dict[str, Any]) -> None:
        nonlocal worst
        for name, share in wanted[text]["probabilities"].items():
            worst = max(worst, abs(answer["probabilities"][name] - share))
        same = answer["label"] == wanted[text]["label"]
        assert same and worst <= independence.TOLERANCE, f"{text!r}: {answer} instead of {wanted[text]}"

    with server(folder / "export", "--max-queue", "1024") as (process, port):
        watched = psutil.Process(process.pid)
        watch = lambda: memory.append(watched.memory_info().rss)  # noqa: E731
        counts = asyncio.run(load(port, texts, check, seconds=seconds, watch=watch))
        process.terminate()
        status = process.wait(60)
    return counts | {"file": alone.about["file"]} | {
        "status_at_the_end": status, "largest_difference_of_a_probability": worst, "memory_bytes": memory
    }  # fmt: skip


def figures(results: dict[str, Any]) -> str:
    """Return the Markdown text of the results."""
    machine, models = results["machine"], results["models"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    text = (
        f"Task {results['task']}: {results['examples']} dev sentences; {results['requests']} requests to each model on "
        f"{machine['cores']} core(s) of {machine['processor']}, measured on {results['taken']} with {versions}.\n\n"
    )
    head = ["", "accuracy (95%)", "agrees with teacher", "MB", "batch 1: p50, p95, p99, ms", "per second",
            "against teacher", "one core, per second", "best batch, per second"]  # fmt: skip
    every_core, rows = f"threads_{machine['cores']}", []
    for name, model in models.items():
        every, (low, high) = model[every_core], model["accuracy_interval_95"]
        rows.append([
            name, f"{100 * model['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * model['agreement_with_teacher']:.1f}%", f"{model['bytes'] / 1e6:.1f}",
            ", ".join(f"{every[f'latency_ms_p{share}']:.2f}" for share in (50, 95, 99)), f"{every['per_second']:.0f}",
            f"{every['per_second'] / models[TEACHER][every_core]['per_second']:.1f} times",
            f"{model['threads_1']['per_second']:.0f}",
            f"{every['best_per_second']:.0f} (batch {every['best_batch']})",
        ])  # fmt: skip
    text += table(head, rows)
    if load := results.get("load"):
        memory = load["memory_bytes"]
        text += (
            f"\n`pkd serve` with `{load['file']}` under {load['clients']} clients for {load['seconds']:.0f} s: {load['answered']:,} requests "
            f"answered ({load['texts']:,} texts), {load['refused']:,} invalid ones rejected, {load.get('busy', 0):,} told to "
            f"retry; largest difference of a probability {load['largest_difference_of_a_probability']:.1e}; memory "
            f"{memory[0] / 1e6:.0f} MB at the start, {memory[len(memory) // 2] / 1e6:.0f} MB half-way, "
            f"{memory[-1] / 1e6:.0f} MB at the end.\n"
        )
    return text


if __name__ == "__main__":
    main()
