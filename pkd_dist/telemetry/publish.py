"""What the first rank of a node does with its metrics: serves them, says where, and pushes the last ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import push_to_gateway

from pkd_dist.config.schema import Metrics
from pkd_dist.telemetry import discovery
from pkd_dist.telemetry.endpoint import Access, serve
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics

PUSHED_JOB = "pkd_last"
"""The label `job` of what is pushed: not that of what is scraped, which it would collide with."""
_PUSH_SECONDS = 5.0


class Publication:
    """A run's metrics of one node while they are public; `push` and `close` never raise."""

    def __init__(self, metrics: RunMetrics, config: Metrics, access: Access, run: Path, node: int):
        self._metrics, self._config, self._run, self._node = metrics, config, run, node
        self._told = False
        self._target: discovery.Target | None = None
        self._endpoint = serve(metrics.registry, config.host, config.port, access)
        if self._endpoint is None:
            return
        port, https = self._endpoint.port, access.tls is not None
        host = f"[{config.host}]" if ":" in config.host else config.host
        log.info("metrics: %s://%s:%d/metrics", "https" if https else "http", host, port)
        if config.discovery_dir:
            try:
                self._target = discovery.Target(Path(config.discovery_dir), run, node, config.host, port, https)
            except BaseException:
                self._endpoint.close()
                raise

    def push(self) -> None:
        """Hands the values of now to the Pushgateway, where there is one; says it once where that fails."""
        if not self._config.pushgateway:
            return
        group = {"run": str(self._run.absolute()), "node": str(self._node)}
        group["instance"] = discovery.instance(self._run, self._node)
        try:
            push_to_gateway(self._config.pushgateway, PUSHED_JOB, self._metrics.registry, group, _PUSH_SECONDS)
        except Exception as error:  # whatever it is, it must not end a run
            say = log.debug if self._told else log.warning
            say("metrics: nothing could be pushed to %s (%s); going on", self._config.pushgateway, error)
            self._told = True

    def close(self) -> None:
        self._metrics.note()
        self.push()
        if self._target:
            self._target.close()
        if self._endpoint:
            self._endpoint.close()


@contextlib.contextmanager
def published(
    metrics: RunMetrics, config: Metrics, access: Access, run: Path, node: int | None
) -> Iterator[Publication | None]:
    """Makes the metrics public for the block.

    Args:
        access: of the endpoint.
        run: run folder.
        node: counted from 0, on its first rank; None: this rank publishes nothing.

    Raises:
        UserError: `metrics.discovery_dir` cannot be written.
    """
    if node is None or not config.enabled:
        yield None
        return
    publication = Publication(metrics, config, access, run, node)
    try:
        yield publication
    finally:
        publication.close()
