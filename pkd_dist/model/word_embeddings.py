"""The word embeddings of a model, read from its files alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModel
from transformers.utils import cached_file

from pkd_dist.errors import UserError
from pkd_dist.files import read_object
from pkd_dist.model.encoder import load_config

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_word_embeddings(folder: str, key: str = "teacher.model") -> np.ndarray:
    """Return the word embeddings (V, H) of a model, float32. Only this table is read.

    Args:
        folder: a folder or hub name, from `encoder.locate`.
        key: the setting that it comes from, for messages.

    Raises:
        UserError: the model has no `.safetensors` file, or the table is not found in it.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(load_config(folder, key), trust_remote_code=False)
    table = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is table)
    for path in _files(folder, key):
        with safe_open(path, framework="pt") as weights:
            # In the file of a classifier, the body's names have a prefix of their own.
            found = [each for each in weights.keys() if each == name or each.endswith(f".{name}")]  # noqa: SIM118
            if len(found) == 1:
                embeddings: np.ndarray = weights.get_tensor(found[0]).float().numpy()
                return embeddings
    raise UserError(f"{key}: {folder}: its word embeddings ({name}) are not in its .safetensors files")


def _files(folder: str, key: str) -> list[Path]:
    for name in (_WEIGHTS, _INDEX):
        path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        if name == _WEIGHTS:
            return [Path(path)]
        shards = read_object(Path(path))["weight_map"]
        assert isinstance(shards, dict)
        return [Path(str(cached_file(folder, shard))) for shard in sorted(set(shards.values()))]
    raise UserError(f"{key}: {folder} has no {_WEIGHTS}; convert its weights, or set task.augment.neighbours to 0")
