"""The process group: the ranks of a run and the few collectives that the stages need.

The only user of `torch.distributed` (DeepSpeed's engine aside). Who is who stands in `ranks.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist

from pkd_dist.ranks import Ranks, free_port

T = TypeVar("T")
_DEFAULT_PORT = 29500


class World:
    """The ranks of a run and what they do together. Every method but the properties is collective.

    Args:
        ranks: this process's place.
        timeout_seconds: how long a collective waits for the others.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float = 600.0):
        self.rank, self.size, self.local_rank = ranks.rank, ranks.world_size, ranks.local_rank
        self.launcher, self.local_size = ranks.launcher, ranks.local_world_size
        if torch.cuda.is_available():
            self.device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            if "OMP_NUM_THREADS" not in os.environ or ranks.world_size > 1:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
        # DeepSpeed reads these even where the group exists already.
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.local_rank), "WORLD_SIZE": str(self.size)}
        if ranks.launcher == "python":
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        elif ranks.launcher == "srun":
            os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
            os.environ.setdefault("MASTER_PORT", str(_DEFAULT_PORT + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))
        torch_dist.init_process_group(
            "cuda:nccl,cpu:gloo" if self.device.type == "cuda" else "gloo",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        # Objects and small host-side values always travel over gloo, so that they never wait for a GPU stream.
        self._host = torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def node_main(self) -> bool:
        return self.local_rank == 0

    def barrier(self) -> None:
        torch_dist.barrier(group=self._host)

    def broadcast(self, value: T, source: int = 0) -> T:
        """`value` of the source rank, on every rank."""
        box = [value]
        torch_dist.broadcast_object_list(box, src=source, group=self._host)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        out: list[Any] = [None] * self.size
        torch_dist.all_gather_object(out, value, group=self._host)
        return out

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its value on every rank; an exception is raised on every rank."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except Exception as error:  # handed on to every rank below
                outcome = (None, error)
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns its own value; if one fails, every rank raises the first one's exception."""
        mine: Exception | None = None
        value: T | None = None
        try:
            value = work()
        except Exception as error:
            mine = error
        for failure in self.gather(mine):
            if failure is not None:
                raise failure
        return value  # type: ignore[return-value]

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Like `together`, and returns every rank's value, in rank order, on every rank."""
        return self.gather(self.together(work))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum over ranks of a small float64 array."""
        tensor = torch.from_numpy(np.asarray(values, dtype=np.float64).copy())
        torch_dist.all_reduce(tensor, group=self._host)
        return tensor.numpy()

    def gather_rows(self, rows: np.ndarray, positions: np.ndarray, total: int) -> np.ndarray:
        """Puts every rank's rows at their positions in one array of `total` rows, on every rank.

        Args:
            rows: (n_rank, ...) of this rank.
            positions: (n_rank,) where they belong; over all ranks each of 0..total-1 exactly once.
        """
        out = np.empty((total, *rows.shape[1:]), dtype=rows.dtype)
        seen = np.zeros(total, dtype=bool)
        for part, where in self.gather((rows, positions)):
            assert not seen[where].any(), "an example was scored twice"
            out[where], seen[where] = part, True
        assert seen.all(), "an example was not scored"
        return out

    def close(self) -> None:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
