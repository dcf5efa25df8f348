"""The metrics of a run, as Prometheus wants them, and the counters that outlive a process.

Each metric is declared once, in `RunMetrics`; docs/metrics.md, the alert rules' tests and the dashboard are made from or
held against that. Every value is of one process: the first rank of a node.

A counter that falls is taken for a process that started from nothing, and all it counts from then on for new. So whatever a
scraper is told, and whatever a checkpoint holds, is first written to a file, and the next process counts on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pkd_dist.metric_names import MAIN_METRIC, METRICS
from pkd_dist.telemetry.log import log

STEP_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
EVAL_METRICS = (MAIN_METRIC, *METRICS)


@dataclass(frozen=True)
class Described:
    """A metric as documented: `labels` says of each label which values it takes."""

    name: str
    kind: str
    help: str
    labels: dict[str, str]


class RunMetrics:
    """Every metric of a run, in a registry of its own.

    Args:
        counters: file in which counters outlive the process; None: they start from 0.
    """

    def __init__(self, counters: Path | None = None) -> None:
        self.described: list[Described] = []
        self._own = CollectorRegistry()
        self.info = self._gauge(
            "pkd_info",
            "Constant 1; its labels say what runs",
            version="of pkd_dist",
            run="the run folder's absolute path",
            task="`task.name`",
            world_size="number of ranks",
            precision="of the training, such as `autocast bfloat16`",
            slurm_job="the job's id; empty outside SLURM",
        )
        self.stage = self._gauge(
            "pkd_stage",
            "1 for the stage that runs now, 0 for the others",
            stage="`data`, `teacher`, `cache`, `init`, `distill`, `evaluate`, `export`, `report`",
        )
        self.step = self._gauge("pkd_step", "Optimizer steps done in the training that runs now, or ran last")
        self.epoch = self._gauge("pkd_epoch", "Epochs done in that training, fractional")
        self.samples = self._counter("pkd_samples_total", "Training examples seen by all ranks; alike on every node")
        self.tokens = self._counter(
            "pkd_tokens_total", "Training tokens seen by all ranks, padding left out; alike on every node"
        )
        self.step_seconds = Histogram(
            "pkd_step_seconds", "Seconds of one optimizer step", buckets=STEP_SECONDS_BUCKETS, registry=self._own
        )
        self._describe("pkd_step_seconds", "histogram", "Seconds of one optimizer step", {})
        self.loss = self._gauge(
            "pkd_loss", "Loss of the last step over the global batch", term="`total`, `ce`, `ds`, `pt`"
        )
        self.learning_rate = self._gauge("pkd_learning_rate", "Learning rate of the last step")
        self.grad_norm = self._gauge(
            "pkd_grad_norm", "Global gradient norm of the last step, before clipping; +Inf where float16 overflowed"
        )
        self.loss_scale = self._gauge("pkd_loss_scale", "Loss scale; 1 where none is used")
        self.cache_rows = self._counter("pkd_cache_rows_total", "Rows written to the teacher's cache by this process")
        self.cache_expected = self._gauge(
            "pkd_cache_rows_expected", "What pkd_cache_rows_total will be once this process has written its part"
        )
        self.checkpoint_time = self._gauge(
            "pkd_checkpoint_last_success_timestamp_seconds",
            "When the last checkpoint was committed, Unix time; 0: none yet",
        )
        self.checkpoint_seconds = self._gauge("pkd_checkpoint_seconds", "Seconds that the last checkpoint took")
        self.eval_metric = self._gauge(
            "pkd_eval_metric",
            "Metrics of the last evaluation: of the training that runs, or after it of the finished student",
            split="`dev`; after the stage evaluate also every other split with labels",
            metric=f"those that the task has of {', '.join(f'`{name}`' for name in EVAL_METRICS)}",
        )
        self.nonfinite = self._counter(
            "pkd_nonfinite_total", "Times that a loss or gradient was not finite, which ends the run with status 3"
        )
        self.preemptions = self._counter(
            "pkd_preemptions_total", "Times that a stop signal ended the run with status 75, to be gone on with"
        )
        self.gpu_memory = self._gauge(
            "pkd_gpu_memory_bytes",
            "Memory of this process's GPU, read at the scrape; no sample without a GPU",
            kind="torch's: `allocated` (in tensors), `peak` (the most of that so far), `reserved` (its pool); the "
            "device's: `used` (by all processes), `total`",
        )
        self.data_wait = self._counter("pkd_data_wait_seconds_total", "Seconds in which training waited for its batch")
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_CountingOn(self._own, counters))
        self.cache_expected.set(self.value("pkd_cache_rows_total"))  # no more, until a build says so

    def _describe(self, name: str, kind: str, text: str, labels: dict[str, str]) -> tuple[str, str, list[str]]:
        self.described.append(Described(name, kind, text, labels))
        return name, text, list(labels)

    def _gauge(self, name: str, text: str, **labels: str) -> Gauge:
        return Gauge(*self._describe(name, "gauge", text, labels), registry=self._own)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(*self._describe(name, "counter", text, {}), registry=self._own)

    def show_evaluation(self, split: str, figures: Mapping[str, Any]) -> None:
        """Sets `pkd_eval_metric` of a split to those of `figures` that are `EVAL_METRICS`."""
        for name in EVAL_METRICS:
            if name in figures:
                self.eval_metric.labels(split=split, metric=name).set(figures[name])

    def show_past(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Sets the gauges to where a training that is over left them.

        Args:
            lines: of its metrics file.
        """
        for line in lines:
            if "split" in line:
                self.show_evaluation(line["split"], line)
                continue
            self.step.set(line["step"])
            self.epoch.set(line["epoch"])
            for key, value in line.items():
                if key.startswith("loss") and key != "loss_scale":
                    self.loss.labels(term=key.removeprefix("loss_") if key != "loss" else "total").set(value)
            self.learning_rate.set(line["learning_rate"])
            self.grad_norm.set(line["grad_norm"])
            self.loss_scale.set(line.get("loss_scale", 1.0))

    def value(self, name: str) -> float:
        """The value that a scrape gives for a metric without labels, earlier processes counted in."""
        value = self.registry.get_sample_value(name)
        assert value is not None, name
        return value

    def note(self) -> None:
        """Writes the counters to their file, as a scrape does: the next process counts on from here."""
        with contextlib.suppress(Exception):  # such as a GPU that answers no more
            for _ in self.registry.collect():
                pass

    def watch_gpu(self, device: Any) -> None:
        """Reads the memory of a CUDA device at each scrape."""
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


class _CountingOn(Collector):
    """Hands out a registry's metrics, to counters and histograms what earlier processes counted added; and notes them.

    Args:
        file: written before a value is handed out that it does not hold; None: nothing is added or noted. One that
            cannot be read, or is of other metrics, counts for nothing.
    """

    def __init__(self, registry: CollectorRegistry, file: Path | None) -> None:
        self._registry, self._file, self._one = registry, file, threading.RLock()
        now = {_key(sample): 0.0 for sample in self._counted(registry.collect())}
        before: Any = None
        if file is not None:
            with contextlib.suppress(OSError, ValueError):
                before = json.loads(file.read_text())
        usable = isinstance(before, dict) and before.keys() == now.keys()
        self._before: dict[str, float] = before if usable else now
        self._noted: dict[str, float] = dict(self._before)

    @staticmethod
    def _counted(metrics: Iterable[Metric]) -> Iterator[Sample]:
        for metric in metrics:
            if metric.type in ("counter", "histogram"):
                yield from (sample for sample in metric.samples if not sample.name.endswith("_created"))

    def describe(self) -> Iterable[Metric]:
        return self._registry.collect()

    def collect(self) -> Iterable[Metric]:
        with self._one:  # scrapes and pushes come from threads of their own
            return self._collect()

    def _collect(self) -> list[Metric]:
        metrics = list(self._registry.collect())
        total: dict[str, float] = {}
        for metric in metrics:
            if metric.type in ("counter", "histogram"):
                # without `_created`, which would be when this process began
                metric.samples = [
                    sample._replace(value=sample.value + self._before[_key(sample)])
                    for sample in self._counted([metric])
                ]
                total |= {_key(sample): sample.value for sample in metric.samples}
        if self._file is not None and total != self._noted:
            self._note(self._file, total)
        return metrics

    def _note(self, file: Path, total: dict[str, float]) -> None:
        """Without a sync: what ends a process does not end what the kernel holds for the disk."""
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(total, indent=1) + "\n")
            os.replace(temporary, file)
            self._noted = total
        except OSError as error:
            log.debug("metrics: the counters could not be written: %s", error)


def _key(sample: Sample) -> str:
    return sample.name + "".join(f" {name}={value}" for name, value in sample.labels.items())


_REFERENCE = """# Metrics

Generated by `make docs` from `pkd_dist/telemetry/metrics.py`. [monitoring/](../monitoring/README.md) has what reads them:
alert and recording rules, a dashboard, and how Prometheus finds a run.

The first rank of each node serves them at `http://{host}:{port}/metrics` (`metrics.host`, `metrics.port`). Every value is of
that process; losses, samples, tokens and evaluations are over all ranks and alike on every node: take one, or `max`, not a
`sum`.

Counters and histograms never fall: a run that is stopped or killed and goes on, here or on another host, counts on from
what was last scraped or, where that is later, from its checkpoint (`RUN/counters/`). Steps that it does again, because they
came after its checkpoint, are work and may count again. `pkd_step`, `pkd_epoch` and the other gauges say where the run
stands, and may fall.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
{rows}

`pkd_step_seconds` has the buckets {buckets} s.

## Of the process

| metric | type | meaning |
| --- | --- | --- |
{process}
"""


def reference(host: str, port: int) -> str:
    """The metrics as Markdown: what `docs/metrics.md` holds."""
    metrics = RunMetrics()
    rows = [
        f"| `{m.name}` | {m.kind} | {'; '.join(f'`{name}`: {values}' for name, values in m.labels.items())} | {m.help} |"
        for m in metrics.described
    ]
    documented = {m.name for m in metrics.described}
    process = [
        f"| `{m.name}{'_total' * (m.type == 'counter')}` | {m.type} | {m.documentation.rstrip('.')} |"
        for m in metrics.registry.collect()
        if m.name not in documented and f"{m.name}_total" not in documented
    ]
    return _REFERENCE.format(
        host=host,
        port=port,
        rows="\n".join(rows),
        buckets=", ".join(f"{bucket:g}" for bucket in STEP_SECONDS_BUCKETS),
        process="\n".join(process),
    )
