"""`pkd prepare` through the real command line."""

import json
import re

import pytest
from glue_folders import FOLDERS, put
from typer.testing import CliRunner

from pkd_dist.cli import main as cli
from pkd_dist.cli.options import OPTIONS
from pkd_dist.config.task import FileSplit
from pkd_dist.data.tasks import GLUE


def pkd(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def row(output, first):
    """The cells of the table row that starts with `first`."""
    line = next(line for line in output.splitlines() if re.match(rf"{re.escape(first)}\s\s", line))
    return re.split(r"\s{2,}", line.strip())[1:]


@pytest.mark.parametrize(
    "command", ["prepare", "finetune", "cache", "init-student", "distill", "evaluate", "export", "report", "config"]
)
def test_every_command_has_help(command):
    status, output, _ = pkd(command, "--help")
    assert status == 0 and "Usage" in output


def test_errors_name_the_option_of_each_key_of_the_split():
    assert {f"task.split.{key}" for key in FileSplit.model_fields} == {key for key in OPTIONS if "split." in key}
    status, _, error = pkd("prepare", "--data", "data/movie-reviews/dev.tsv", "--split-setting", "test=2")
    assert (status, error) == (2, "pkd: --split-setting test: 2 is invalid; allowed: number >= 0, < 1\n")
    status, _, error = pkd("prepare", "--data", "data/movie-reviews", "--split-setting", "test=0")
    assert status == 2 and error.startswith(
        "pkd: --split-setting: is for one file, and data/movie-reviews has splits; "
    )


def test_help_lists_the_tasks():
    output = re.sub(r"[\s│]+", " ", pkd("prepare", "--help")[1])
    assert ", ".join(GLUE) in output


def test_every_split_of_mnli(tmp_path):
    status, output, _ = pkd("prepare", "--task", "mnli", "--data", put(tmp_path, **FOLDERS["mnli"]))
    assert status == 0
    assert (
        f"dev_mismatched: {tmp_path}/dev_mismatched.tsv\n  skipped 1 line without a label (gold_label is '-'): 2"
        in output
    )
    for name in GLUE["mnli"].splits:
        examples, words, *rest = row(output, name)
        assert (examples, words) == ("3" if name == "train" else "2", "2, 2, 2")
        assert rest[-1] == ("unlabeled" if name.startswith("test") else "3 classes" if name == "train" else "2 classes")
    assert row(output, "neutral") == ["1 (33.3%)", "1 (50.0%)", "1 (50.0%)"], "labeled splits only"


def test_repeats_and_overlap_with_train(tmp_path, body):
    train = ["good\t1", "good\t0", "bad\t0", "so so so\t1", "so so so\t1"]
    dev = ["good\t1", "bad\t1", "new one\t0", "so so so\t0"]
    for name, rows in (("train", train), ("dev", dev), ("test", ["bad", "more words than these"])):
        header = "sentence" if name == "test" else "sentence\tlabel"
        (tmp_path / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n")
    status, output, _ = pkd("prepare", "--data", tmp_path, "--model", body, "--max-length", 4)
    assert status == 0
    assert row(output, "train") == ["5", "1, 3, 3", "2 (1 with another label)", "2 classes", "3, 5; 40.0%"]
    assert row(output, "dev")[1:5] == ["2, 3, 3", "0", "3 (2 with another label)", "2 classes"]
    assert row(output, "test")[1:5] == ["2, 4, 4", "0", "1", "unlabeled"]
    # of the words that do not occur, only "is" is spelled by others: "i" and "##s"
    assert "student.vocabulary: used keeps 64 of 65 tokens" in output


@pytest.mark.parametrize("count", [50, 300])
def test_many_classes_and_regression(tmp_path, count):
    rows = [{"a": f"t {i}", "y": f"intent {i % count}"} for i in range(2 * count)] + [{"a": "t", "y": "intent 7"}]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--task", "custom", "--data", tmp_path, "--text", "a", "--label", "y"]
    status, output, _ = pkd("prepare", *own)
    assert status == 0 and f"{count} classes" in output
    assert row(output, "intent 7")[0].startswith("3 (")
    assert row(output, f"{count - 20} more, 2 to 2 each in train")[0].startswith(f"{2 * (count - 20)} (")
    status, output, _ = pkd("prepare", *own, "--kind", "multilabel")
    assert row(output, f"{count - 20} more, 2 to 2 each in train")[0].endswith(f"({(count - 20) / (count + 0.5):.1%})")
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text('{"a": "x", "y": 1}\n{"a": "y", "y": 4}\n')
    status, output, _ = pkd("prepare", *own, "--kind", "regression")
    assert status == 0 and row(output, "dev")[-1] == "1 to 4, mean 2.50"


@pytest.mark.parametrize("missing", ["train", "dev"])
def test_a_required_split_is_missing(tmp_path, missing):
    files = {name: content for name, content in FOLDERS["rte"].items() if not name.startswith(missing)}
    status, _, error = pkd("prepare", "--task", "rte", "--data", put(tmp_path, **files))
    assert status == 2
    assert error.startswith(f"pkd: --data: {tmp_path} has no split '{missing}'; expected one of {missing}.tsv")
