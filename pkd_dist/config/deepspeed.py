"""Read the DeepSpeed JSON of a run and check it against the run's YAML.

Each setting has one owner: batch size, accumulation, optimizer, schedule and clipping belong to the YAML; ZeRO, precision
and offload belong to the DeepSpeed JSON.
"""

from __future__ import annotations

import collections
import difflib
import json
from pathlib import Path
from typing import Any

from pkd_dist.config.paths import project_path
from pkd_dist.config.schema import Config
from pkd_dist.errors import UserError

OWNED_BY_YAML = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_epsilon",
    "scheduler": "train.learning_rate, train.schedule and train.warmup_ratio",
}
"""Keys of a DeepSpeed JSON -> keys of the YAML that set them. In the JSON they must be absent or "auto"."""

DEEPSPEED_KEYS = (
    *OWNED_BY_YAML, "zero_optimization", "torch_autocast", "bf16", "fp16", "communication_data_type", "data_types",
    "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer",
    "activation_checkpointing", "compile", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "tensorboard", "wandb", "csv_monitor", "checkpoint",
)  # fmt: skip
"""Allowed top-level keys. DeepSpeed itself silently ignores a misspelled key."""

PRECISIONS = ("torch_autocast", "bf16", "fp16")

DeepSpeedConfig = dict[str, Any]
"""The content of a DeepSpeed JSON."""


def load_deepspeed(config: Config, config_file: str | Path | None = None) -> DeepSpeedConfig:
    """Read the DeepSpeed JSON that `train.deepspeed` names and check it.

    Args:
        config: the run configuration.
        config_file: its YAML file, for messages.

    Returns:
        The content of the JSON without the keys that the YAML owns. The value "auto" of `torch_autocast.enabled` is kept
        for the engine, which knows the device.

    Raises:
        UserError: unreadable file, unknown key, a key that the YAML owns, several precisions, or an unknown ZeRO stage.
    """
    path = project_path(config.train.deepspeed)
    yaml_name = str(config_file) if config_file else "the run's YAML"
    if not path.exists():
        raise UserError(f"{yaml_name}: train.deepspeed: no such file: {path}")
    data = _read_json(path)
    _remove_keys_of_yaml(data, path, yaml_name)
    _check_keys(data, path)
    _check_precision(data, path)
    _check_zero_stage(data, path)
    return data


def _read_json(path: Path) -> DeepSpeedConfig:
    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        duplicates = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
        if duplicates:
            raise UserError(f"{path}: {duplicates[0]} is duplicated; keep one")
        return dict(pairs)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a DeepSpeed JSON has a few levels") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must contain one JSON object, not a {type(data).__name__}")
    return data


def _remove_keys_of_yaml(data: DeepSpeedConfig, path: Path, yaml_name: str) -> None:
    for key, owner in OWNED_BY_YAML.items():
        if data.pop(key, "auto") != "auto":
            raise UserError(
                f'{path}: {key} conflicts with {yaml_name}, where {owner} sets it; remove it from the JSON or set it to "auto"'
            )


def _check_keys(data: DeepSpeedConfig, path: Path) -> None:
    for key in data:
        if key not in DEEPSPEED_KEYS:
            similar = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
            raise UserError(f"{path}: {key}: unknown key" + (f"; did you mean {similar[0]}?" if similar else ""))
    for key in (*PRECISIONS, "zero_optimization"):
        if not isinstance(data.get(key, {}), dict):
            example = '{"stage": 1}' if key == "zero_optimization" else '{"enabled": true}'
            raise UserError(f"{path}: {key} must be an object such as {example}")


def _check_precision(data: DeepSpeedConfig, path: Path) -> None:
    for key in PRECISIONS:
        enabled = data.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool) and (key, enabled) != ("torch_autocast", "auto"):
            auto = ', "auto"' if key == "torch_autocast" else ""
            raise UserError(f"{path}: {key}.enabled: {enabled!r} is invalid; allowed: true, false{auto}")
    dtype = data.get("torch_autocast", {}).get("dtype", "auto")
    if dtype not in ("auto", "bfloat16"):
        scaled = "; float16 needs scaled losses, which `fp16: {enabled: true}` has" if dtype == "float16" else ""
        raise UserError(f"{path}: torch_autocast.dtype: {dtype!r} is invalid; allowed: auto, bfloat16{scaled}")
    enabled_keys = [key for key in PRECISIONS if data.get(key, {}).get("enabled")]
    if len(enabled_keys) > 1:
        raise UserError(f"{path}: {' and '.join(enabled_keys)} are both enabled; enable one precision")


def _check_zero_stage(data: DeepSpeedConfig, path: Path) -> None:
    stage = data.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
