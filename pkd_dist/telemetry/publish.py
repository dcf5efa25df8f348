"""Publish the metrics of a node: serve them, announce the address to Prometheus, push the last values to a Pushgateway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import delete_from_gateway, push_to_gateway

from pkd_dist.config.schema import Metrics
from pkd_dist.errors import Preempted, UserError
from pkd_dist.files import is_denied, is_full
from pkd_dist.network import host_and_port
from pkd_dist.telemetry import discovery
from pkd_dist.telemetry.endpoint import Access, serve
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics

PUSHED_JOB = "pkd_last"
"""Label `job` of pushed values. It differs from that of scraped values, which would collide otherwise."""
_PUSH_TIMEOUT_SECONDS = 5.0


class Publisher:
    """Publishes the metrics of a node until `close`. `push` and `close` never raise."""

    def __init__(self, metrics: RunMetrics, config: Metrics, access: Access, run: Path, node: int, nodes: int):
        self._metrics, self._config, self._run, self._node = metrics, config, run, node
        self._push_failed = False
        self._target: discovery.Target | None = None
        name = discovery.target_name(run, node)
        self._endpoint = serve(metrics.registry, config.host, config.port, access, name)
        if self._endpoint is None:
            return
        port, https = self._endpoint.port, access.tls is not None
        log.info("metrics: %s://%s/metrics", "https" if https else "http", host_and_port(config.host, port))
        if config.discovery_dir:
            try:
                self._target = discovery.Target(Path(config.discovery_dir), run, node, config.host, port, https)
            except BaseException:
                self._endpoint.close()
                raise
        if node == 0:
            self._forget_nodes(nodes)

    def _forget_nodes(self, nodes: int) -> None:
        """Remove what nodes that the run had and has no more left for Prometheus: nobody else would, and their alerts would stay."""
        if self._config.discovery_dir:
            discovery.withdraw(Path(self._config.discovery_dir), self._run, first_node=nodes)
        if self._config.pushgateway:
            numbers = [file.stem.removeprefix("node-") for file in (self._run / "counters").glob("node-*.json")]
            for gone in [int(number) for number in numbers if number.isdigit() and int(number) >= nodes]:
                with contextlib.suppress(Exception):  # no failure of a gateway may end a run
                    delete_from_gateway(self._config.pushgateway, PUSHED_JOB, self._group(gone), _PUSH_TIMEOUT_SECONDS)

    def _group(self, node: int) -> dict[str, str]:
        """Return the labels that a gateway keeps the values of a node under."""
        return {"run": str(self._run.absolute()), "node": str(node), "instance": discovery.instance(self._run, node)}

    def push(self) -> bool:
        """Push the current values to the Pushgateway, if one is configured, and return whether it has them; warn once if not."""
        if not self._config.pushgateway:
            return False
        group, registry = self._group(self._node), self._metrics.registry
        try:
            push_to_gateway(self._config.pushgateway, PUSHED_JOB, registry, group, _PUSH_TIMEOUT_SECONDS)
        except Exception as error:  # no failure of a gateway may end a run
            report = log.debug if self._push_failed else log.warning
            report("metrics: cannot push to %s (%s); the run continues", self._config.pushgateway, error)
            self._push_failed = True
            return False
        return True

    def close(self, status: int) -> None:
        """Push the last values and stop. The target file of a failed run stays if no gateway has learned of the failure.

        Args:
            status: exit status of the run.
        """
        self._metrics.show_end(status)
        self._metrics.save_counters()
        pushed = self.push()
        if self._target:
            self._target.close(remove=pushed or status in (0, Preempted.exit_status))
        if self._endpoint:
            self._endpoint.close()


@contextlib.contextmanager
def publishing(
    metrics: RunMetrics, config: Metrics, access: Access, run: Path, node: int | None, nodes: int = 1
) -> Iterator[Publisher | None]:
    """Publish the metrics for the duration of the block.

    Args:
        access: TLS and authentication of the endpoint.
        run: run folder.
        node: index of this node on its first rank; None on other ranks, which publish nothing.
        nodes: number of nodes.

    Raises:
        UserError: `metrics.discovery_dir` is not writable.
    """
    if node is None or not config.enabled:
        yield None
        return
    publisher = Publisher(metrics, config, access, run, node, nodes)
    status = 0
    try:
        yield publisher
    except KeyboardInterrupt:
        status = Preempted.exit_status
        raise
    except BaseException as error:
        ours = UserError.exit_status if is_full(error) or is_denied(error) else 1  # as the launcher says it
        status = getattr(error, "exit_status", ours)
        raise
    finally:
        publisher.close(status)
