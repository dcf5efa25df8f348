"""The Prometheus metrics of a run, and counters that survive its processes.

`RunMetrics` declares each metric once. docs/metrics.md and the dashboard are generated from it, and the alert rules are tested
against it. All values are those of one process, the first rank of a node.

Prometheus takes a counter that falls for a reset and counts its whole new value as an increase. So that none falls, counters are
written to a file before a scrape or a checkpoint makes their values visible, and the next process continues from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pkd_dist.files import digest_of, read_object
from pkd_dist.metric_names import AGREEMENT, DIVERGENCE, MAIN_METRIC, METRICS
from pkd_dist.telemetry import records
from pkd_dist.telemetry.log import log

if TYPE_CHECKING:
    import torch

STEP_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_OF_TASK = (MAIN_METRIC, *(name for name in METRICS if name != AGREEMENT))
EVAL_METRICS = (*_OF_TASK, AGREEMENT, DIVERGENCE)


@dataclass(frozen=True)
class MetricDoc:
    """Documentation of a metric; `labels` maps each label to a description of its values."""

    name: str
    kind: str
    help: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Step:
    """What the gauges show of an optimizer step; `loss_scale` is None without loss scaling."""

    step: int
    epoch: float
    losses: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    loss_scale: float | None


class RunMetrics:
    """All metrics of a run, in a registry of their own.

    Args:
        counters: file that keeps counters across processes; None to start at 0.
    """

    def __init__(self, counters: Path | None = None) -> None:
        self.documented: list[MetricDoc] = []
        self._of_training: list[Gauge] = []
        self._own = CollectorRegistry()
        self._declare_run()
        self._declare_training()
        self._declare_resources()
        self._declare_sweep()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_PersistentCounters(self._own, counters))
        self.cache_expected.set(self.value("pkd_cache_rows_total"))  # until a build sets the target

    def _declare_run(self) -> None:
        self.info = self._gauge(
            "pkd_info",
            "Always 1; the labels describe the run",
            version="version of pkd_dist",
            run="absolute path of the run folder",
            task="`task.name`",
            host="name of the host",
            world_size="number of ranks",
            precision="training precision, such as `autocast bfloat16`",
            slurm_job="SLURM job id; empty outside SLURM",
        )
        self.stage = self._gauge("pkd_stage", "1 for the running stage, 0 for the others", stage="stage of the run")
        self.stage_name = ""
        self._end_status = self._gauge(
            "pkd_run_end_status",
            "Exit status of the run, pushed at its end; absent while it runs and after a crash",
            stage="the last stage that was entered",
            host="name of the host",
        )
        self.cache_rows = self._counter(
            "pkd_cache_rows_total", "Examples whose outputs this process has written to the teacher cache"
        )
        self.cache_expected = self._gauge(
            "pkd_cache_rows_expected", "Value of pkd_cache_rows_total when this process has written its share"
        )
        self._eval_metric = self._gauge(
            "pkd_eval_metric",
            "Metrics of the last evaluation of the model in training, or of the final student after the evaluate stage",
            stage="`teacher`, `teacher-2`, ..., `distill` or `evaluate`",
            split="`dev`; after the evaluate stage also every other labeled split",
            metric=f"those of the task among {', '.join(f'`{name}`' for name in _OF_TASK)}; of a student in "
            f"training, also `{AGREEMENT}` with the teacher and `{DIVERGENCE}` from it (`evaluate.best_by`)",
        )
        self.nonfinite = self._counter(
            "pkd_nonfinite_total", "Non-finite losses or gradients, each of which ended the run with status 3"
        )
        self.preemptions = self._counter(
            "pkd_preemptions_total", "Stop signals that ended the run with status 75, ready to resume"
        )

    def _declare_training(self) -> None:
        self._step = self._training_gauge("pkd_step", "Optimizer steps of the current or last training")
        self._total_steps = self._training_gauge(
            "pkd_steps_total_expected",
            "Value of pkd_step at the end of the current or last training; while it runs, the most that it can reach "
            "(`train.patience_epochs`)",
        )
        self._expected_end = self._training_gauge(
            "pkd_expected_end_timestamp_seconds",
            "Unix time at which the current training will end at the mean pace of this process, evaluations and checkpoints "
            "included; absent before its first step and when none is running",
        )
        self._epoch = self._training_gauge("pkd_epoch", "Epochs of the current or last training, fractional")
        self.samples = self._counter(
            "pkd_samples_total", "Training examples processed by all ranks; the same on every node"
        )
        self.tokens = self._counter(
            "pkd_tokens_total", "Training tokens processed by all ranks, without padding; the same on every node"
        )
        text = "Duration of an optimizer step in seconds"
        self.step_seconds = Histogram("pkd_step_seconds", text, buckets=STEP_SECONDS_BUCKETS, registry=self._own)
        self._document("pkd_step_seconds", "histogram", text, {})
        self._loss = self._training_gauge(
            "pkd_loss",
            "Loss of the last step, mean over the global batch; terms that are not part of it are absent",
            term="total loss or term of it",
        )
        self._learning_rate = self._training_gauge("pkd_learning_rate", "Learning rate of the last step")
        self._grad_norm = self._training_gauge(
            "pkd_grad_norm", "Global gradient norm of the last step before clipping; +Inf after a float16 overflow"
        )
        self._loss_scale = self._training_gauge("pkd_loss_scale", "Loss scale; 1 without loss scaling")
        self.checkpoint_time = self._gauge(
            "pkd_checkpoint_last_success_timestamp_seconds", "Unix time of the last committed checkpoint; 0 if none"
        )
        self.checkpoint_seconds = self._gauge("pkd_checkpoint_seconds", "Duration of the last checkpoint in seconds")
        self.data_wait = self._counter("pkd_data_wait_seconds_total", "Seconds that training waited for batches")

    def _declare_resources(self) -> None:
        self.gpu_memory = self._gauge(
            "pkd_gpu_memory_bytes",
            "GPU memory, read at each scrape; absent without a GPU",
            kind="of PyTorch: `allocated` (tensors), `peak` (maximum of `allocated`), `reserved` (memory pool); of the "
            "device: `used` (by all processes), `total`",
        )

    def _document(self, name: str, kind: str, text: str, labels: dict[str, str]) -> tuple[str, str, list[str]]:
        self.documented.append(MetricDoc(name, kind, text, labels))
        return name, text, list(labels)

    def _declare_sweep(self) -> None:
        self._sweep_trials = self._gauge(
            "pkd_sweep_trials",
            "Trials of a sweep, by state",
            state="`waiting`, `running`, `complete`, `pruned` or `failed`",
        )
        self._sweep_best = self._gauge(
            "pkd_sweep_best_value",
            "Best score of a sweep so far",
            objective="what the sweep looks at, as `sweep.objective`",
        )
        self._sweep_workers = self._gauge(
            "pkd_sweep_workers", "Workers of a sweep that run on this host", host="name of the host"
        )
        self._sweep_together = self._gauge(
            "pkd_sweep_students_per_step",
            "Students that share a training step, mean over the trials of a sweep that are in training; 0 if none is",
        )

    def _gauge(self, name: str, text: str, **labels: str) -> Gauge:
        return Gauge(*self._document(name, "gauge", text, labels), registry=self._own)

    def _training_gauge(self, name: str, text: str, **labels: str) -> Gauge:
        """Return a gauge of one training: labeled with its stage, and cleared when another one starts."""
        gauge = self._gauge(name, text, stage="`teacher`, `teacher-2`, ... or `distill`", **labels)
        self._of_training.append(gauge)
        return gauge

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(*self._document(name, "counter", text, {}), registry=self._own)

    def show_end(self, status: int) -> None:
        """Set `pkd_run_end_status`."""
        self._end_status.labels(stage=self.stage_name, host=socket.gethostname()).set(status)

    def show_sweep(
        self, trials: Mapping[str, int], workers: int, students_per_step: float, objective: str, best: float | None
    ) -> None:
        """Show how far a sweep is.

        Args:
            trials: State -> number.
            workers: Of this host.
            students_per_step: Mean over the running trials; 0: none is running.
            best: Score so far; None: there is none.
        """
        for state, number in trials.items():
            self._sweep_trials.labels(state).set(number)
        self._sweep_workers.labels(socket.gethostname()).set(workers)
        self._sweep_together.set(students_per_step)
        if best is not None:
            self._sweep_best.labels(objective).set(best)

    def start_training(self, stage: str, step: int, epoch: float, total_steps: int) -> None:
        """Show where a training starts or resumes, and nothing of an earlier one."""
        for gauge in (*self._of_training, self._eval_metric):
            gauge.clear()
        self._step.labels(stage).set(step)
        self._epoch.labels(stage).set(epoch)
        self.expect_steps(stage, total_steps)

    def expect_steps(self, stage: str, total_steps: int) -> None:
        self._total_steps.labels(stage).set(total_steps)

    def show_step(self, stage: str, step: Step) -> None:
        """Set the gauges to a step of a training."""
        self._step.labels(stage).set(step.step)
        self._epoch.labels(stage).set(step.epoch)
        self.show_losses(stage, step.losses)
        self._learning_rate.labels(stage).set(step.learning_rate)
        self._grad_norm.labels(stage).set(step.grad_norm)
        self._loss_scale.labels(stage).set(1.0 if step.loss_scale is None else step.loss_scale)

    def show_losses(self, stage: str, losses: Mapping[str, float]) -> None:
        for term, value in losses.items():
            self._loss.labels(stage, term).set(value)

    def expect_end(self, stage: str, timestamp_seconds: float) -> None:
        self._expected_end.labels(stage).set(timestamp_seconds)

    def end_training(self) -> None:
        """Expect no end any more."""
        self._expected_end.clear()

    def show_scores(self, stage: str, scores_of_split: Mapping[str, Mapping[str, object]]) -> None:
        """Set `pkd_eval_metric` of each split to the `EVAL_METRICS` among its scores, and show no earlier ones."""
        self._eval_metric.clear()
        for split, scores in scores_of_split.items():
            for name in EVAL_METRICS:
                if isinstance(score := scores.get(name), (int, float)):
                    self._eval_metric.labels(stage, split, name).set(score)

    def show_past(self, stage: str, lines: Sequence[records.Record]) -> None:
        """Set the gauges to the final values of a finished training.

        Args:
            lines: its metrics.jsonl.
        """
        self.start_training(stage, 0, 0, max((line["step"] for line in lines), default=0))
        for line in lines:
            if "split" in line:
                self.show_scores(stage, {line["split"]: line})
            else:
                losses, scale = records.losses(line), line.get("loss_scale")
                self.show_step(
                    stage, Step(line["step"], line["epoch"], losses, line["learning_rate"], line["grad_norm"], scale)
                )

    def value(self, name: str) -> float:
        """Return the exported value of a metric without labels, including earlier processes."""
        value = self.registry.get_sample_value(name)
        assert value is not None, name
        return value

    def save_counters(self) -> None:
        """Write the counters to their file, from which the next process continues."""
        with contextlib.suppress(Exception):  # for example of a GPU that has failed
            for _ in self.registry.collect():
                pass  # collecting saves

    def watch_gpu(self, device: torch.device | str) -> None:
        """Export the memory of a CUDA device, read at each scrape."""
        import torch

        def used() -> int:
            free, total = torch.cuda.mem_get_info(device)
            return total - free

        for kind, read in {
            "allocated": lambda: torch.cuda.memory_allocated(device),
            "peak": lambda: torch.cuda.max_memory_allocated(device),
            "reserved": lambda: torch.cuda.memory_reserved(device),
            "used": used,
            "total": lambda: torch.cuda.mem_get_info(device)[1],
        }.items():
            self.gpu_memory.labels(kind=kind).set_function(read)


class _PersistentCounters(Collector):
    """Collector that adds the counts of earlier processes to the counters and histograms of a registry.

    Args:
        file: holds the counts; written before larger ones are exported. A file that is unreadable or has other metrics is
            ignored. None to keep nothing.
    """

    def __init__(self, registry: CollectorRegistry, file: Path | None) -> None:
        self._registry, self._file, self._lock = registry, file, threading.RLock()
        zeros = {_key(sample): 0.0 for sample in _counted(registry.collect())}
        self._before: dict[str, float] = (_load_counts(file) if file else {}) or zeros
        if self._before.keys() != zeros.keys():
            self._before = zeros
        self._saved = dict(self._before)

    def describe(self) -> Iterable[Metric]:
        return self._registry.collect()

    def collect(self) -> Iterable[Metric]:
        with self._lock:  # scrapes and pushes run in threads of their own
            return self._collect()

    def _collect(self) -> list[Metric]:
        metrics = list(self._registry.collect())
        totals: dict[str, float] = {}
        for metric in metrics:
            if metric.type in ("counter", "histogram"):
                metric.samples = [
                    sample._replace(value=sample.value + self._before[_key(sample)]) for sample in _counted([metric])
                ]
                totals |= {_key(sample): sample.value for sample in metric.samples}
        if self._file is not None and totals != self._saved:
            self._save(self._file, totals)
        return metrics

    def _save(self, file: Path, totals: dict[str, float]) -> None:
        """Write the file without fsync: the page cache survives the end of the process, though not a power cut."""
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(totals | {"checksum": digest_of(totals)}, indent=1) + "\n")
            os.replace(temporary, file)
            self._saved = totals
        except OSError as error:
            log.debug("metrics: cannot write the counters: %s", error)


def _load_counts(file: Path) -> dict[str, float]:
    """Return the totals of earlier processes; none, with a line, where the file was damaged."""
    if not file.exists():
        return {}
    with contextlib.suppress(OSError, ValueError):
        content = read_object(file)
        digest = content.pop("checksum", None)  # 0.1.0 wrote none
        if digest is None or digest == digest_of(content):
            return {key: float(value) for key, value in content.items() if isinstance(value, int | float)}
    log.info("metrics: %s is incomplete or was altered; counters start at 0", file)
    return {}


def _counted(metrics: Iterable[Metric]) -> Iterator[Sample]:
    """Yield the samples of counters and histograms, without `_created`, which is the start of this process."""
    for metric in metrics:
        if metric.type in ("counter", "histogram"):
            yield from (sample for sample in metric.samples if not sample.name.endswith("_created"))


def _key(sample: Sample) -> str:
    return sample.name + "".join(f" {name}={value}" for name, value in sample.labels.items())


_REFERENCE = """# Metrics

Generated by `make docs` from `pkd_dist/telemetry/metrics.py`. Alert rules, recording rules, a dashboard and the discovery of
runs by Prometheus are described in [monitoring/](../monitoring/README.md).

The first rank of each node serves its metrics at `http://{host}:{port}/metrics` (`metrics.host`, `metrics.port`). All values are
those of that process. Losses, samples, tokens and evaluations cover all ranks and are the same on every node: use the value of
one node, or `max`, not `sum`.

Counters and histograms never fall. A resumed run, on any host, continues from the last scrape or the last checkpoint, whichever
is later (`RUN/counters/`). Steps repeated after a resume may count again. Gauges such as `pkd_step` and `pkd_epoch` show the
current position and may fall. They carry the stage; the host of a series is the label `host` of `pkd_info`, joined on `instance`.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
{rows}

Buckets of `pkd_step_seconds`: {buckets} s.

## Process metrics

| metric | type | meaning |
| --- | --- | --- |
{process}
"""


def reference(host: str, port: int, stages: Sequence[str], loss_terms: Sequence[str]) -> str:
    """Return docs/metrics.md: all metrics as Markdown.

    Args:
        host, port: defaults of `metrics.host` and `metrics.port`.
        stages: values of the label `stage`.
        loss_terms: values of the label `term`.
    """
    values = {"stage": stages, "term": loss_terms}

    def described(label: str, text: str) -> str:
        listed = ", ".join(f"`{value}`" for value in values.get(label, ()) if "`" not in text)
        return f"`{label}`: {text}" + (f": {listed}" if listed else "")

    metrics = RunMetrics()
    rows = [
        f"| `{m.name}` | {m.kind} | {'; '.join(described(*label) for label in m.labels.items())} | {m.help} |"
        for m in metrics.documented
    ]
    names = {m.name for m in metrics.documented}
    process = [
        f"| `{m.name}{'_total' * (m.type == 'counter')}` | {m.type} | {m.documentation.rstrip('.')} |"
        for m in metrics.registry.collect()
        if m.name not in names and f"{m.name}_total" not in names
    ]
    return _REFERENCE.format(
        host=host,
        port=port,
        rows="\n".join(rows),
        buckets=", ".join(f"{bucket:g}" for bucket in STEP_SECONDS_BUCKETS),
        process="\n".join(process),
    )
