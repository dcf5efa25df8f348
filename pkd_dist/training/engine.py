"""The DeepSpeed engine: sharded optimizer, precision, clipping, and one learning-rate schedule.

The only importer of deepspeed. What DeepSpeed's JSON leaves to the run's YAML (batch, accumulation, learning rate,
clipping) is filled in here; what it leaves to the device (`torch_autocast.enabled: "auto"`) is decided here.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from pkd_dist.data.batches import Batch
from pkd_dist.distributed.shared_memory import open_shared_memory
from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, UserError
from pkd_dist.telemetry.log import log
from pkd_dist.training.graph_step import GraphStep
from pkd_dist.training.optimizer_state import OptimizerState, persistent_buffers


@dataclass(frozen=True)
class Optimization:
    """What the run's YAML says of the optimizer. `total_steps` are optimizer steps of the whole run."""

    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float
    adam_epsilon: float
    total_steps: int
    batch_size: int
    micro_batch_size: int
    accumulation: int


def resolve_precision(deepspeed: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """Decides `torch_autocast.enabled: "auto"` for a device.

    Returns:
        The JSON with nothing left to decide, and the precision's name: float32, autocast bfloat16, bfloat16, float16, ...
    """
    config = dict(deepspeed)
    autocast = config.get("torch_autocast")
    if isinstance(autocast, dict):
        enabled, dtype = autocast.get("enabled", False), autocast.get("dtype", "auto")
        if enabled == "auto":
            enabled = device.type == "cuda" or _cpu_has_bfloat16()
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cpu" or torch.cuda.is_bf16_supported() else "float16"
        config["torch_autocast"] = {**autocast, "enabled": bool(enabled), "dtype": dtype}
        if enabled:
            return config, f"autocast {dtype}"
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if config.get(key, {}).get("enabled"):
            return config, name
    return config, "float32"


def _cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this CPU."""
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))


@contextlib.contextmanager
def _quiet() -> Any:
    """DeepSpeed reports its own set-up through a logger and warnings; a run's user has no use for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_in_background() -> None:
    """Begins to load DeepSpeed, which takes seconds: a host has them while a GPU is at work."""

    def load() -> None:
        with contextlib.suppress(Exception):  # which the engine meets again
            _load()
            importlib.import_module("deepspeed.compile.backend")  # its engine asks for it when it starts

    threading.Thread(target=load, daemon=True).start()


def _load() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return importlib.import_module("deepspeed")


class Engine:
    """One module under DeepSpeed.

    Args:
        module: trained in place; moved to the device.
        deepspeed: the DeepSpeed JSON, precision resolved.
        plan: see `Optimization`.
        world: the ranks.
    """

    def __init__(self, module: nn.Module, deepspeed: dict[str, Any], plan: Optimization, world: World):
        ds = _load()
        from deepspeed import ops

        if world.device.type == "cpu":
            ops.__dict__["__compatible_ops__"] = collections.defaultdict(bool)  # nothing is compiled on a CPU
        self.loss_scale_expected = bool(deepspeed.get("fp16", {}).get("enabled"))
        deepspeed = _for_ranks(deepspeed, world.size)
        self.stage = int(deepspeed.get("zero_optimization", {}).get("stage", 0))
        offload = "offload_optimizer" in deepspeed.get("zero_optimization", {})
        self._clips = self.stage == 0 and not _is_half(deepspeed) and not offload
        self._scale = float(world.size * plan.accumulation)
        self._plan, self._device, self._ranks = plan, world.device, world.size
        config = {
            **deepspeed,
            "train_batch_size": plan.micro_batch_size * plan.accumulation * world.size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_clipping": 0.0 if self._clips else plan.max_grad_norm,
            "steps_per_print": 10**9,
            "zero_force_ds_cpu_optimizer": False,
        }
        autocast, self._low = config.pop("torch_autocast", {}), None
        if autocast.get("enabled"):
            # Around the forward pass alone. DeepSpeed's own would also send gradients in the low precision, through
            # buckets per dtype: on a CPU that costs more than the whole forward pass.
            self._low = getattr(torch, autocast["dtype"])
            autocasting = torch.autocast(world.device.type, dtype=self._low)
            module.forward = autocasting(module.forward)  # type: ignore[method-assign]
        self._trained = [p for p in module.parameters() if p.requires_grad]
        decay = [p for n, p in module.named_parameters() if p.requires_grad and _decays(n, p)]
        plain = [p for n, p in module.named_parameters() if p.requires_grad and not _decays(n, p)]
        self._adam = torch.optim.AdamW(
            [{"params": decay, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=plan.learning_rate,
            eps=plan.adam_epsilon,
            fused=not offload,
        )
        self._factor = linear_warmup(plan.total_steps, plan.warmup_ratio)
        try:
            with _quiet():
                self._engine, *_ = ds.initialize(
                    model=module, optimizer=self._adam, config=config, dist_init_required=False
                )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(
                f"train.deepspeed: DeepSpeed refuses the JSON's {error.title}: {key}: {first['msg']}"
            ) from None
        if world.device.type == "cpu":
            _share_memory(world)
        if world.size == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = False  # it would flatten all gradients, and copy them back
        self.module = module
        self.state = OptimizerState(module, self._engine.optimizer, self._adam, self.stage, world.rank, world.size)

    def graph_step(
        self, losses: Callable[[nn.Module, Batch], dict[str, torch.Tensor]], terms: Sequence[str]
    ) -> GraphStep | None:
        """The whole step as one launch, in place of `backward` and `step`, where a lone rank's GPU can do it; else None.

        Args:
            losses, terms: see `GraphStep`.
        """
        if self._device.type != "cuda" or self._ranks > 1:
            return None
        if self._plan.accumulation > 1 or not self._clips:
            log.info(
                "a step is many launches, because %s", "micro-batches are accumulated (train.micro_batch_size)"
                if self._clips else "ZeRO 3, offloading and weights in half precision are DeepSpeed's (train.deepspeed)",
            )  # fmt: skip
            return None
        self.state.allocate()
        return GraphStep(
            self.module, self._adam, losses, terms, self._plan.max_grad_norm, self._device, self._low, capture=True
        )

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates gradients of one micro-batch's share of the global mean loss (a sum over weighted examples)."""
        self._engine.backward(loss * self._scale)  # DeepSpeed divides by accumulation and averages over ranks

    def micro_step(self) -> None:
        """Ends a micro-batch that is not the last of its step."""
        self._engine.step()

    def step(self, step: int) -> tuple[float, float]:
        """Applies the update of a whole step; returns the gradient's norm before clipping, and the learning rate.

        Args:
            step: optimizer steps done before: the schedule is a function of it.

        Raises:
            DivergedError: the norm is not finite; no weight was changed. (Under fp16 a step may be skipped while the
                loss scale falls: then the norm returned is infinite.)
        """
        rate = self.rate(step)
        for group in self._adam.param_groups:
            group["lr"] = rate
        return self._update(), rate

    def rate(self, step: int) -> float:
        """The learning rate of the step that comes after `step` others."""
        return self._plan.learning_rate * self._factor(step)

    def _update(self) -> float:
        if self._clips:
            total = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
            norm = float(total)
            self._require_finite(norm)
            limit = self._plan.max_grad_norm
            # the optimizer divides by it in its own pass over the gradients
            self._adam.grad_scale = (total + 1e-6) / limit if norm > limit > 0 else None  # type: ignore[attr-defined]
            self._engine.step()
            return norm
        skipped = self._engine.skipped_steps
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        if self._engine.skipped_steps > skipped:
            if self.state.loss_scale_can_fall:
                return float("inf")
            self._require_finite(float("nan"))
        self._require_finite(norm)
        return norm

    @staticmethod
    def _require_finite(norm: float) -> None:
        if not torch.isfinite(torch.tensor(norm)):
            raise DivergedError("the gradient is not finite")

    @property
    def loss_scale(self) -> float:
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0)) if self.loss_scale_expected else 1.0

    def decay(self, steps: int) -> float:
        """What AdamW's decay alone makes of a weight in so many steps."""
        rates = self._plan.learning_rate * np.array([self._factor(t) for t in range(steps)])
        return float(np.prod(1.0 - rates * self._plan.weight_decay))

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer whole, in float32 on the CPU, from the float32 master weights; collective."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.module.named_parameters():
            full: torch.Tensor = parameter
            if parameter.requires_grad:
                full = safe_get_full_fp32_param(parameter) if self.stage > 0 else self.state.master(parameter)
            elif self.stage == 3:
                with GatheredParameters([parameter]):
                    full = parameter.detach().clone()
            weights[name] = full.detach().float().cpu().contiguous().clone()
        for name, buffer in persistent_buffers(self.module):
            weights[name] = buffer.detach().cpu().contiguous().clone()
        return weights


def _share_memory(world: World) -> None:
    """Has DeepSpeed sum and gather through shared memory where all ranks have it in common; collective."""
    from deepspeed.comm import ReduceOp, comm

    shared = open_shared_memory(world)
    if shared is None:
        return
    backend: Any = comm.cdb
    reduce, gather = type(backend).all_reduce, type(backend).all_gather_into_tensor

    def all_reduce(tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if async_op or op != ReduceOp.SUM or not whole(group) or not shared.takes(tensor):
            return reduce(backend, tensor, op, group, async_op)
        return shared.sum(tensor)

    def all_gather_into_tensor(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or not whole(group) or not (shared.takes(output_tensor) and shared.takes(input_tensor)):
            return gather(backend, output_tensor, input_tensor, group, async_op)
        return shared.gather(output_tensor, input_tensor)

    def whole(group: Any) -> bool:
        return bool(backend.get_world_size(group) == world.size)

    backend.all_reduce, backend.all_gather_into_tensor = all_reduce, all_gather_into_tensor


def _for_ranks(deepspeed: dict[str, Any], ranks: int) -> dict[str, Any]:
    """ZeRO 1 and 2 shard optimizer state and gradients. One rank has nothing to shard: stage 0 is the same computation,
    without copies of all gradients and weights."""
    zero = deepspeed.get("zero_optimization", {})
    needed = "offload_optimizer" in zero or _is_half(deepspeed)
    if ranks > 1 or needed or zero.get("stage", 0) not in (1, 2):
        return deepspeed
    return {**deepspeed, "zero_optimization": {"stage": 0}}


def _is_half(deepspeed: dict[str, Any]) -> bool:
    """Whether weights are in half precision, and DeepSpeed keeps masters of them."""
    return any(deepspeed.get(half, {}).get("enabled") for half in ("fp16", "bf16"))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """AdamW's decay is for matrices: not for biases, not for LayerNorm."""
    return parameter.ndim > 1 and not name.endswith("bias")


def linear_warmup(total_steps: int, ratio: float) -> Callable[[int], float]:
    """The factor of the learning rate at step 0, 1, ...: up to 1 over the first `ratio` of the steps, then down to 0."""
    warmup = int(total_steps * ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / max(1, warmup)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

    return factor
