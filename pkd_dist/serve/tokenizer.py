"""The tokenizer of an export, on the `tokenizers` library alone.

`tokenizer.json` holds everything but padding and truncation, which transformers sets on each call; they are set here once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from pkd_dist.errors import UserError

Texts = tuple[str, ...]
"""The text of a request, or the two texts of a pair; then its options, if it has some."""


class ServingTokenizer:
    """Turn texts into the arrays that `transformers` makes of them with truncation and padding to the longest.

    Args:
        folder: The export.
        max_length: Tokens; longer inputs are truncated, the longer text of a pair first.
        only_first: Truncate only the first text of a pair, unless the second is too long for that.

    Raises:
        UserError: The folder has no usable tokenizer.json, or its tokenizer has no padding token.
    """

    def __init__(self, folder: Path, max_length: int, only_first: bool = False):
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"{folder}: pkd serve cannot load tokenizer.json ({error}); export a model with a fast tokenizer"
            ) from None
        pad_token = _content(settings.get("pad_token"))
        pad_id = None if pad_token is None else self._tokenizer.token_to_id(pad_token)
        if pad_token is None or pad_id is None:
            raise UserError(
                f"{folder}: the tokenizer has no padding token; give it one (pad_token) and export it again"
            )
        self._tokenizer.encode_special_tokens = settings.get("split_special_tokens", False)
        self._tokenizer.enable_truncation(max_length, direction=settings.get("truncation_side", "right"))
        self._padding = {
            "direction": settings.get("padding_side", "right"),
            "pad_id": pad_id,
            "pad_type_id": settings.get("pad_token_type_id", 0),
            "pad_token": pad_token,
        }
        self._tokenizer.enable_padding(**self._padding)
        self._only_first: Tokenizer | None = None
        if only_first:
            self._only_first = Tokenizer.from_str(self._tokenizer.to_str())
            self._only_first.encode_special_tokens = self._tokenizer.encode_special_tokens
            self._only_first.enable_truncation(
                max_length, strategy="only_first", direction=settings.get("truncation_side", "right")
            )

    def __call__(self, texts: Sequence[Texts]) -> dict[str, np.ndarray]:
        """Return `input_ids`, `token_type_ids` and `attention_mask` of the texts, each int64 (B, L)."""
        return self.encode(texts)[0]

    def encode(self, texts: Sequence[Texts]) -> tuple[dict[str, np.ndarray], list[bool]]:
        """Return the arrays of the texts, and which texts were truncated."""
        encodings = self._encodings([text[0] if len(text) == 1 else text for text in texts])
        arrays = {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        }
        return arrays, [bool(encoding.overflowing) for encoding in encodings]

    def _encodings(self, texts: Sequence[str | Texts]) -> list[Encoding]:
        """Return the encodings of the texts, padded to the longest."""
        first = self._only_first
        if first is None:
            return list(self._tokenizer.encode_batch(texts))
        try:
            return list(first.encode_batch(texts))
        except Exception:  # tokenizers raises it where a second text leaves no room for the first
            encodings = [self._alone(first, text) for text in texts]
            longest = max(map(len, encodings))
            for encoding in encodings:
                encoding.pad(longest, **self._padding)
            return encodings

    def _alone(self, first: Tokenizer, text: str | Texts) -> Encoding:
        try:
            return first.encode_batch([text])[0]
        except Exception:  # as above
            return self._tokenizer.encode_batch([text])[0]


def _content(token: object) -> str | None:
    """Return the text of a token in tokenizer_config.json, where it is a string or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
