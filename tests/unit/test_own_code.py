"""A model folder that brings its own Python code: the code never runs, whatever standard input says."""

import ast
import json

import pytest
from conftest import ROOT, launch, write_config
from families import make_folder
from typer.testing import CliRunner

from pkd_dist.cli.main import app

CODE = """\
from pathlib import Path
Path({trace!r}).write_text("the code of the model ran")
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(BertTokenizerFast):
    pass
"""


@pytest.fixture
def make(tmp_path):
    """Write a folder whose configuration names classes of its own module, and return it with the trace of that module."""

    def write(model_type):
        trace = tmp_path / "trace"
        folder = tmp_path / "model"
        make_folder(folder, "bert", classifier=True)
        (folder / "own.py").write_text(CODE.format(trace=str(trace)))
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
        tokenizer = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
        for name, more in (
            ("config.json", {"auto_map": classes, "model_type": model_type}),
            ("tokenizer_config.json", tokenizer if model_type == "own" else {}),
        ):
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
        return folder, trace

    return write


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "--model", "{}"],
        ["evaluate", "--model", "{}"],
        ["init-student", "--teacher", "{}", "--layers", "0", "--output", "{}-student"],
    ],
)
def test_no_command_runs_it(make, command):
    folder, trace = make("own")
    done = CliRunner().invoke(app, [part.replace("{}", str(folder)) for part in command], input="y\n1\nyes\n")
    assert done.exit_code == 2 and not trace.exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("pkd: no --data")]
    assert len(said) == 1 and "brings its own Python code, which pkd_dist never runs" in done.stderr


def test_a_run_does_not_run_it(make, settings, tmp_path):
    folder, trace = make("own")
    settings["teacher"]["model"] = str(folder)
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 2 and not trace.exists()
    assert "brings its own Python code" in done.stderr and done.stderr.count("\n") == 1


def test_code_that_transformers_has_itself_is_left_out(make):
    folder, trace = make("bert")
    done = CliRunner().invoke(app, ["predict", "--model", str(folder), "good"], input="y\n")
    assert done.exit_code == 0 and json.loads(done.stdout)["text"] == "good" and not trace.exists()


def test_every_loader_is_told_so():
    """`from_pretrained` and `from_config` of an Auto class ask on standard input unless they are given False."""
    calls = [
        (path, node)
        for path in sorted((ROOT / "pkd_dist").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) > 5
    for path, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{call.lineno}"
