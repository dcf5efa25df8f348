"""Prometheus metrics of a run, served by the first rank of each node."""

from __future__ import annotations

import errno
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from pkd_dist.telemetry.log import log

STEP_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_PORTS_TRIED = 50


class RunMetrics:
    """Every metric of a run, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        PlatformCollector(registry=r)
        self.info = Gauge(
            "pkd_info",
            "Constant 1; its labels say what runs",
            ["version", "run", "task", "world_size", "precision"],
            registry=r,
        )
        self.stage = Gauge("pkd_stage", "1 for the stage that runs now, 0 for the others", ["stage"], registry=r)
        self.step = Gauge("pkd_step", "Optimizer steps done", registry=r)
        self.epoch = Gauge("pkd_epoch", "Epochs done, fractional", registry=r)
        self.samples = Counter("pkd_samples_total", "Training examples seen by all ranks", registry=r)
        self.tokens = Counter("pkd_tokens_total", "Training tokens seen by all ranks, padding left out", registry=r)
        self.step_seconds = Histogram(
            "pkd_step_seconds", "Seconds of one optimizer step", buckets=STEP_SECONDS_BUCKETS, registry=r
        )
        self.loss = Gauge("pkd_loss", "Loss of the last step", ["term"], registry=r)
        self.learning_rate = Gauge("pkd_learning_rate", "Learning rate of the last step", registry=r)
        self.grad_norm = Gauge("pkd_grad_norm", "Global gradient norm of the last step, before clipping", registry=r)
        self.loss_scale = Gauge("pkd_loss_scale", "Loss scale; 1 where none is used", registry=r)
        self.cache_rows = Counter(
            "pkd_cache_rows_total", "Rows written to the teacher's cache by this node's first rank", registry=r
        )
        self.cache_expected = Gauge("pkd_cache_rows_expected", "Rows that this rank has to write", registry=r)
        self.checkpoint_time = Gauge(
            "pkd_checkpoint_last_success_timestamp_seconds", "When the last checkpoint was committed", registry=r
        )
        self.checkpoint_seconds = Gauge("pkd_checkpoint_seconds", "Seconds that the last checkpoint took", registry=r)
        self.eval_metric = Gauge("pkd_eval_metric", "Metrics of the last evaluation", ["split", "metric"], registry=r)
        self.nonfinite = Counter(
            "pkd_nonfinite_total", "Steps stopped for a loss or gradient that is not finite", registry=r
        )
        self.preemptions = Counter(
            "pkd_preemptions_total", "Stop signals that ended a run with a checkpoint", registry=r
        )
        self.data_wait = Counter("pkd_data_wait_seconds_total", "Seconds in which training waited for data", registry=r)

    def serve(self, host: str, port: int) -> tuple[Any, int] | None:
        """Serves the registry at http://host:port/metrics, on the next free port where that one is taken.

        Returns:
            The server and its port; None where no port could be had (the run goes on).
        """
        candidates = range(port, min(port + _PORTS_TRIED, 65536)) if port else range(1)
        for candidate in candidates:
            try:
                server, _ = start_http_server(candidate, addr=host, registry=self.registry)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    log.warning(
                        "metrics: cannot listen on %s:%d (%s); going on without them", host, candidate, error.strerror
                    )
                    return None
                continue
            chosen = int(server.server_port)
            if port and chosen != port:
                log.info("metrics: port %d is in use; serving on %d instead", port, chosen)
            return server, chosen
        log.warning("metrics: ports %d to %d are all in use; going on without them", port, candidates[-1])
        return None
