"""`pkd predict` and `pkd evaluate` on exports: their own length, and the form of their inputs, by the real command line."""

import csv
import dataclasses
import json
import re
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from exports import export, pair_subject, subject
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.export import manifest

LONG = " ".join(["good film plot"] * 70)
"""210 tokens, more than 128."""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Trained at 256 tokens, from a tokenizer that is limited to 64."""
    folder = tmp_path_factory.mktemp("single")
    made = subject(folder, max_position_embeddings=300)
    export(dataclasses.replace(made, max_length=256), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    export(pair_subject(folder), folder / "export")
    return folder / "export"


def pkd(*arguments, status=0, **given):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], **given)
    assert done.exit_code == status, done.output
    return done


def answers(*arguments, **given):
    return [json.loads(line) for line in pkd("predict", *arguments, **given).stdout.splitlines()]


def test_an_export_is_read_at_the_length_it_was_trained_with(single, tmp_path):
    """Words after token 128 count, and the tokenizer cuts where training did."""
    classify = transformers.pipeline("text-classification", str(single), truncation=True, top_k=None)
    wanted = {found["label"]: found["score"] for found in classify([LONG + " bad dull"])[0]}
    older = shutil.copytree(single, tmp_path / "older")  # its tokenizer kept the limit of the teacher's
    settings = json.loads((older / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 256
    (older / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    about = manifest.read(older)
    (older / "manifest.json").unlink()
    manifest.write(older, {key: about[key] for key in about.keys() - {"format_version", "files", "digest"}})
    for folder in (single, older):
        [answer] = answers("--model", folder, LONG + " bad dull")
        assert answer["probabilities"] == pytest.approx(wanted, abs=1e-6) and "truncated" not in answer
    assert answers("--model", single, LONG)[0]["probabilities"] != pytest.approx(wanted, abs=1e-6)


def test_a_text_of_700_words_is_cut_and_the_answer_says_so(single):
    long = "good " * 700
    done = pkd("predict", "--model", single, "fine", long)
    short, cut = map(json.loads, done.stdout.splitlines())
    assert cut["truncated"] is True and "truncated" not in short
    assert done.stderr == "pkd: 1 of 2 texts were truncated to 256 tokens\n"
    classify = transformers.pipeline("text-classification", str(single), truncation=True)  # README.md
    [plain] = classify(long)
    assert (plain["label"], plain["score"]) == (cut["label"], pytest.approx(cut["probability"], abs=1e-6))
    assert answers("--model", single, "--max-length", 300, "good " * 280)[0].get("truncated") is None


def test_evaluate_reads_the_same_length(single, tmp_path):
    (tmp_path / "dev.tsv").write_text(f"sentence\tlabel\n{LONG}\t1\nfine\t0\n{'good ' * 400}\t1\n")
    figures = json.loads(pkd("evaluate", "--model", single, "--data", tmp_path).stdout)
    assert (figures["n"], figures["max_length"], figures["truncated"]) == (3, 256, 1)
    shorter = json.loads(pkd("evaluate", "--model", single, "--data", tmp_path, "--max-length", 100).stdout)
    assert (shorter["max_length"], shorter["truncated"]) == (100, 2)


ROWS = [
    {"id": 7, "a": "good film", "b": "the plot, dull", "label": "other"},
    {"id": 8, "a": "fine", "b": "fine", "label": "same"},
    {"id": 9, "a": "", "b": "only a body", "label": "other"},
]


def write_table(path, rows):
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case suffix:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], delimiter={".csv": ",", ".tsv": "\t"}[suffix])
                writer.writeheader()
                writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_is_read_by_its_columns(pairs, kind, tmp_path):
    """The columns are those of the manifest; the others stay beside the answer."""
    made = answers("--model", pairs, "--file", write_table(tmp_path / f"test.{kind}", ROWS))
    lines = "".join(f"{row['a']}\t{row['b']}\n" for row in ROWS)
    plain = answers("--model", pairs, input=lines)
    typed = kind in ("jsonl", "parquet")
    for row, answer, wanted in zip(ROWS, made, plain, strict=True):
        others = {"id": row["id"] if typed else str(row["id"]), "input_label": row["label"]}
        assert answer == wanted | others | {"probabilities": pytest.approx(wanted["probabilities"], abs=1e-6)} | {
            "probability": pytest.approx(wanted["probability"], abs=1e-6)
        }
        assert (answer["text"], answer["text_pair"]) == (row["a"], row["b"])
        assert set(answer["probabilities"]) == {"other", "same"}


def test_names_of_kept_columns_do_not_depend_on_their_order(single, tmp_path):
    rows = [{"sentence": "a", "label": "L", "input_label": "I"}, {"sentence": "b", "input_label": "I", "label": "L"}]
    made = answers("--model", single, "--file", write_table(tmp_path / "r.jsonl", rows))
    for answer in made:
        assert (answer["input_label"], answer["input_input_label"]) == ("I", "L")


def test_columns_of_other_names(single, pairs, tmp_path):
    rows = [{"text": "x", "review": "good film", "more": [1, None], "score": float("nan")}]
    [answer] = answers("--model", single, "--file", write_table(tmp_path / "r.jsonl", rows), "--text", "review")
    assert answer["text"] == "good film" and answer["input_text"] == "x" and answer["more"] == [1, None]
    assert answer["score"] is None, "NaN is no JSON"
    table = write_table(tmp_path / "p.csv", [{"x": "good", "y": "bad"}])
    [answer] = answers("--model", pairs, "--file", table, "--text", "y", "--text", "x")
    assert (answer["text"], answer["text_pair"]) == ("bad", "good")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "pairs",
            ["one text", "another"],
            "text 1: a pair needs two texts separated by one tab (in a shell, $'one\\ttwo'), but this has 1",
        ),
        ("pairs", ["--file", "{}/p.csv", "--text", "a"], "--text: the model takes pairs of texts, not single texts"),
        ("pairs", ["--file", "{}/p.txt"], "p.txt:1: 'a,b,label' is the header of a table; give the table with --file"),
        ("single", ["--file", "{}/s.txt"], "s.txt:1: 'sentence' is the header of a table; give the table with --file"),
        ("single", ["--file", "{}/late.txt"], "late.txt:3: has a tab, as a pair or a row of a table"),
        ("pairs", ["--file", "{}/other.csv"], "other.csv:1: has no column 'a'; the header names 'x', 'y'"),
        ("pairs", ["--file", "{}/short.csv"], "short.csv:3: has 2 field(s) where the header names 3"),
        ("single", ["--pair", "a\tb"], "--pair: the model takes single texts, not pairs of texts"),
        ("single", ["a\tb"], "text 1: has a tab, as a pair or a row of a table"),
        ("single", ["--file", "{}/p.csv"], "p.csv:1: has no column 'sentence'; the header names 'a', 'b', 'label'"),
        ("single", ["--file", "{}/p.csv", "--text", "a", "--text", "b"], "--text: the model takes single texts"),
        ("single", ["--file", "{}/p.csv", "--text", "a", "--pair"], "--text: 1 column(s); give one for single"),
        ("single", ["a film", "--text", "a"], "--text: names a column of a table; give one with --file (.tsv"),
        ("single", ["--file", "{}/missing.csv"], "missing.csv cannot be read (No such file or directory)"),
        ("single", ["--file", "{}/p.xlsx"], "p.xlsx is neither a table (.tsv, .csv"),
        ("single", ["--file", "{}/P.CSV"], "P.CSV is neither a table (.tsv, .csv"),
        ("teacher", ["--file", "{}/p.csv"], "--text: name the text column of"),
    ],
)
def test_inputs_of_another_form_are_rejected(single, pairs, model, arguments, message, tmp_path):
    (tmp_path / "p.csv").write_text("a,b,label\ngood,bad,other\n")
    (tmp_path / "other.csv").write_text("x,y\ngood,bad\n")
    (tmp_path / "short.csv").write_text("a,b,label\ngood,bad,other\ngood,bad\n")
    (tmp_path / "p.txt").write_text("a,b,label\ngood,bad,other\n")
    (tmp_path / "s.txt").write_text("sentence\ngood\n")
    (tmp_path / "late.txt").write_text("good\nsentence\na\tb\n")
    folder = {"single": single, "pairs": pairs, "teacher": single.parent / "model"}[model]
    done = pkd("predict", "--model", folder, *(a.replace("{}", str(tmp_path)) for a in arguments), status=2)
    assert message in done.stderr and done.stderr.count("\n") == 1
    answered = re.search(r"; the (\d+) input\(s\) before it are answered\n", done.stderr)
    assert (
        done.stdout.count("\n")
        == (int(answered[1]) if answered else 0)
        == {"late.txt:3": 2, "short.csv:3": 1}.get(message.partition(": ")[0], 0)
    )


def test_evaluate_rejects_a_task_of_another_form(pairs, tmp_path):
    done = pkd("evaluate", "--model", pairs, "--task", "sst2", status=2)
    assert "--task: the model takes pairs of texts, not single texts" in done.stderr


def test_an_altered_manifest_is_rejected(single, tmp_path):
    folder = shutil.copytree(single, tmp_path / "altered")
    content = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(content.replace('"max_length": 256', '"max_length": 128'))
    assert "manifest.json: was altered" in pkd("predict", "--model", folder, "fine", status=2).stderr


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_altered_export_gives_no_answer(single, name, tmp_path):
    folder = shutil.copytree(single, tmp_path / "altered")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    for command in (["predict", "fine"], ["evaluate", "--task", "sst2"]):
        done = pkd(command[0], "--model", folder, *command[1:], status=2)
        assert done.stderr.endswith(f"pkd: {folder / name} was altered; export it again\n") and not done.stdout
