"""The interface of an engine, and the choice between the two.

    PlainEngine       one rank: torch's AdamW, clipping and autocast
    DeepSpeedEngine   several ranks, and what only DeepSpeed has: weights in 16-bit precision with float32 masters,
                      offload, and DeepSpeed's own diagnostics

ZeRO stages have nothing to shard on one rank, so stages 0 to 3 are the plain engine there. Both read and write the same
checkpoints. DeepSpeed takes seconds to import, so it is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from typing import Any, Protocol

import torch

from pkd_dist.config.deepspeed import OWNED_BY_YAML
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.limits import cpu_has_bfloat16
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.outputs import Outputs
from pkd_dist.training.job import DeepSpeedJson
from pkd_dist.training.optimization import Schedule
from pkd_dist.training.optimizer_state import OptimizerState
from pkd_dist.training.plain_engine import PlainEngine

_PLAIN_KEYS = {
    *OWNED_BY_YAML, "torch_autocast", "bf16", "fp16", "zero_optimization", "zero_allow_untested_optimizer", "checkpoint",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients",
}  # fmt: skip
"""Keys of the DeepSpeed JSON that need no DeepSpeed on one rank: served by the plain engine, or about other ranks."""


class Engine(Protocol):
    """One module in training.

    Attributes:
        loss_scale: fp16's current loss scale; None in other precisions.
    """

    module: Encoder
    schedule: Schedule

    @property
    def state(self) -> OptimizerState: ...

    @property
    def loss_scale(self) -> float | None: ...

    def __call__(self, *arguments: Any) -> Outputs:
        """Run the module's forward pass, `Encoder.forward`, in the engine's precision."""

    def train(self) -> None:
        """Set training mode."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch's share of the global mean loss, a weighted sum over examples."""

    def end_micro_batch(self) -> None:
        """End a micro-batch that is not the last of its step."""

    def step(self, step: int) -> float:
        """Apply the update of optimizer step `step`, counted from 0: the schedule is a function of it.

        Returns:
            The global gradient norm before clipping. Infinite if fp16 skipped the update to lower its loss scale.

        Raises:
            DivergedError: the norm is not finite. No weight was changed.
        """

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Return every parameter (its float32 master) and buffer, unsharded, on the CPU; collective."""


def open_engine(module: Encoder, deepspeed: DeepSpeedJson, schedule: Schedule, world: World) -> Engine:
    """Return the engine for a module; collective.

    Args:
        module: trained in place; moved to the device.
        deepspeed: the DeepSpeed JSON.

    Raises:
        UserError: the device lacks the JSON's precision, or DeepSpeed rejects the JSON.
    """
    require_precision(deepspeed, world.device)
    config, _ = resolve_precision(deepspeed, world.device)
    if needs_deepspeed(config, world.size):
        from pkd_dist.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(module, config, schedule, world)
    autocast = config.get("torch_autocast", {})
    dtype = getattr(torch, autocast["dtype"]) if autocast.get("enabled") else None
    return PlainEngine(module, schedule, world.device, dtype)


def needs_deepspeed(deepspeed: DeepSpeedJson, world_size: int) -> bool:
    """Return whether a training with this JSON runs on DeepSpeed rather than on the plain engine."""
    return world_size > 1 or bool(deepspeed_features(deepspeed))


def deepspeed_features(deepspeed: DeepSpeedJson) -> list[str]:
    """Return the keys of a DeepSpeed JSON that ask for something only DeepSpeed has."""
    zero = deepspeed.get("zero_optimization", {})
    found = [f"zero_optimization.{key}" for key in ("offload_optimizer", "offload_param") if key in zero]
    found += [key for key in ("bf16", "fp16") if deepspeed.get(key, {}).get("enabled")]
    for key in deepspeed.keys() - _PLAIN_KEYS:
        value = deepspeed[key]
        if value and not (isinstance(value, dict) and value.get("enabled") is False):
            found.append(key)
    return sorted(found)


def load_in_background() -> None:
    """Start importing DeepSpeed, which takes seconds, while the host waits for a GPU."""

    def load() -> None:
        with contextlib.suppress(Exception):  # the engine's own import raises it again
            importlib.import_module("pkd_dist.training.deepspeed_engine")

    threading.Thread(target=load, daemon=True).start()


def resolve_precision(deepspeed: DeepSpeedJson, device: torch.device) -> tuple[DeepSpeedJson, str]:
    """Resolve `torch_autocast`'s "auto" values for a device.

    Returns:
        The JSON without "auto" values, and the precision's name: float32, autocast bfloat16, bfloat16, float16, ...
    """
    config = dict(deepspeed)
    autocast = config.get("torch_autocast")
    if isinstance(autocast, dict):
        enabled = autocast.get("enabled", False)
        if enabled == "auto":
            on_gpu = device.type == "cuda"
            enabled = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bfloat16()
        config["torch_autocast"] = {**autocast, "enabled": bool(enabled), "dtype": "bfloat16"}
        if enabled:
            return config, "autocast bfloat16"
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if config.get(key, {}).get("enabled"):
            return config, name
    return config, "float32"


def leaves_precision_open(deepspeed: DeepSpeedJson) -> bool:
    """Return whether `resolve_precision` looks at the device."""
    return deepspeed.get("torch_autocast", {}).get("enabled") == "auto"


def require_precision(deepspeed: DeepSpeedJson, device: torch.device) -> None:
    """Check that a device can train with the precision of a DeepSpeed JSON.

    Raises:
        UserError: it asks for fp16 on a CPU without float16 matrix multiplications.
    """
    if device.type == "cpu" and deepspeed.get("fp16", {}).get("enabled") and not cpu_has_float16():
        raise UserError(
            "fp16 is enabled in the DeepSpeed JSON, but this CPU does not multiply matrices in float16; enable bf16 or "
            "torch_autocast instead",
            "train.deepspeed",
        )


def cpu_has_float16() -> bool:
    """Return whether this CPU has float16 matrix multiplications, which DeepSpeed requires for fp16."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
