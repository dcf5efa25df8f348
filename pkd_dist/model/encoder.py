"""A Hugging Face classifier as distillation sees it: forward -> logits and the chosen layers' states.

Shapes: B rows, L tokens, C classes (1 for a regression), M chosen layers, H hidden size.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, folder_digest, require_space, sha256
from pkd_dist.kernels.encoder_layer import fuse
from pkd_dist.model.first_token import only_first_token
from pkd_dist.model.vocabulary import CompactVocabulary, has_plain_vocabulary

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
USED_IDS = "vocabulary.used"
"""Where an `Encoder`'s weights say which rows of the embedding they hold."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def locate(model: str, key: str = "teacher.model") -> str:
    """The folder (or hub name) that `model` means: a folder, `package:NAME` of an installed package, or a hub name.

    Raises:
        UserError: no such folder or package, or a folder without config, weights or tokenizer.
    """
    if model.startswith("package:"):
        name = model.removeprefix("package:")
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{key}: the Python package {name!r} is not installed; run: pip install {name}") from None
        found = [
            Path(str(f.locate())).parent
            for f in files
            if f.name == "config.json" and f.with_name("model.safetensors") in files
        ]
        if not found:
            raise UserError(f"{key}: the package {name!r} holds no folder with config.json and model.safetensors")
        return str(found[0])
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UserError(f"{key}: no such folder: {model}")
        return model
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {model} has no config.json; expected a Hugging Face model folder")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{key}: {model} has no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{key}: {model} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
    return str(folder)


def load_tokenizer(folder: str, key: str = "teacher.model") -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{key}: the tokenizer of {folder} cannot be loaded: {_first_line(error)}") from None


def load_config(folder: str, key: str = "teacher.model", **overrides: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **overrides)
    except Exception as error:
        raise UserError(
            f"{key}: {folder} is neither a model folder nor a name on the hub: {_first_line(error)}"
        ) from None


def load_model(
    folder: str, key: str = "teacher.model", new_head: bool = False, dropout: float | None = None, **overrides: Any
) -> PreTrainedModel:
    """A sequence classifier in float32, in evaluation mode.

    Args:
        new_head: the classifier may be absent from the folder and is then drawn at random.
        dropout: for all of its dropouts; None: its own.
        overrides: fields of the model's configuration (`num_labels`, ...).

    Raises:
        UserError: it cannot be loaded, or weights other than a new head are missing.
    """
    disable_progress_bar()  # of loading, which takes a moment; a download keeps its own
    config = load_config(folder, key, **overrides)
    set_dropout(config, dropout)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=new_head
        )
    except Exception as error:
        raise UserError(f"{key}: {folder} cannot be loaded: {_first_line(error)}") from None
    base = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    body = [name for name in missing if name.startswith(base) and "pooler" not in name]
    if body or (missing and not new_head):
        hint = "" if body else "; it is not fine-tuned: give teacher.finetune, or a fine-tuned folder"
        raise UserError(f"{key}: {folder} lacks the weights of {(body or missing)[0]}{hint}")
    return model.eval()


def is_fine_tuned(folder: str, key: str = "teacher.model") -> bool:
    """Whether a folder holds a sequence classifier (by its `architectures`)."""
    names = load_config(folder, key).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def set_dropout(config: Any, dropout: float | None) -> None:
    """Sets every dropout probability of a model configuration; None leaves it as it is."""
    if dropout is None:
        return
    for name, value in list(vars(config).items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "dropout" in name and number and 0 <= value < 1:
            setattr(config, name, float(dropout))
    if hasattr(config, "classifier_dropout"):  # may be None: that of the hidden layers
        config.classifier_dropout = float(dropout)


class Encoder(nn.Module):
    """A classifier as it is trained or cached: with its savings (see `lean.py`) and, where needed, the projection of its
    states to the teacher's width.

    Args:
        model: a Hugging Face sequence classifier; changed in place.
        projection: Linear from its hidden size to the teacher's; trained with it, left out of the export.
        used_V: the token ids that will occur; None: all.
        all_tokens: states of every token will be asked for, not of [CLS] alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projection: nn.Linear | None = None,
        used_V: np.ndarray | None = None,
        all_tokens: bool = False,
    ):
        super().__init__()
        layers = encoder_layers(model)[1]
        self.lean_last_layer = not all_tokens and only_first_token(model, layers)
        self.fused = fuse(model, layers, self.lean_last_layer)
        compact = used_V is not None and has_plain_vocabulary(model)
        self.vocabulary = CompactVocabulary(model, used_V) if compact and used_V is not None else None
        self.model = model
        self.projection = projection

    def forward(
        self, inputs: dict[str, torch.Tensor], layers: Sequence[int] = (), tokens: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns logits_BC and the states after encoder layers `layers` (from 1): (B, M, H), of [CLS] alone,
        or (B, L, M, H) where `tokens`; None where no layer is asked for. Dtypes are those of the computation."""
        if self.vocabulary is not None:
            inputs = inputs | {"input_ids": self.vocabulary(inputs["input_ids"])}
        inputs = accepted(self.model, inputs)
        out = self.model(**inputs, output_hidden_states=bool(layers), return_dict=True)
        if not layers:
            return out.logits, None
        if len(out.hidden_states) != num_layers(self.model.config) + 1:
            raise UserError(
                f"{type(self.model).__name__} gives {len(out.hidden_states)} hidden states for "
                f"{num_layers(self.model.config)} layers, not one after each; use a model of another family"
            )
        chosen = [out.hidden_states[i] if tokens else out.hidden_states[i][:, 0] for i in layers]
        states = torch.stack(chosen, dim=-2)
        return out.logits, states if self.projection is None else self.projection(states)

    def whole(self, weights: dict[str, torch.Tensor], decay: float) -> dict[str, torch.Tensor]:
        """Weights as the plain model has them: rows left out of the trained embedding put back.

        Args:
            weights: of this module, by name.
            decay: product of (1 - learning rate * weight decay) over the steps done.
        """
        if self.vocabulary is None:
            return weights
        name = f"model.{self.vocabulary.name}"
        plain = {key: value for key, value in weights.items() if key != USED_IDS}
        return plain | {name: self.vocabulary.whole(weights[name], decay)}


def accepted(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tokenizer's outputs those that this model takes: not every family has token types, or more than one."""
    names = _parameters(type(model).forward)
    typed = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return {k: v for k, v in inputs.items() if k in names and (typed or k != "token_type_ids")}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def encoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList | None]:
    """The name and the list of a model's encoder layers; None where they are not one list of their own."""
    depth = num_layers(model.config)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return found[0] if len(found) == 1 and not shares_layers(model.config) else ("", None)


def shares_layers(config: Any) -> bool:
    """Whether one set of weights serves several layers (ALBERT)."""
    return getattr(config, "num_hidden_groups", None) is not None


def parameter_count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Writes a Hugging Face folder; the one above it exists. Its tokenizer gives what this model takes, and no more.

    Raises:
        UserError: the disk is full.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with require_space(folder.absolute().parent, needed, folder.name.strip(".").removesuffix(".tmp")):
        model.save_pretrained(folder)
        own = copy.copy(tokenizer)
        own.model_input_names = list(accepted(model, dict.fromkeys(tokenizer.model_input_names)))
        own.init_kwargs = tokenizer.init_kwargs | {"model_input_names": own.model_input_names}  # else not written
        own.save_pretrained(folder)


def num_layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def weights_digest(folder: str) -> str:
    """Identity of a model: its configuration's shape and its weights' bytes."""
    path = Path(folder)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
        shape = json.loads((path / "config.json").read_text())
        for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
            shape.pop(volatile, None)
        return digest_of([shape, [sha256(p) for p in files]])
    from transformers.utils import cached_file

    return digest_of(
        [
            sha256(Path(str(f)))
            for f in (cached_file(folder, n, _raise_exceptions_for_missing_entries=False) for n in WEIGHT_FILES)
            if f
        ]
    )


def tokenizer_digest(folder: str) -> str:
    """Identity of a tokenizer: of its tokenizer.json, which says all, else of the files it is made from."""
    path = Path(folder)
    if not path.is_dir():
        return digest_of(folder)
    whole = (path / "tokenizer.json").is_file()
    return folder_digest(path, ["tokenizer.json"] if whole else list(TOKENIZER_FILES))
