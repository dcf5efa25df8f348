"""Token sets: contents, files, digests, memory."""

import hashlib
import io
import tracemalloc

import numpy as np
import pytest
from families import BERT_SPECIAL, ROBERTA_SPECIAL, make_tokenizer

from pkd_dist.data import tokens
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.examples import Split, example_ids
from pkd_dist.data.tasks import GLUE
from pkd_dist.data.text import read
from pkd_dist.data.tokens import open_tokens, problem, tokenize
from pkd_dist.model.encoder import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(body):
    return load_tokenizer(str(body))


def test_tokens_match_the_tokenizer(data, tokenizer, tmp_path):
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


def some_split(count, pair=False):
    """Texts of 1 to 12 words; pairs have regression labels."""
    rng = np.random.default_rng(count)
    words = ["good", "bad", "film", "plot", "the", "unheard", "x", "[SEP]"]
    texts = tuple([" ".join(rng.choice(words, rng.integers(1, 13))) for _ in range(count)] for _ in range(1 + pair))
    labels = rng.random(count).astype(np.float32) if pair else rng.integers(2, size=count)
    return Split(example_ids(texts), texts, labels, () if pair else ("0", "1"), "train.tsv")


def untyped_tokenizer():
    tokenizer = make_tokenizer(ROBERTA_SPECIAL)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def character_tokenizer():
    from transformers import CanineTokenizer

    return CanineTokenizer()


def set_to(**settings):
    tokenizer = make_tokenizer(BERT_SPECIAL)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


TOKENIZERS = {
    "types": lambda: make_tokenizer(BERT_SPECIAL),
    "truncated on the left": lambda: set_to(truncation_side="left"),
    "special tokens are split": lambda: set_to(split_special_tokens=True),
    "no types": untyped_tokenizer,
    "in Python": character_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("max_length", [7, 11, 200])
def test_every_example_matches_a_call_of_the_tokenizer(tmp_path, monkeypatch, kind, pair, max_length):
    monkeypatch.setattr(tokens, "_CHUNK_EXAMPLES", 16)
    tokenizer, split = TOKENIZERS[kind](), some_split(50, pair)
    typed = "token_type_ids" in tokenizer.model_input_names
    tokenizer("this call leaves padding and truncation set", truncation=True, padding="max_length", max_length=5)
    made = tokenize(split, tokenizer, max_length, tmp_path)
    truncated = 0
    for i, fields in enumerate(zip(*split.texts, strict=True)):
        own = tokenizer(*fields, truncation=True, max_length=max_length)
        start, stop = made.offsets_N1[i : i + 2]
        assert made.input_ids_T[start:stop].tolist() == own["input_ids"]
        assert made.type_ids_T is None if not typed else made.type_ids_T[start:stop].tolist() == own["token_type_ids"]
        truncated += len(tokenizer(*fields, verbose=False)["input_ids"]) > max_length
    assert made.truncated == truncated and (truncated > 0) == (max_length < 200)
    assert np.array_equal(made.ids_N, split.ids_N) and np.array_equal(made.labels_N, split.labels_N)


@pytest.mark.parametrize("kind", ["types", "no types"])
def test_chunked_files_and_digests_match_whole_arrays(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tokens, "_CHUNK_EXAMPLES", 16)
    made = tokenize(some_split(50, True), TOKENIZERS[kind](), 9, tmp_path)
    names = {path.stem for path in tmp_path.glob("*.npy")}
    assert names == {"input_ids", "offsets", "ids", "labels"} | ({"type_ids"} if kind == "types" else set())
    arrays = {name: np.load(tmp_path / f"{name}.npy") for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npy" for name in names} | {"meta.json"}
    whole = hashlib.sha256()
    for name in sorted(arrays):
        saved = io.BytesIO()
        np.save(saved, arrays[name])
        assert (tmp_path / f"{name}.npy").read_bytes() == saved.getvalue()
        whole.update(name.encode() + arrays[name].tobytes())
    assert made.digest == whole.hexdigest()[:16]
    total = 0
    for i, (start, stop) in enumerate(zip(arrays["offsets"][:-1], arrays["offsets"][1:], strict=True)):
        content = arrays["ids"][i].tobytes() + arrays["input_ids"][start:stop].tobytes()
        content += arrays["type_ids"][start:stop].tobytes() if "type_ids" in arrays else b""
        total += int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
    assert made.input_digest == f"{total % 2**128:032x}"[:16]


def test_a_folder_can_be_reused_by_a_tokenizer_without_types(tmp_path):
    assert tokenize(some_split(5), TOKENIZERS["types"](), 9, tmp_path).type_ids_T is not None
    assert tokenize(some_split(5), TOKENIZERS["no types"](), 9, tmp_path).type_ids_T is None
    assert problem(tmp_path) is None


def test_interrupted_work_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK_EXAMPLES", 16)
    checks = iter([None, None, KeyboardInterrupt()])

    def check():
        if error := next(checks):
            raise error

    with pytest.raises(KeyboardInterrupt):
        tokenize(some_split(50), make_tokenizer(BERT_SPECIAL), 9, tmp_path / "train", check)
    assert list((tmp_path / "train").iterdir()) == []


def test_memory_is_a_few_numbers_per_example(tmp_path):
    def peak(count):
        texts = (TextColumn("good film" if i % 2 else f"the plot of x {i}" for i in range(count)),)
        split = Split(np.arange(count), texts, np.zeros(count, np.int64), ("0", "1"), "")
        tracemalloc.start()
        made = tokenize(split, tokenizer, 16, tmp_path / str(count))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(made) == count
        return peak

    tokenizer = make_tokenizer(BERT_SPECIAL)
    few, many = 5_000, 45_000
    peak(few)  # imports
    assert (peak(many) - peak(few)) / (many - few) < 40, "bytes per example"


def test_an_altered_or_missing_array_is_detected(data, tokenizer, tmp_path):
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
    assert swapped[0] != base[0] and swapped[1] == base[1], "teacher outputs do not depend on the order"
    relabelled = digests(["good film\t0", "bad film\t1"], "d")
    assert relabelled[0] != base[0] and relabelled[1] == base[1], "nor on labels"
    assert digests(["good plot\t1", "bad film\t0"], "e")[1] != base[1]
