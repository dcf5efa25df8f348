"""The engine of several ranks, and of what only DeepSpeed has. The only module that imports deepspeed.

The run's YAML fills in what DeepSpeed's JSON leaves to it: batch size, accumulation, learning rate and clipping.

Three places depend on DeepSpeed's internals (0.19.8): `SharedMemoryBackend`, `_install_backend`, and the attributes that
`optimizer_state.py` reads.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, TypeAlias

import deepspeed
import deepspeed.compile.backend  # noqa: F401 - the engine imports it when it starts; here it can load in the background
import torch
from deepspeed.comm import ReduceOp, comm
from deepspeed.comm.backend import Backend
from deepspeed.comm.torch import TorchBackend, has_all_reduce_coalesced, has_coalescing_manager
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from pydantic import ValidationError
from torch import nn

from pkd_dist.distributed.shared_memory import SharedMemory, open_shared_memory
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.limits import subnormals_are_zero
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.outputs import Outputs
from pkd_dist.training.job import DeepSpeedJson
from pkd_dist.training.optimization import (
    Schedule,
    autocast,
    clip_gradients,
    make_adamw,
    require_finite,
    set_learning_rate,
)
from pkd_dist.training.optimizer_state import FlatState, OptimizerState, ReplicatedState, ShardedState, full_weights

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing deepspeed sets WARNING
_NEVER = 10**9
Group: TypeAlias = Any
"""A process group of torch.distributed, which only `distributed/` imports; None: all ranks."""
Work: TypeAlias = Any
"""A collective in progress; None: done."""


class DeepSpeedEngine:
    """One module in training under DeepSpeed; see `engine.Engine`.

    Args:
        module: trained in place; moved to the device.
        config: the DeepSpeed JSON without "auto" values.

    Raises:
        UserError: DeepSpeed rejects the JSON.
    """

    def __init__(self, module: Encoder, config: DeepSpeedJson, schedule: Schedule, world: World):
        zero = config.get("zero_optimization", {})
        self.module, self.schedule, self.stage = module, schedule, int(zero.get("stage", 0))
        settings = schedule.settings
        self._fp16 = bool(config.get("fp16", {}).get("enabled"))
        half = self._fp16 or bool(config.get("bf16", {}).get("enabled"))
        offload = "offload_optimizer" in zero
        self._clips = self.stage == 0 and not half and not offload  # else DeepSpeed clips
        self._scale = float(world.size * schedule.gradient_accumulation_steps)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._adam = make_adamw(module, settings, fused=not offload)
        config = {
            **config,
            "train_batch_size": schedule.micro_batch_size * schedule.gradient_accumulation_steps * world.size,
            "train_micro_batch_size_per_gpu": schedule.micro_batch_size,
            "gradient_accumulation_steps": schedule.gradient_accumulation_steps,
            "gradient_clipping": 0.0 if self._clips else settings.max_grad_norm,
            "steps_per_print": _NEVER,
            "zero_force_ds_cpu_optimizer": False,
        }
        low = config.pop("torch_autocast", {})
        dtype = getattr(torch, low["dtype"]) if low.get("enabled") else None
        if world.device.type == "cpu":
            _install_backend(world)
        self._engine = _initialize(_Autocast(module, world.device, dtype) if dtype else module, self._adam, config)
        if world.size == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = False  # it would flatten all gradients and copy them back
        self.state = self._open_state(world)

    def _open_state(self, world: World) -> OptimizerState:
        kind = ReplicatedState if self.stage == 0 else ShardedState if self.stage == 3 else FlatState
        return kind(self.module, self._adam, world.rank, world.size, self._engine.optimizer)

    @property
    def loss_scale(self) -> float | None:
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0)) if self._fp16 else None

    def __call__(self, *arguments: Any) -> Outputs:
        return self._engine(*arguments)

    def train(self) -> None:
        self._engine.train(True)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self._scale)  # DeepSpeed divides by accumulation steps and averages over ranks

    def end_micro_batch(self) -> None:
        self._engine.step()

    def step(self, step: int) -> float:
        set_learning_rate(self._adam, self.schedule.learning_rate(step))
        clipped, skipped = None, self._engine.skipped_steps
        if self._clips:
            clipped = clip_gradients(self._adam, self._trained, self.schedule.settings.max_grad_norm)
        with subnormals_are_zero():
            self._engine.step()
        if clipped is not None:
            return clipped
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        if self._engine.skipped_steps > skipped:
            norm = float("nan")
            if self.state.loss_scale_can_fall:
                return float("inf")
        require_finite(norm)
        return norm

    def full_weights(self) -> dict[str, torch.Tensor]:
        return full_weights(self.module, self._full)

    def _full(self, parameter: nn.Parameter) -> torch.Tensor:
        if not parameter.requires_grad:
            if self.stage < 3:
                return parameter
            with GatheredParameters([parameter]):
                return parameter.detach().clone()
        if isinstance(self.state, ReplicatedState):
            return self.state.master(parameter)
        return safe_get_full_fp32_param(parameter)


class _Autocast(nn.Module):
    """A module whose forward pass runs under torch's autocast.

    DeepSpeed's own `torch_autocast` would also send gradients in the low precision, through one bucket per dtype, which on
    a CPU costs more than the whole forward pass. Autocast around DeepSpeed's call has no effect on a GPU, because
    DeepSpeed turns it off (deepspeed.runtime.torch_autocast.autocast_if_enabled), so it is entered inside.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self._autocast = autocast(device, dtype)

    def forward(self, *arguments: object) -> Outputs:
        with self._autocast:
            return self.module(*arguments)


def _initialize(module: nn.Module, adam: torch.optim.AdamW, config: DeepSpeedJson) -> deepspeed.DeepSpeedEngine:
    """Return DeepSpeed's engine, without its messages about its own set-up."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=False)
        return engine
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"train.deepspeed: DeepSpeed rejects {error.title}: {key}: {first['msg']}") from None


class SharedMemoryBackend(TorchBackend):
    """DeepSpeed's communication on CPUs: torch.distributed, with large sums and gathers through shared memory.

    `TorchBackend.__init__` (deepspeed.comm.torch) would compile the extension `deepspeed_shm_comm` for inference, so this
    class sets the same attributes itself. torch.distributed is initialized already.

    Args:
        memory: of the ranks of this host; None if the ranks have none in common.
    """

    def __init__(self, world: World, memory: SharedMemory | None):
        Backend.__init__(self, name="torch")
        self.world, self._memory = world, memory
        self.shm_comm_op = None
        self.has_all_reduce_coalesced = has_all_reduce_coalesced()
        self.has_coalescing_manager = has_coalescing_manager()
        self.all_gather_function = self.get_all_gather_function()
        self.reduce_scatter_function = self.get_reduce_scatter_function()
        self.single_gpu_mode = True
        self.using_mpi = False
        self.initialized = True

    def all_reduce(
        self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM, group: Group = None, async_op: bool = False
    ) -> Work:
        memory = self._usable(group, async_op)
        if memory is None or op != ReduceOp.SUM or not memory.accepts(tensor):
            return super().all_reduce(tensor, op, group, async_op)
        memory.sum(tensor)
        return None

    def all_gather_into_tensor(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Group = None, async_op: bool = False
    ) -> Work:
        memory = self._usable(group, async_op)
        if memory is None or not (memory.accepts(output_tensor) and memory.accepts(input_tensor)):
            return super().all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        memory.gather(output_tensor, input_tensor)
        return None

    def _usable(self, group: Group, async_op: bool) -> SharedMemory | None:
        """Return the shared memory if a collective over this group may use it: synchronous, and of all ranks."""
        return None if async_op or self.get_world_size(group) != self.world.size else self._memory


def _install_backend(world: World) -> None:
    """Install `SharedMemoryBackend` as DeepSpeed's global backend; collective.

    `deepspeed.comm.comm.init_distributed` keeps a backend that it finds in `cdb`, and makes a TorchBackend otherwise.
    """
    if not (isinstance(comm.cdb, SharedMemoryBackend) and comm.cdb.world is world):
        comm.cdb = SharedMemoryBackend(world, open_shared_memory(world))
