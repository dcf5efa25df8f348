"""A Hugging Face classifier in distillation: find, load and save its folder; forward to logits and hidden states.

Shapes: B examples, L tokens, C classes (1 for a regression), M selected layers, H hidden size, V token ids. A model of multiple
choice takes inputs (B, O, L), whose O options are its C classes.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.logging import disable_progress_bar

from pkd_dist.errors import UserError
from pkd_dist.files import require_space
from pkd_dist.model.attention import layer_module, queries_keys_values
from pkd_dist.model.compatibility import longest_input
from pkd_dist.model.families import encoder_layers, num_layers
from pkd_dist.model.first_token import only_first_token
from pkd_dist.model.fused_layer import fuse_layers
from pkd_dist.model.head import MULTIPLE_CHOICE, has_classifier, is_multiple_choice, model_class, new_model
from pkd_dist.model.outputs import Outputs
from pkd_dist.model.vocabulary import CompactVocabulary, has_plain_vocabulary

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin")
USED_IDS = "vocabulary.used"
"""The entry of an `Encoder`'s weights that lists the token ids of its embedding rows."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


_OTHER_HEADS = {
    "ForMultipleChoice": "multiple choice",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
    "ForNextSentencePrediction": "next sentence prediction",
    "ForImageClassification": "image classification",
    "ForAudioClassification": "audio classification",
    "ForCausalLM": "text generation",
    "ForConditionalGeneration": "text generation",
}
"""Part of an architecture's name -> its task, of models that are fine-tuned, but not to classify a text."""


def locate(model: str, key: str = "teacher.model") -> str:
    """Resolve `model`: a folder, `package:NAME` of an installed package, or a hub name.

    Args:
        key: The setting that `model` comes from, for messages.

    Returns:
        The folder, or the hub name as given.

    Raises:
        UserError: There is no such folder or package, or the folder lacks config, weights or tokenizer.
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
        _require_hub(model, key)
        return model
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {model} has no config.json; expected a Hugging Face model folder")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{key}: {model} has no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{key}: {model} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
    return str(folder)


def name_of(model: str) -> str:
    """Return what a model is called where this machine's folders mean nothing: a folder's or file's own name, or the hub's."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model


def _require_hub(model: str, key: str) -> None:
    """Check that a hub name is cached or the hub answers: its client would print retries for half a minute.

    Raises:
        UserError: neither.
    """
    try:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            get_session().head(constants.ENDPOINT, timeout=10)
    except ValueError:  # not a name that the hub allows
        raise UserError(f"{key}: no such folder: {model}, and it is not a name on the hub") from None
    except Exception:  # the HTTP client raises many types
        raise UserError(
            f"{key}: no folder {model!r}, and the hub cannot be reached; check the path, or the network"
        ) from None


def load_tokenizer(folder: str, key: str = "teacher.model") -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError, which names the setting `key`."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types
        if _needs_sentencepiece(Path(folder)):
            raise UserError(
                f"{key}: {folder} has a SentencePiece tokenizer and no tokenizer.json; "
                "run: pip install sentencepiece protobuf"
            ) from None
        raise UserError(f"{key}: the tokenizer of {folder} cannot be loaded: {_reason(error, folder)}") from None


def _needs_sentencepiece(folder: Path) -> bool:
    """Return whether a folder's tokenizer needs sentencepiece, which is not installed."""
    converted = ("spm.model", "spiece.model", "sentencepiece.bpe.model")
    return (
        not (folder / "tokenizer.json").is_file()
        and any((folder / name).is_file() for name in converted)
        and importlib.util.find_spec("sentencepiece") is None
    )


def load_config(folder: str, key: str = "teacher.model", **overrides: Any) -> PretrainedConfig:
    """Load a model configuration with some fields replaced. Raises UserError, which names the setting `key`."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **overrides)
    except Exception as error:
        raise UserError(
            f"{key}: {folder} is neither a model folder nor a name on the hub: {_reason(error, folder)}"
        ) from None


def load_model(
    folder: str, key: str = "teacher.model", new_head: bool = False, dropout: float | None = None, **overrides: Any
) -> PreTrainedModel:
    """Load a sequence classifier, or a model of multiple choice, in float32, in evaluation mode.

    Args:
        folder: A folder or hub name, from `locate`.
        key: The setting that it comes from, for messages.
        new_head: Draw the classifier at random if the folder has none.
        dropout: Probability for all dropouts; None keeps the model's own.
        overrides: Fields of the model's configuration (`num_labels`, ..., or `architectures`, which decides the head).

    Raises:
        UserError: The model cannot be loaded, or weights other than a new head are missing.
    """
    disable_progress_bar()  # hides the bar of the short loading; a download keeps its own
    config = load_config(folder, key, **overrides)
    set_dropout(config, dropout)
    try:
        model, info = model_class(config).from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=new_head,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"{key}: {folder} cannot be loaded: {_reason(error, folder)}") from None
    base = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    body = [name for name in missing if name.startswith(base) and "pooler" not in name]
    if body or (missing and not new_head):
        hint = "" if body else "; it is not fine-tuned: set teacher.finetune, or use a fine-tuned folder"
        raise UserError(f"{key}: {folder} lacks the weights of {(body or missing)[0]}{hint}")
    return model.eval()


def require_classifier(folder: str, name: str, key: str, multiple_choice: bool = False) -> None:
    """Check that a folder holds a sequence classifier, according to `architectures` in its config.

    Args:
        name: The model as the user named it, under `key`.
        multiple_choice: It must score options instead.

    Raises:
        UserError: It is a body without a head, or a model of another task.
    """
    config = load_config(folder, key)
    architectures = config.architectures or []
    if is_multiple_choice(config) if multiple_choice else has_classifier(config):
        return
    if multiple_choice and architectures:
        remedy = ", or set teacher.finetune" if key == "teacher.model" else ""
        raise UserError(
            f"{name} is a {architectures[0]}, which does not score options; give a ...{MULTIPLE_CHOICE} of this task{remedy}",
            key,
        )
    other = next((task for each in architectures for suffix, task in _OTHER_HEADS.items() if suffix in each), None)
    if other:
        raise UserError(
            f"{name} is a model for {other} ({architectures[0]}), whose outputs are not classes of a text; give a sequence "
            "classifier of this task",
            key,
        )
    remedy = "set teacher.finetune to fine-tune it here, or give" if key == "teacher.model" else "give"
    raise UserError(f"{name} is not fine-tuned (it has no sequence classifier); {remedy} a fine-tuned folder", key)


def _reason(error: Exception, folder: str) -> str:
    """Return the first line of an error of transformers, with a remedy for a model that brings its own code."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if not isinstance(error, ValueError) or not _brings_code(folder):
        return line
    return "it brings its own Python code, which pkd_dist never runs; use a model of an architecture in transformers"


def _brings_code(folder: str) -> bool:
    """Return whether the configuration of a model or of its tokenizer names classes in the folder's own modules."""
    try:
        found, _ = PretrainedConfig.get_config_dict(folder)
        return "auto_map" in found or "auto_map" in get_tokenizer_config(folder)
    except (OSError, ValueError):
        return False


def set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    """Set every dropout probability of a model configuration, in place; None changes nothing."""
    if dropout is None:
        return
    for name, value in list(vars(config).items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "dropout" in name and number and 0 <= value < 1:
            setattr(config, name, float(dropout))
    if hasattr(config, "classifier_dropout"):  # None means the hidden layers' probability
        config.classifier_dropout = float(dropout)


class Encoder(nn.Module):
    """A classifier that returns logits and hidden states, with the savings that its family allows.

    These are a last layer for [CLS] alone (`first_token.py`), an embedding of the used tokens (`vocabulary.py`), and fused
    layers on a CPU (`fused_layer.py`). None changes results beyond rounding.

    Args:
        model: A Hugging Face sequence classifier; changed in place.
        projection: Maps its hidden states to the teacher's width; trained with it, not exported.
        used_V: The token ids that occur; None means all.
        all_tokens: Allow hidden states of every token, not of [CLS] alone.
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
        self.first_token_only = not all_tokens and only_first_token(model, layers)
        self.fused = fuse_layers(model, layers, self.first_token_only)
        compact = used_V is not None and has_plain_vocabulary(model)
        self.vocabulary = CompactVocabulary(model, used_V) if compact and used_V is not None else None
        self.model = model
        self.projection = projection

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        layers: Sequence[int] = (),
        tokens: bool = False,
        attention_layers: Sequence[int] = (),
    ) -> Outputs:
        """Return logits, hidden states, and queries, keys and values.

        Args:
            inputs: Tensors (B, L) or (B, O, L) from the tokenizer, by name; those that the model does not take are ignored.
            layers: Encoder layers whose output to return, from 1 (0: the embeddings).
            tokens: Return the states of every token; needs `all_tokens`.
            attention_layers: Encoder layers whose queries, keys and values to return, from 1.

        Raises:
            UserError: The model does not return one hidden state per layer.
        """
        if self.vocabulary is not None:
            inputs = inputs | {"input_ids": self.vocabulary(inputs["input_ids"])}
        inputs = accepted(self.model, inputs)
        out = self.model(**inputs, output_hidden_states=bool(layers or attention_layers), return_dict=True)
        if not (layers or attention_layers):
            return Outputs(out.logits, None, None)
        hidden, family = out.hidden_states, self.model.config.model_type
        if len(hidden) != num_layers(self.model.config) + 1:
            raise UserError(
                f"{type(self.model).__name__} returns {len(hidden)} hidden states for "
                f"{num_layers(self.model.config)} layers, not one per layer; use a model of another family"
            )
        states = torch.stack([hidden[i] if tokens else hidden[i][:, 0] for i in layers], dim=-2) if layers else None
        if states is not None:
            states = states.unflatten(0, inputs["input_ids"].shape[:-1])
        attention = [queries_keys_values(layer_module(self.model, i), family, hidden[i - 1]) for i in attention_layers]
        return Outputs(
            out.logits,
            states if states is None or self.projection is None else self.projection(states),
            states,
            torch.stack(attention, dim=2) if attention else None,
        )

    def with_full_vocabulary(self, weights: dict[str, torch.Tensor], decay: float) -> dict[str, torch.Tensor]:
        """Return this module's weights, by name, with the full embedding table.

        Args:
            weights: This module's weights, by name.
            decay: Product of (1 - learning rate * weight decay) over the steps so far.
        """
        if self.vocabulary is None:
            return weights
        name = f"model.{self.vocabulary.name}"
        plain = {key: value for key, value in weights.items() if key != USED_IDS}
        return plain | {name: self.vocabulary.full_table(weights[name], decay)}


Value = TypeVar("Value")


def accepted(model: PreTrainedModel, inputs: Mapping[str, Value]) -> dict[str, Value]:
    """Return the tokenizer outputs that this model takes; not every family has token types, or more than one."""
    names = _parameters(type(model).forward)
    typed = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return {k: v for k, v in inputs.items() if k in names and (typed or k != "token_type_ids")}


@cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def parameter_count(model: PreTrainedModel) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def planned_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a classifier of this shape that takes no memory."""
    with torch.device("meta"):
        return new_model(config)


def planned_sizes(config: PretrainedConfig, used: int) -> tuple[int, int]:
    """Return the number of parameters of a classifier, and of those left where only `used` token ids have an embedding."""
    model = planned_model(config)
    count, table = parameter_count(model), model.get_input_embeddings()
    unused = (int(config.vocab_size) - used) * table.embedding_dim if has_plain_vocabulary(model) else 0  # type: ignore
    return count, count - max(0, int(unused))


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int | None = None
) -> None:
    """Write a Hugging Face folder whose tokenizer returns only the inputs that this model takes.

    Args:
        folder: Its parent must exist.
        max_length: Tokens at which training truncates; the tokenizer's limit from now on. None keeps its own.

    Raises:
        UserError: The disk is full.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with require_space(folder.absolute().parent, needed, folder.name.strip(".").removesuffix(".tmp")):
        model.save_pretrained(folder)
        own = copy.copy(tokenizer)
        if isinstance(own, PreTrainedTokenizerFast):  # its last call is no part of it: a resumed run makes others
            own.backend_tokenizer.no_truncation()
            own.backend_tokenizer.no_padding()
        own.model_max_length = max_length or tokenizer.model_max_length
        own.model_input_names = list(accepted(model, dict.fromkeys(tokenizer.model_input_names)))
        own.init_kwargs = tokenizer.init_kwargs | {"model_input_names": own.model_input_names}  # from which it is saved
        longest = longest_input(model.config)
        if longest is not None and own.model_max_length > longest:
            own.model_max_length = longest
        own.save_pretrained(folder)
        _name_for_transformers_4(folder / "tokenizer_config.json")


def _name_for_transformers_4(path: Path) -> None:
    """Give a tokenizer the class name, and its extra special tokens the key, that transformers 4 and 5 both read."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
