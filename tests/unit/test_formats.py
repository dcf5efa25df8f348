"""Kinds of tables and values, through `pkd prepare`: each format gives the same examples, or one line that says why not."""

import datetime
import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pkd_dist.cli import main as cli
from pkd_dist.data.sources import digests
from pkd_dist.data.tasks import Task
from pkd_dist.data.text import read
from pkd_dist.files import sha256

HEAD = "text,label\n"
DEV = "text,label\nfine,0\npoor,1\n"
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


def write(folder, files):
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("csv.gz") else content)


def pkd(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def prepare(data, *options, text=("text",), label="label"):
    texts = [part for name in text for part in ("--text", name)]
    return pkd("prepare", "--task", "custom", "--data", data, *texts, "--label", label, *options)


def error(data, **options):
    status, output, line = prepare(data, **options)
    assert status == 2 and not output, output
    *progress, line = line.splitlines()
    assert line.startswith("pkd: ") and (not progress or str(data).startswith("hub:")), line
    return line


def classes(output):
    """The table of classes: class -> examples in train."""
    table = output.partition("\nclass ")[2].splitlines()[2:]
    return {row[0]: int(row[1].partition(" ")[0]) for row in (re.split(r"\s{2,}", line.strip()) for line in table)}


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


LABELS = {
    "list": ([0, 1], r"label must be text or a finite number, not a list: \[0, 1\]"),
    "struct": ({"value": 1}, r"label must be text or a finite number, not an object: \{'value': 1\}"),
    "null": (None, "label is empty"),
    "nan": (NAN, "label is empty"),
    "infinity": (INFINITY, "label must be text or a finite number, not float: inf"),
}


@pytest.mark.parametrize("file", ["train.parquet", "train.jsonl", "train.json", "hub"])
@pytest.mark.parametrize("case", LABELS)
def test_a_label_that_is_no_value_is_rejected_with_its_place(tmp_path, case, file):
    value, message = LABELS[case]
    other = type(value)([1]) if isinstance(value, list) else value if isinstance(value, dict) else 1.0
    rows = [{"text": "a", "label": value}, {"text": "b", "label": other}]
    if file == "train.json":
        content, where = json.dumps(rows), ", row 1"
    else:
        content, where = (json_lines(rows), ":1") if file.endswith("jsonl") else (parquet(rows), ", row 1")
    write(tmp_path, {"train.parquet" if file == "hub" else file: content, "dev.csv": DEV})
    if file == "hub":
        (tmp_path / "dev.csv").unlink()
        write(tmp_path, {"validation.parquet": parquet(rows[1:])})
        if case in ("null", "nan"):  # a missing label of the hub is left out, and counted
            write(tmp_path, {"train.parquet": parquet([*rows, {"text": "c", "label": 0.0}])})
            status, output, _ = prepare(f"hub:{tmp_path}")
            assert status == 0 and "skipped 1 row without a label (label is missing): 1" in output
            return
    line = error(f"hub:{tmp_path}" if file == "hub" else tmp_path)
    assert re.search(rf"train(\.\w+)?{where}: {message}", line), line


@pytest.mark.parametrize("value", [NAN, None, ["a"], {"a": 1}, b"a"], ids=["nan", "null", "list", "struct", "bytes"])
def test_a_text_that_is_no_text_is_rejected_with_its_place(tmp_path, value):
    rows = [{"text": value, "label": 0}, {"text": value, "label": 1}]
    write(tmp_path, {"train.parquet": parquet(rows), "dev.csv": DEV})
    line = error(tmp_path)
    assert re.search(r"train\.parquet, row 1: text (is empty|must be text or a finite number, not )", line), line


def test_numbers_and_texts_of_a_label_are_the_same_class_in_every_format(tmp_path):
    values = [1, 0, 1.0, -0.0, True, False, "1", "0"]
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    as_float = [{**row, "label": float(row["label"])} for row in rows]
    table = "".join(f"text {i}\t{value}\n" for i, value in enumerate(["1.0", "0.0", "1", "0"] * 2))
    contents = {
        "train.jsonl": json_lines(rows), "train.json": json.dumps(rows), "train.parquet": parquet(as_float),
        "train.tsv": f"text\tlabel\n{table}", "train.csv": HEAD + table.replace("\t", ","),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, {name: content, "dev.csv": "text,label\nx,1.0\ny,0\n"})
        status, output, line = prepare(tmp_path / name)
        assert status == 0 and classes(output) == {"0": 4, "1": 4}, output + line


def test_a_column_of_categories_as_pandas_writes_it(tmp_path):
    label = pa.array(["no", "yes"]).dictionary_encode()
    when = pa.array([datetime.datetime(2020, 1, 1)] * 2)
    pq.write_table(pa.table({"text": ["a", "b"], "label": label, "when": when}), tmp_path / "train.parquet")
    write(tmp_path, {"dev.csv": HEAD + "x,no\n"})
    status, output, line = prepare(tmp_path)
    assert status == 0 and classes(output) == {"no": 1, "yes": 1}, line
    assert "columns not used: when" in output
    assert "row 1: when must be text or a finite number, not datetime: " in error(tmp_path, label="when")


@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_the_hub_reads_csv_as_a_folder_does(tmp_path, extension):
    values = ["NA", "null", "None", "007", "1.50", "nan"] * 2
    mark = {"csv": ",", "tsv": "\t"}[extension]
    rows = "".join(f"{i}{mark}{value}\n" for i, value in enumerate(values))
    write(tmp_path, {f"{name}.{extension}": f"text{mark}label\n{rows}" for name in ("train", "validation")})
    write(tmp_path, {f"test.{extension}": "text\nx\ny\n"})  # without a label column
    found = {}
    for data in (str(tmp_path), f"hub:{tmp_path}"):
        status, output, line = prepare(data)
        assert status == 0 and "skipped" not in output and re.search(r"test .*unlabeled\n", output), output + line
        found[data] = classes(output)
    assert found[str(tmp_path)] == found[f"hub:{tmp_path}"] == dict.fromkeys(sorted(set(values)), 2)


def test_a_tsv_of_the_hub_with_lone_quotes_is_read_as_it_is(tmp_path):
    content = 'text\tlabel\n"half a quote\t1\nsay "so"\t0\nanother " one"\t1\n'
    write(tmp_path, {"train.tsv": content, "validation.tsv": content})
    status, output, line = prepare(f"hub:{tmp_path}")
    assert status == 0 and classes(output) == {"0": 1, "1": 2}, output + line


QUOTED = {
    "minimal, as pandas writes it": 'text\tlabel\n"He said ""no"" twice"\t0\nplain\t1\n',
    "a tab and a newline in a field": 'text\tlabel\n"a\tb\tc\nd"\t0\nplain\t1\n',
    "all fields": '"text"\t"label"\n"a"\t"0"\n"b"\t"1"\n',
    "all texts, the header not": 'text\tlabel\n"a"\t0\n"b"\t1\n',
    "compressed": 'text\tlabel\n"a ""b"" c"\t0\nplain\t1\n',
}
RAW = {
    "GLUE's lone quotes": 'text\tlabel\n"half\t0\nsay "yes"\t1\n',
    "one quoted and one with a quote inside": 'text\tlabel\n"a ""b"" c"\t0\nsay "yes"\t1\n',
    "one text in quotes": 'text\tlabel\n"a"\t0\nb\t1\n',
    "a quote that another line closes": 'text\tlabel\n"a\t0\nb"\t1\n',
    "none": "text\tlabel\na\t0\nb\t1\n",
}


@pytest.mark.parametrize("case", [*QUOTED, *RAW])
def test_a_tsv_is_unquoted_where_it_is_quoted_throughout_and_the_note_says_so(tmp_path, case):
    content = (QUOTED | RAW)[case]
    name = "train.tsv.gz" if case == "compressed" else "train.tsv"
    write(tmp_path, {name: gzip.compress(content.encode()) if case == "compressed" else content, "dev.csv": DEV})
    status, output, line = prepare(tmp_path)
    assert status == 0, line
    assert ("fields are quoted as in CSV; the quotes were removed" in output) == (case in QUOTED)
    assert ("quotes are read as text" in output) == (case == "one quoted and one with a quote inside")
    task = Task("custom", ("text",), "label")
    [digest] = digests(str(tmp_path), ["train"], task).values()
    if case != "all fields":  # which no earlier version could read
        assert (digest != sha256(tmp_path / name)) == (case in QUOTED), (
            "a run that was made with the quotes is made again"
        )
    split = read(str(tmp_path), "train", task)
    first = {"minimal, as pandas writes it": 'He said "no" twice', "a tab and a newline in a field": "a\tb\tc\nd",
             "compressed": 'a "b" c'}.get(case, "a")  # fmt: skip
    assert split.texts[0][0] == (first if case in QUOTED else content.split("\n")[1].split("\t")[0])


def test_pairs_may_have_an_empty_half_which_is_counted(tmp_path):
    rows = "".join(f"{'' if i % 3 else 'title'},{'' if i % 3 == 0 else f'body {i}'},{i % 2}\n" for i in range(9))
    write(
        tmp_path, {"train.csv": f"title,body,label\n{rows}", "dev.json": '[{"title": null, "body": "x", "label": 1}]'}
    )
    status, output, line = prepare(tmp_path, text=("title", "body"))
    assert status == 0, line
    assert "title is empty in 6 lines: 3, 4, 6, 7, 9, ..." in output
    assert "body is empty in 3 lines: 2, 5, 8" in output
    assert "title is empty in 1 row: 1" in output
    write(tmp_path, {"train.csv": "title,body,label\na,b,0\n, ,1\n"})
    assert "train.csv:3: title and body are both empty; give one of them a value or remove the line" in error(
        tmp_path, text=("title", "body")
    )
    assert "train.csv:3: title is empty" in error(tmp_path, text=("title",))


@pytest.mark.parametrize(
    "name",
    ["validation.csv", "valid.csv", "val.csv", "dev.csv.gz", "validation.csv.gz", "dev.json", "validation.json"],
)
def test_names_and_kinds_of_files_as_they_come_from_elsewhere(tmp_path, name):
    dev = '[\n {"text": "fine", "label": 0},\n {"text": "poor", "label": 1}\n]' if name.endswith("json") else DEV
    write(tmp_path, {"train.csv.gz": DEV, name: dev})
    status, output, line = prepare(tmp_path)
    assert status == 0 and f"dev: {tmp_path}/{name}" in output, line
    write(tmp_path, {"dev.tsv": "text\tlabel\nx\t0\n"})
    assert re.search(r"both contain the split dev; keep one", error(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a", "label": 0}, {"text": "b"}]', r"train\.json, row 2: has no column 'label'; its keys are 'text'"),
        ('[{"text": "a", "label": 0}\n {"text": "b"}]', r"train\.json:2: not valid JSON: Expecting ',' or '\]'"),
        ('[{"text": "a", "label": 0}] x', r"train\.json:1: not valid JSON: Extra data"),
        ('[{"text": "a", "label": 0},', r"train\.json:1: not valid JSON: Expecting value"),
        ("[]", r"train\.json: has no examples"),
        ('[["a", 0]]', r"train\.json, row 1: must be a JSON object with the keys text, label"),
        ('{\n "text": {"0": "a"}\n}', r"train\.json: must be a list of objects, or one object per line: "),
        ('{"text": {"0": "a"}, "label": {"0": 1}}', r"train\.json:1: text must be text or a finite number, not an object"),
    ],
)  # fmt: skip
def test_errors_in_a_json_document(tmp_path, content, message):
    write(tmp_path, {"train.json": content, "dev.csv": DEV})
    assert re.search(message, error(tmp_path))


def test_a_damaged_gzip_file(tmp_path):
    whole = gzip.compress((HEAD + "some text,0\nother text,1\n" * 500).encode())
    write(tmp_path, {"dev.csv": DEV})
    for content in (whole[: len(whole) // 2], DEV.encode(), whole[:12] + b"\xff" * 20 + whole[32:]):
        (tmp_path / "train.csv.gz").write_bytes(content)
        assert re.search(r"train\.csv\.gz: cannot be decompressed as gzip: ", error(tmp_path))


def test_a_file_as_data_and_a_folder_without_splits(tmp_path):
    write(tmp_path, {"reviews.csv": DEV, "notes.txt": "x"})
    assert "reviews.csv: no example is left for dev: there are 2 examples" in error(tmp_path / "reviews.csv")
    assert "--data: " in error(tmp_path / "notes.txt") and "is a file, but none of .tsv, " in error(
        tmp_path / "notes.txt"
    )
    assert error(tmp_path).endswith("train.json, train.parquet; it contains reviews.csv")


HUGE = "9" * 5001
ODD = {
    "a number of 5,001 digits": ('"id": ' + HUGE, None),
    "a negative one": ('"id": [-' + HUGE + "]", None),
    "a number beyond floats": ('"id": 1e999', None),
    "NaN": ('"id": [NaN, -Infinity]', None),
    "nested deeply": ('"id": ' + "[" * 100_000 + "]" * 100_000, "the JSON is nested too deeply to be read"),
    "objects nested deeply": ('"id": ' + '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "an unpaired surrogate": (r'"id\ud800": "\udfff"', None),
    "repeated in an unused field": ('"id": {"text": 1, "text": 2}', None),
    "an unused key twice": ('"id": 1, "id": 2', None),
    "a used key twice": ('"text": "other"', "has the key 'text' twice; keep one"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("extension", ["jsonl", "json"])
def test_odd_json_beside_the_columns_is_read_or_rejected_with_its_place(tmp_path, case, extension):
    field, message = ODD[case]
    rows = [f'{{"text": "a", "label": 0, {field}}}', '{"text": "b", "label": 1}']
    content, where = ("\n".join(rows), ":1") if extension == "jsonl" else (f"[{','.join(rows)}]", ", row 1")
    write(tmp_path, {f"train.{extension}": content, "dev.csv": DEV})
    if message is None:
        status, output, line = prepare(tmp_path)
        assert status == 0 and classes(output) == {"0": 1, "1": 1}, line
    else:
        assert f"train.{extension}{where}: " in error(tmp_path) and message in error(tmp_path)


def test_class_names_are_shown_as_they_are(tmp_path):
    names = ["[none]", "[/thanks]", "[red]", ":smile:", "a\\", "<b>", "\x1b[31m"]
    rows = [{"text": f"text {i}", "label": name} for i, name in enumerate(names)]
    write(tmp_path, {"train.jsonl": json_lines(rows), "dev.jsonl": json_lines(rows)})
    status, output, line = prepare(tmp_path)
    assert status == 0, line
    assert classes(output) == dict.fromkeys([*sorted(names[:-1]), r"\x1b[31m"], 1)


def test_columns_that_are_not_used_are_named(tmp_path):
    write(tmp_path, {"train.csv": "text,p0,label,p1\na,0.2,0,0.8\nb,0.9,1,0.1\n", "dev.csv": DEV})
    status, output, _ = prepare(tmp_path)
    assert status == 0 and "columns not used: p0, p1\n" in output
    write(tmp_path, {"train.tsv": "index\tsentence\tp0\tlabel\n0\ta\t0.5\t0\n1\tb\t0.5\t1\n"})
    write(tmp_path, {"dev.csv": "sentence,label\na,0\n"})
    (tmp_path / "train.csv").unlink()
    status, output, line = pkd("prepare", "--task", "sst2", "--data", tmp_path)
    assert status == 0 and "columns not used: p0\n" in output, "`index` is GLUE's own"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["prepare", "--kind", "a", "--kind", "b"], "--kind"),
        (["prepare", "--data=a", "--task", "sst2", "--data=a"], "--data"),
        (["predict", "--model", "a", "--file", "b", "--file", "c"], "--file"),
        (["config", "check"], None),
        (["predict", "--pair", "--pair", "a"], None),
        (["export", "--output", "a", "--output", "b"], "--output"),
        (["prepare", "--task", "custom", "--text", "a", "--text", "b", "--label", "c", "--data", "none"], None),
    ],
)
def test_an_option_with_one_value_that_is_given_twice(arguments, option):
    status, output, line = pkd(*arguments)
    assert status == 2
    assert (line == f"pkd: {option} is given twice; it takes one value\n") == (option is not None)
