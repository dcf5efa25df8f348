"""Reading splits: every format, every quirk, and errors that name file and line."""

import collections
import hashlib
import itertools
import json
import tracemalloc

import numpy as np
import pytest

from pkd_dist.config.task import Task as TaskConfig
from pkd_dist.data import examples
from pkd_dist.data.examples import Split, example_ids, is_labelled, unlabelled, without
from pkd_dist.data.prepare import prepare
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.data.text import read, read_unlabeled
from pkd_dist.errors import UserError

SST2 = GLUE["sst2"]
CUSTOM = Task("custom", ("a", "b"), "y")


def put(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def error_of(folder, task=SST2, split="train", classes=None):
    with pytest.raises(UserError) as error:
        read(str(folder), split, task, classes)
    return str(error.value)


def test_tsv_as_glue_ships_it_bom_crlf_and_stray_quotes(tmp_path):
    body = '\ufeffsentence\tlabel\r\n"half a quote\t1\r\nsay "yes" twice\t0\r\nit\'s "\t1\r\n'
    split = read(put(tmp_path, "train.tsv", body), "train", SST2)
    assert split.texts == (['"half a quote', 'say "yes" twice', "it's \""],)
    assert split.labels_N.tolist() == [1, 0, 1]
    assert split.classes == ("0", "1")


def test_csv_with_quotes_and_newlines(tmp_path):
    put(tmp_path, "train.csv", 'y,a,b\nno,"x, y","two\nlines"\nyes,"say ""hi""",z\n')
    split = read(str(tmp_path), "train", CUSTOM)
    assert split.texts == (["x, y", 'say "hi"'], ["two\nlines", "z"])
    assert split.classes == ("no", "yes")


def test_lines_of_a_csv_are_counted_through_quoted_newlines_and_end_in_any_way(tmp_path):
    put(tmp_path, "train.csv", b'\xef\xbb\xbfy,a,b\r\nno,"x\r\ny",z\r\n\r\nyes,"\n\n",1,2\r\n')
    assert "train.csv:5: has 4 field(s)" in error_of(tmp_path, CUSTOM)
    put(tmp_path, "train.csv", b'y,a,b\rno,"x\ry",z\ryes,u,v\r')
    assert read(str(tmp_path), "train", CUSTOM).texts == (["x\ry", "u"], ["z", "v"])


def test_a_wrong_byte_after_a_byte_order_mark_is_named(tmp_path):
    put(tmp_path, "train.tsv", b"\xef\xbb\xbfsentence\tl\xe4bel\nfine\t1\n")
    assert "train.tsv:1: byte 0xe4 is not valid UTF-8" in error_of(tmp_path)


def test_jsonl_and_parquet_give_the_same_examples(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": "one", "b": "x", "y": 10}, {"a": "two", "b": "y", "y": 9}]
    (tmp_path / "j").mkdir()
    put(tmp_path / "j", "train.jsonl", "".join(json.dumps(r) + "\n" for r in rows) + "\n")
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "train.parquet")
    left, right = (read(str(tmp_path / d), "train", CUSTOM) for d in "jp")
    assert left.texts == right.texts
    assert left.classes == right.classes == ("9", "10"), "numbers in numeric order"
    assert np.array_equal(left.ids_N, right.ids_N)


def test_a_parquet_file_with_a_duplicate_column_is_rejected(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array(["a", "b"]), pa.array(["c", "d"]), pa.array(["0", "1"])]
    pq.write_table(pa.Table.from_arrays(columns, ["sentence", "sentence", "label"]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: has two columns 'sentence'; keep one"):
        read(str(tmp_path), "train", GLUE["sst2"])


def test_a_parquet_class_label_column_gives_its_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"a": Value("string"), "b": Value("string"), "y": ClassLabel(names=["sad", "glad"])})
    Dataset.from_dict({"a": ["p", "q"], "b": ["r", "s"], "y": [1, 0]}, features).to_parquet(tmp_path / "train.parquet")
    split = read(str(tmp_path), "train", CUSTOM)
    assert split.classes == ("glad", "sad")
    assert split.labels_N.tolist() == [0, 1]


def test_ids_are_stable_under_reordering_and_unique_for_repeats(tmp_path):
    lines = ["one\t0", "two\t1", "one\t1"]
    for name, order in (("x", lines), ("y", lines[::-1])):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "train.tsv", "sentence\tlabel\n" + "\n".join(order) + "\n")
    x, y = (read(str(tmp_path / d), "train", SST2) for d in "xy")
    assert len(set(x.ids_N)) == 3
    assert set(x.ids_N) == set(y.ids_N)
    assert x.ids_N[1] == y.ids_N[1]


def plain_ids(texts):
    """Ids by their definition, example by example."""
    seen = collections.Counter()
    for fields in zip(*texts, strict=True):
        content = "\x1f".join(fields).encode()
        digest = hashlib.blake2b(content + seen[content].to_bytes(8, "little"), digest_size=8).digest()
        seen[content] += 1
        yield int.from_bytes(digest, "little", signed=True)


def random_texts(seed, count, different):
    rng = np.random.default_rng(seed)
    return [f"sätze {i} \n" * (i % 3 + 1) for i in rng.integers(different, size=count)]


@pytest.mark.parametrize("different", [1, 40, 3000])
def test_ids_match_their_definition(different):
    first, second = random_texts(1, 700, different), random_texts(2, 700, different)
    for texts in ((first,), (first, second), (first, first)):
        assert example_ids(texts).tolist() == list(plain_ids(texts))


def test_two_texts_with_one_id_are_rejected(monkeypatch):
    monkeypatch.setattr(examples, "_hash", lambda content, repeat: content[:1].ljust(7) + bytes([repeat]))
    assert len(example_ids((["a", "b", "a"],))) == 3
    with pytest.raises(UserError, match="two different texts have the same 64-bit id"):
        example_ids((["a1", "b", "a2"],))


def plain_without(split, *others):
    """The rows that `without` keeps, and the counts of its note, computed with a dictionary of texts."""
    seen, dropped, stay = {}, collections.Counter(), []
    for other in others:
        for fields in zip(*other.texts, strict=True):
            seen.setdefault(fields, f"already in {other.source}")
    for row, fields in enumerate(zip(*split.texts, strict=True)):
        if fields in seen:
            dropped[seen[fields]] += 1
        else:
            seen[fields] = "repeated"
            stay.append(row)
    return stay, ", ".join(f"{count} {why}" for why, count in dropped.items())


@pytest.mark.parametrize("different", [60, 500, 10**9])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pairs"])
def test_without_matches_a_dictionary_of_texts(different, pair):
    def split(name, seed, count):
        texts = (random_texts(seed, count, different),) + ((["same"] * count,) if pair else ())
        return Split(example_ids(texts), texts, np.arange(count), (), name)

    more, others = split("more", 1, 300), [split("train", 2, 40), split("dev", 3, 40)]
    stay, reasons = plain_without(more, *others)
    left = without(more, *others)
    assert left.texts == tuple([column[row] for row in stay] for column in more.texts)
    assert left.labels_N.tolist() == stay and left.ids_N.tolist() == list(plain_ids(left.texts))
    assert left.notes == ((f"removed {300 - len(stay)} of 300 texts: {reasons}",) if reasons else ())


def test_regression_labels_are_numbers(tmp_path):
    put(tmp_path, "train.tsv", "sentence1\tsentence2\tscore\na\tb\t4.5\nc\td\t0\n")
    split = read(str(tmp_path), "train", GLUE["stsb"])
    assert split.labels_N.dtype == np.float32 and split.labels_N.tolist() == [4.5, 0.0]
    for odd in ("x", "1_0", "٣", "0x1", "1e", "."):
        put(tmp_path, "dev.tsv", f"sentence1\tsentence2\tscore\na\tb\t{odd}\n")
        assert f"dev.tsv:2: score {odd!r} is not a number" in error_of(tmp_path, GLUE["stsb"], "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\nfine\t1\none\ttab too many\t0\n", r"train.tsv:3: has 3 field\(s\) where the header names 2"),
        ("sentence\tlabel\nfine\t1\nno label\n", r"train.tsv:3: has 1 field\(s\) where the header names 2"),
        ("sentence\tlabel\n", "train.tsv: has no examples"),
        ("", "train.tsv: is empty"),
        ("\ufeff\n\n", "train.tsv: is empty"),
        ("text\tlabel\nfine\t1\n", "train.tsv:1: has no column 'sentence'; the header names 'text', 'label'"),
        ("sentence\tlabel\tlabel\nfine\t1\t0\n", "train.tsv:1: the header names 'label' twice; keep one"),
        ("sentence\tlabel\nfine\t1\n \t0\n", "train.tsv:3: sentence is empty"),
        ("sentence\tlabel\nfine\t\n", "train.tsv:2: label is empty"),
        ("sentence\tlabel\nfine\t1\nso\t2\n", "train.tsv:3: label '2' is not one of the labels: 0, 1"),
        ("sentence\tlabel\nfine\t1\nso\t1\n", "every example has the label '1'; training needs at least two"),
        (b"sentence\tlabel\nfine\t1\n\xff\xfe\t0\n", "train.tsv:3: byte 0xff is not valid UTF-8"),
        (
            "sentence\tlabel\nfine\t1\n".encode("utf-16-le"),
            "train.tsv:1: contains a NUL character; save the file as UTF-8",
        ),
    ],
)
def test_errors_in_a_tsv_name_file_and_line(tmp_path, content, message):
    put(tmp_path, "train.tsv", content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path), "train", SST2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", 'a,b,y\n1,2,3\n"open,2,3\n', r"train.csv:\d: not valid CSV"),
        ("train.csv", "a,b,y\n1,2,3\n1,2,3,4\n", r"train.csv:3: has 4 field\(s\)"),
        ("train.jsonl", '{"a": "1", "b": "2", "y": 0}\n{"a": \n', "train.jsonl:2: not valid JSON"),
        ("train.jsonl", '{"a": "1", "y": 0}\n', "train.jsonl:1: has no column 'b'"),
        ("train.jsonl", '{"a": "x \\ud83d", "b": "2", "y": 0}\n', "train.jsonl:1: a contains an unpaired surrogate"),
        ("train.jsonl", '{"a": "x", "b": "2", "y": "\\u0000"}\n', "train.jsonl:1: y contains a NUL character"),
        (
            "train.jsonl",
            '{"a": ["x"], "b": "2", "y": 0}\n',
            r"train.jsonl:1: a must be text or a finite number, not a list: \['x'\]",
        ),
        ("train.jsonl", "[1]\n", "train.jsonl:1: must be a JSON object"),
        ("train.jsonl", '{"a": null, "b": " ", "y": 0}\n', "train.jsonl:1: a and b are both empty"),
        ("train.parquet", "not parquet", "train.parquet: cannot be read as Parquet"),
    ],
)
def test_errors_in_other_formats_name_file_and_line(tmp_path, name, content, message):
    put(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path), "train", CUSTOM)


@pytest.mark.parametrize(
    ("name", "last", "message"),
    [
        ("train.tsv", b"no label\n", r"train\.tsv:20002: has 1 field\(s\)"),
        ("train.tsv", b"fine\t7", r"train\.tsv:20002: label '7' is not one of the labels: 0, 1"),
        ("train.tsv", b"fine\t\n", r"train\.tsv:20002: label is empty"),
        ("train.tsv", b" \t1\n", r"train\.tsv:20002: sentence is empty"),
        ("train.tsv", b"\xe4\t1\n", r"train\.tsv:20002: byte 0xe4 is not valid UTF-8"),
        ("train.csv", b'"open,1\n', r"train\.csv:20002: not valid CSV"),
        ("train.jsonl", b'{"sentence": 1\n', r"train\.jsonl:20001: not valid JSON"),
    ],
)
def test_an_invalid_last_line_is_found_before_anything_is_written(tmp_path, name, last, message):
    if name.endswith("jsonl"):
        rows = [json.dumps({"sentence": f"text {i}", "label": i % 2}) for i in range(20_000)]
    else:
        rows = [
            {"tsv": "\t", "csv": ","}[name[-3:]].join(row) for row in [("sentence", "label"), *(("a b", "1"),) * 20_000]
        ]
    put(tmp_path, name, "\n".join([*rows, ""]).encode() + last)
    put(tmp_path, "dev.tsv", "sentence\tlabel\nfine\t1\n")
    folder = tmp_path / "made"
    with pytest.raises(UserError, match=message):
        prepare(TaskConfig(data=str(tmp_path)), SST2, None, None, folder, lambda: None, lambda: None)
    assert not folder.exists()


@pytest.mark.parametrize("extension", ["tsv", "csv", "jsonl"])
def test_memory_is_a_few_numbers_per_example(tmp_path, extension):
    def peak(count):
        rows = ({"sentence": f"a film of the number {i}", "label": i % 2} for i in range(count))
        if extension == "jsonl":
            lines = map(json.dumps, rows)
        else:
            mark = {"tsv": "\t", "csv": ","}[extension]
            lines = itertools.chain([f"sentence{mark}label"], (f"{r['sentence']}{mark}{r['label']}" for r in rows))
        (tmp_path / str(count)).mkdir()
        with open(tmp_path / str(count) / f"train.{extension}", "w") as file:
            file.writelines(f"{line}\n" for line in lines)
        tracemalloc.start()
        split = read(str(tmp_path / str(count)), "train", SST2)
        assert len(without(split, replace_ids(split))) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = 5_000, 45_000
    assert (peak(many) - peak(few)) / (many - few) < 80, "bytes per example"


def replace_ids(split):
    """A split of the same size whose ids differ from those of `split`."""
    return Split(split.ids_N + 1, split.texts, split.labels_N, (), "other")


@pytest.mark.parametrize("count", [50, 300])
@pytest.mark.parametrize("text", [("a",), ("a", "b")], ids=["single", "pairs"])
def test_many_classes_keep_their_names(tmp_path, count, text):
    names = [f"intent {i:03d}" for i in range(count)]
    rows = [{"a": f"text {i}", "b": "other", "y": names[-i % count]} for i in range(2 * count)]
    put(tmp_path, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put(tmp_path, "dev.jsonl", json.dumps(rows[7]) + "\n")
    task = Task("custom", text, "y")
    train = read(str(tmp_path), "train", task)
    dev = read(str(tmp_path), "dev", task, train.classes)
    assert train.classes == tuple(names) and task.names_of(train.classes) == names
    assert [train.classes[i] for i in train.labels_N] == [row["y"] for row in rows]
    assert dev.classes == train.classes and dev.labels_N.tolist() == [count - 7]
    put(tmp_path, "test.jsonl", '{"a": "x", "b": "y", "y": "intent"}\n')
    message = error_of(tmp_path, task, "test", train.classes)
    assert message.endswith("intent 008, intent 009, ..."), "not hundreds of names"


@pytest.mark.parametrize(
    ("values", "order"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["1.0", "1", "01"], ["01", "1"]),
        (["2", "nan", "10"], ["10", "2", "nan"]),
    ],
)
def test_the_order_of_classes_is_deterministic(tmp_path, values, order):
    put(tmp_path, "train.jsonl", "".join(json.dumps({"a": "x", "b": "x", "y": v}) + "\n" for v in values))
    assert list(read(str(tmp_path), "train", CUSTOM).classes) == order


def test_minus_one_can_be_a_class(tmp_path):
    put(tmp_path, "train.jsonl", '{"a": "1", "b": "2", "y": -1}\n{"a": "1", "b": "2", "y": 1}\n')
    put(tmp_path, "test.jsonl", '{"a": "1", "b": "2", "y": -1}\n')
    classes = read(str(tmp_path), "train", CUSTOM).classes
    assert read(str(tmp_path), "test", CUSTOM, classes).labels_N.tolist() == [0]
    put(tmp_path, "test.jsonl", '{"a": "1", "b": "2"}\n')
    assert not is_labelled(read(str(tmp_path), "test", CUSTOM, classes).labels_N).any()


def test_a_test_file_with_empty_labels_is_unlabelled(tmp_path):
    put(tmp_path, "test.tsv", "sentence\tlabel\none\t\ntwo\t \n")
    assert not is_labelled(read(str(tmp_path), "test", SST2).labels_N).any()
    put(tmp_path, "test.tsv", "sentence\tlabel\none\t\ntwo\t1\n")
    with pytest.raises(UserError, match=r"test.tsv:2: label is empty"):
        read(str(tmp_path), "test", SST2)


def test_is_labelled_for_numpy_and_torch():
    import torch

    for labels in (np.array([0, -1, 2]), np.array([0.5, np.nan, -1.0], np.float32)):
        assert is_labelled(labels).tolist() == [True, False, True]
        assert is_labelled(torch.from_numpy(labels)).tolist() == [True, False, True]
    for regression in (False, True):
        assert not is_labelled(unlabelled(3, regression)).any()


def test_text_without_labels(tmp_path):
    put(tmp_path, "train.tsv", "sentence\tlabel\none\t0\ntwo\t1\n")
    put(tmp_path, "more.txt", "\ufeffthree\r\n\r\ntwo\r\n four\ttabs\r\nthree")
    put(tmp_path, "more.csv", 'sentence,label\n"five, six",whatever\none,\n')
    more = read_unlabeled([f"{tmp_path}/more.txt", f"{tmp_path}/more.csv"], SST2)
    assert more.texts == (["three", "two", " four\ttabs", "three", "five, six", "one"],)
    assert more.labels_N.dtype == np.int64 and not is_labelled(more.labels_N).any()
    train = read(str(tmp_path), "train", SST2)
    left = without(more, train)
    assert left.texts == (["three", " four\ttabs", "five, six"],)
    assert left.notes == (f"removed 3 of 6 texts: 2 already in {train.source}, 1 repeated",)
    assert not set(left.ids_N) & set(train.ids_N) and len(left.labels_N) == 3
    assert without(left, train) == left
    with pytest.raises(UserError, match=r"more\.csv: no text is left: removed 6 of 6 texts: 6 already in .*give other"):
        without(more, more)


def test_unlabelled_pairs_and_broken_lines(tmp_path):
    put(tmp_path, "more.tsv", "question1\tquestion2\na?\tb?\nno tab\nc?\td?\n")
    more = read_unlabeled([f"{tmp_path}/more.tsv"], GLUE["qqp"])
    assert more.texts == (["a?", "c?"], ["b?", "d?"])
    assert more.notes == ("more.tsv: skipped 1 line without text: 3",)
    put(tmp_path, "score.jsonl", '{"sentence1": "a", "sentence2": "b"}\n')
    assert np.isnan(read_unlabeled([f"{tmp_path}/score.jsonl"], GLUE["stsb"]).labels_N).all()


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("none.txt", None, SST2, r"^task\.unlabeled: no such file: .*none\.txt$"),
        (".", None, SST2, r"^task\.unlabeled: .* is a folder; name the files in it$"),
        ("more.pdf", "x", SST2, r"^task\.unlabeled: .*more\.pdf is not one of \.txt, \.tsv, \.csv"),
        (
            "more.txt",
            "x",
            GLUE["rte"],
            r"contains single texts, but rte needs pairs; .* columns sentence1 and sentence2$",
        ),
        ("more.txt", "", SST2, r"more\.txt: is empty"),
        ("more.txt", b"fine\n\xff\n", SST2, r"more\.txt:2: byte 0xff is not valid UTF-8"),
        ("more.tsv", "text\nfine\n", SST2, r"more\.tsv:1: has no column 'sentence'"),
        ("more.tsv", "sentence\n", SST2, r"more\.tsv: has no examples"),
        ("more.jsonl", '{"sentence": ""}\n', SST2, r"more\.jsonl:1: sentence is empty"),
    ],
)
def test_errors_in_unlabelled_text(tmp_path, name, content, task, message):
    if content is not None:
        put(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read_unlabeled([f"{tmp_path}/{name}"], task)


def test_a_label_not_seen_in_training(tmp_path):
    put(tmp_path, "dev.jsonl", '{"a": "1", "b": "2", "y": "maybe"}\n')
    message = error_of(tmp_path, CUSTOM, "dev", ("no", "yes"))
    assert "dev.jsonl:1: y 'maybe' is not one of the labels seen in training: no, yes" in message


def test_missing_folder_missing_split_and_duplicate_files(tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere")
    assert "has no split 'train'; expected one of train.tsv, train.csv" in error_of(tmp_path)
    put(tmp_path, "train.tsv", "x")
    put(tmp_path, "train.csv", "x")
    assert "both contain the split train" in error_of(tmp_path)
