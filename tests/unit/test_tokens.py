"""Examples to flat arrays."""

import numpy as np
import pytest

from pkd_dist.data.tasks import GLUE
from pkd_dist.data.text import read
from pkd_dist.data.tokens import open_tokens, problem, tokenize
from pkd_dist.model.encoder import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(body):
    return load_tokenizer(str(body))


def test_tokens_are_the_tokenizers_own(data, tokenizer, tmp_path):
    split = read(str(data), "dev", GLUE["sst2"])
    made = tokenize(split, tokenizer, 32, tmp_path / "dev")
    for i in (0, 17, 40):
        start, stop = made.offsets_N1[i : i + 2]
        assert made.input_ids_T[start:stop].tolist() == tokenizer(split.texts[0][i])["input_ids"]
    assert len(made) == 41 and made.truncated == 0
    again = open_tokens(tmp_path / "dev")
    assert isinstance(again.input_ids_T, np.memmap)
    assert (again.digest, again.input_digest) == (made.digest, made.input_digest)


def test_truncation_is_counted(data, tokenizer, tmp_path):
    made = tokenize(read(str(data), "dev", GLUE["sst2"]), tokenizer, 8, tmp_path)
    assert made.lengths_N.max() == 8
    assert (
        made.truncated
        == (tokenize(read(str(data), "dev", GLUE["sst2"]), tokenizer, 64, tmp_path / "b").lengths_N > 8).sum()
    )


def test_pairs_have_two_segments(tokenizer, tmp_path):
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tlabel\nthe film\ta plot\t0\nbad actor\tgood\t1\n")
    made = tokenize(read(str(tmp_path), "train", GLUE["wnli"]), tokenizer, 32, tmp_path / "t")
    start, stop = made.offsets_N1[:2]
    assert made.type_ids_T[start:stop].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_an_altered_or_missing_array_is_noticed(data, tokenizer, tmp_path):
    folder = tmp_path / "dev"
    assert "meta.json is missing" in str(problem(folder))
    tokenize(read(str(data), "dev", GLUE["sst2"]), tokenizer, 32, folder)
    assert problem(folder) is None
    path = folder / "input_ids.npy"
    whole = path.read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-40], b""):
        path.write_bytes(broken)
        assert "was altered" in str(problem(folder))


def test_digests(tokenizer, tmp_path):
    def digests(lines, name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
        made = tokenize(read(str(tmp_path / name), "train", GLUE["sst2"]), tokenizer, 32, tmp_path / name / "t")
        return made.digest, made.input_digest

    base = digests(["good film\t1", "bad film\t0"], "a")
    assert digests(["good film\t1", "bad film\t0"], "b") == base
    swapped = digests(["bad film\t0", "good film\t1"], "c")
    assert swapped[0] != base[0] and swapped[1] == base[1], "the teacher does not care for order"
    relabelled = digests(["good film\t0", "bad film\t1"], "d")
    assert relabelled[0] != base[0] and relabelled[1] == base[1], "nor for labels"
    assert digests(["good plot\t1", "bad film\t0"], "e")[1] != base[1]
