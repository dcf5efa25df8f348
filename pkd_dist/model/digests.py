"""Digests of a model and of a tokenizer, by which a run recognizes them."""

from __future__ import annotations

from pathlib import Path

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, folder_digest, read_object, sha256
from pkd_dist.model.encoder import TOKENIZER_FILES, WEIGHT_FILES, WEIGHT_SUFFIXES


def weights_digest(folder: str) -> str:
    """Return a digest of a model's configuration, without library versions, and of the bytes of its weights.

    Raises:
        UserError: the folder's configuration cannot be read.
    """
    path = Path(folder)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
        try:
            shape = read_object(path / "config.json")
        except (OSError, ValueError) as error:
            raise UserError(f"{path / 'config.json'}: cannot be read ({error}); restore the file") from None
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
    """Return a digest of a tokenizer: of tokenizer.json, which is complete, or else of all its files."""
    path = Path(folder)
    if not path.is_dir():
        return digest_of(folder)
    complete = (path / "tokenizer.json").is_file()
    return folder_digest(path, ["tokenizer.json"] if complete else list(TOKENIZER_FILES))
