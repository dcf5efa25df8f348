"""The typed schema of a run: strict YAML in, one frozen `Config` out.

Data flow: YAML file + command-line overrides -> nested dict -> pydantic models (types, ranges, cross-checks) -> the
DeepSpeed JSON it names (`load_deepspeed`), checked against the YAML. Every setting has one owner: batch, accumulation,
learning rate and clipping belong to the YAML; ZeRO, precision and offload to the DeepSpeed JSON.

Every mistake is a `UserError` of one line that names the file (and line), the key, what is allowed and, for an unknown
key, the nearest known one.
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
    "scheduler": "train.learning_rate and train.warmup_ratio",
}
"""Keys of a DeepSpeed JSON that belong to the run's YAML; there they may stand only as "auto"."""

DEEPSPEED_KEYS = (
    *OWNED_BY_YAML, "zero_optimization", "torch_autocast", "bf16", "fp16", "communication_data_type", "data_types",
    "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer",
    "activation_checkpointing", "compile", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "tensorboard", "wandb", "csv_monitor", "checkpoint",
)  # fmt: skip
"""Top-level keys that a DeepSpeed JSON may hold; a misspelt one would be ignored by DeepSpeed without a word."""

PRECISIONS = ("torch_autocast", "bf16", "fp16")


def load_deepspeed(config: Config, config_file: str | Path | None = None) -> dict[str, Any]:
    """Reads the DeepSpeed JSON that `train.deepspeed` names and checks it against the YAML.

    Returns the JSON's own content, without the keys that the YAML owns ("auto" there). `"enabled": "auto"` of
    `torch_autocast` is left for the engine, which knows the device.

    Raises:
        UserError: unreadable, not an object, a key the YAML owns, more than one precision, an unknown ZeRO stage.
    """
    path = project_path(config.train.deepspeed)
    yaml_name = str(config_file) if config_file else "the run's YAML"

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise UserError(f"{path}: {repeated[0]} stands twice; keep one")
        return dict(pairs)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{yaml_name}: train.deepspeed: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold one JSON object, not a {type(data).__name__}")
    for key, owner in OWNED_BY_YAML.items():
        if data.pop(key, "auto") != "auto":
            raise UserError(
                f'{path}: {key} conflicts with {yaml_name}, where {owner} owns it; remove it from the JSON or set it to "auto"'
            )
    for key in data:
        if key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
            raise UserError(f"{path}: {key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    for key in (*PRECISIONS, "zero_optimization"):
        if not isinstance(data.get(key, {}), dict):
            example = '{"stage": 1}' if key == "zero_optimization" else '{"enabled": true}'
            raise UserError(f"{path}: {key} must be an object such as {example}")
    for key in PRECISIONS:
        enabled = data.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool) and (key, enabled) != ("torch_autocast", "auto"):
            also = ', or "auto"' if key == "torch_autocast" else ""
            raise UserError(f"{path}: {key}.enabled: {enabled!r} is refused; allowed: true, false{also}")
    dtype = data.get("torch_autocast", {}).get("dtype", "auto")
    if dtype not in ("auto", "bfloat16", "float16"):
        raise UserError(f"{path}: torch_autocast.dtype: {dtype!r} is refused; allowed: auto, bfloat16, float16")
    on = [name for name in PRECISIONS if data.get(name, {}).get("enabled")]
    if len(on) > 1:
        raise UserError(f"{path}: {' and '.join(on)} are both enabled; one precision is allowed")
    stage = data.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    return data
