"""The report: whole, self-contained, and right for every kind of run."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from pkd_dist import report
from pkd_dist.config import Config

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what a page is made of, and that every element is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


def make_run(folder, names=("negative", "positive"), epochs=3, history=True, steps=120, regression=False, **settings):
    """A run folder as the pipeline leaves it before the report; `settings` are sections of the configuration."""
    task = {"name": "stsb"} if regression else {"name": "custom", "text": ["text"], "label": "label"}
    config = Config.model_validate({"run": {"dir": str(folder)}, "task": task, "train": {"epochs": epochs}} | settings)
    resolved = {
        "versions": {"pkd_dist": "0.1.0", "torch": "2.13.0"}, "git_revision": "54e3440", "world_size": 2,
        "launcher": "torchrun", "device": "cpu", "precision": "autocast bfloat16", "teacher_precision": "bfloat16",
        "deepspeed": {"zero_optimization": {"stage": 1}}, "teacher_layers": 6, "student_layers": 3, "patience_pairs": [[1, 2], [2, 4]],
        "beta_mean": 100.0, "beta_sum": 0.1302,
    }  # fmt: skip
    (folder / "stages").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"resolved": resolved}))
    for name, outputs in _outputs(folder, list(names), epochs, history, steps, regression).items():
        marker = {"done": True, "inputs": {}, "outputs": outputs, "seconds": 12.5}
        (folder / "stages" / f"{name}.json").write_text(json.dumps(marker))
    (folder / "stages" / "report.json").write_text(json.dumps({"done": False, "inputs": {}}))
    _write_metrics(folder / "metrics.jsonl", steps, epochs)
    return folder


def _outputs(folder, names, epochs, history, steps, regression):
    rng = np.random.default_rng(0)
    metric = "pearson_spearman" if regression else "accuracy"
    per_epoch = [0.6 + 0.2 * e / epochs for e in range(1, epochs + 1)]
    dev = [
        {"epoch": e + 1, "step": steps * (e + 1) // epochs, metric: v, "main_metric": v}
        for e, v in enumerate(per_epoch)
    ]
    split = {"source": "train.tsv", "examples": 800, "labelled": 800, "tokens": 9000, "longest": 60, "truncated": 0}
    if not regression:
        split["per_class"] = [50] * len(names)
    teacher = 20 * np.eye(len(names), dtype=int) + rng.integers(0, 3, (len(names),) * 2)
    student = (
        teacher
        - np.eye(len(names), dtype=int)
        + np.eye(len(names), k=1, dtype=int)
        + np.eye(len(names), k=1 - len(names), dtype=int)
    )
    sides = {side: _figures(value, regression) for side, value in (("teacher", 0.82), ("student", 0.8))}
    sides["teacher"] |= {"parameters": 22_713_986, "reasoningTime": 180.0}
    kept = {"parameters": 2.0, "size": 2.0, "throughput": 2.06, "retention": 0.976, "agreement": 0.915}
    results = {"task": "t", "split": "dev", "n": 400, **sides, "compression": kept, "splits": {}}
    evaluated = {"results": results}
    if not regression:
        evaluated |= {"confusion_teacher": teacher.tolist(), "confusion_student": student.tolist()}
    names = [] if regression else names
    return {
        "data": {
            "classes": names, "class_names": names, "sets": ["train", "dev"], "train": split,
            "dev": {**split, "source": "dev.tsv"},
        },
        "teacher": {"folder": str(folder / "teacher")} | ({"best_epoch": epochs, "history": dev} if history else {}),
        "cache": {"rows": 800, "built": 1},
        "init": {"made_of": "teacher layers [1, 3, 5] (from 0)", "parameters": 11_000_000},
        "distill": {"best_epoch": epochs, "best_metric": 0.8, "history": dev, "steps": steps, "samples": 7680, "tokens": 90000},
        "evaluate": evaluated,
        "export": {"weights": "x", "largest_difference": 2e-7},
    }  # fmt: skip


def _figures(value, regression):
    out = {
        "parameters": 11_000_000,
        "modelSize": 44.0,
        "reasoningTime": 371.0,
        "latency_ms_p50": 5.1,
        "latency_ms_p99": 9.2,
    }
    if regression:
        return out | {"pearson": value, "spearman": value, "pearson_spearman": value, "main_metric": value}
    scores = {"accuracy": value, "MCC": 0.6, "precision": 0.7, "recall": 0.71, "f_1": 0.72, "main_metric": value}
    return out | scores | {"accuracy_interval_95": [value - 0.02, value + 0.02]}


def _write_metrics(path, steps, epochs):
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            x = step / steps
            losses = {"loss": 1 - x / 2, "loss_ce": 0.7 - x / 2, "loss_ds": 1 - x, "loss_pt": 3e-4 * (1.1 - x)}
            file.write(
                json.dumps({"step": step, "epoch": x * epochs, **losses, "learning_rate": 1e-4 * (1 - x)}) + "\n"
            )
        file.write(json.dumps({"step": steps, "epoch": epochs, "split": "dev", "main_metric": 0.8}) + "\n")


def written(run) -> tuple[str, Page]:
    assert report.write(run) == {"bytes": (run / "report.html").stat().st_size}
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    return html, page


def change(run, stage, edit):
    path = run / "stages" / f"{stage}.json"
    marker = json.loads(path.read_text())
    edit(marker["outputs"])
    path.write_text(json.dumps(marker))


def test_needs_nothing_else(tmp_path):
    html, page = written(make_run(tmp_path / "run"))
    assert html.startswith("<!DOCTYPE html>")
    assert not {"link", "script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#")
    assert "://" not in html and "@import" not in html
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", html))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {place for place in re.findall(r"url\(#([^)]*)\)", html)} <= set(ids)


def test_shows_the_figures(tmp_path):
    html, page = written(make_run(tmp_path / "run"))
    for words in (
        "80.0% accuracy on 400 dev examples: 97.6% of its teacher's 82.0%", "95% interval 78.0% to 82.0%", "91.5%", "2.06×",
        "22,713,986", "180 to 371 sentences/s", "latency at batch 1, p99, ms", "MCC", "100 as mean , 0.1302 as sum",
        "student 1 learns from teacher 2, student 2 learns from teacher 4", "54e3440", "2 on cpu", "ZeRO stage 1",
    ):  # fmt: skip
        assert words in page.text, words
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots) == 4 + 2 + 2 + 3
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in plots)
    assert "#fe01" not in html, "a placeholder colour is left"


def test_is_the_same_each_time(tmp_path):
    run = make_run(tmp_path / "run")
    assert written(run)[0] == written(run)[0]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_per_class_scores_come_from_the_confusion_matrix(tmp_path):
    run = make_run(tmp_path / "run")
    change(
        run,
        "evaluate",
        lambda out: out.update(confusion_student=[[8, 2], [4, 6]], confusion_teacher=[[10, 0], [0, 10]]),
    )
    page = written(run)[1]
    assert "negative 10 1.000 0.667 1.000 0.800 1.000 0.727" in page.text
    assert "positive 10 1.000 0.750 1.000 0.600 1.000 0.667" in page.text


def test_regression(tmp_path):
    page = written(make_run(tmp_path / "run", regression=True))[1]
    assert "0.800 Pearson/Spearman mean" in page.text and "Spearman" in page.text and "squared error" in page.text
    assert "Classes" not in page.text and "95% interval" not in page.text


def test_text_of_the_data_is_escaped(tmp_path):
    html, page = written(make_run(tmp_path / "run", names=("<b>", "$x_1$ & co", "負")))
    assert html.count("<b>") == 5, "only the tiles are bold"
    assert "3 classes (<b>, $x_1$ & co, 負)" in page.text


def test_many_classes(tmp_path):
    names = [f"class number {i}" for i in range(50)]
    run = make_run(tmp_path / "run", names=names)
    matrices = {f"confusion_{side}": np.diag(np.arange(1, 51)).tolist() for side in ("teacher", "student")}
    change(run, "evaluate", lambda out: out.update(matrices))
    html, page = written(run)
    assert "the 20 most frequent of 50 classes" in page.text
    table = html.split('aria-label="Scores of each class"')[1]
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "Confusion" in attrs["aria-label"]]
    assert len(labels) == 2
    for i, name in enumerate(names):
        assert f"{name}</th>" in table
        assert all((f"{name} 100%" in label) == (i >= 30) for label in labels)


@pytest.mark.parametrize("history", [True, False])
def test_one_epoch_and_a_given_teacher(tmp_path, history):
    run = make_run(tmp_path / "run", epochs=1, history=history, steps=1)
    page = written(run)[1]
    assert "1 epoch, 1 step of 32" in page.text
    assert "ring: kept, 80.0%; dashed: teacher, 82.0%" in page.text
    assert ("while it was fine-tuned" in page.text) == history


def change_resolved(run, **fields):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["resolved"] |= fields
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_no_lines(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    page = written(run)[1]
    assert "Total loss" not in page.text and "dev accuracy by epoch" in page.text


def test_terms_without_weight_are_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"loss_pt": 0.0}) + "\n" for line in lines))
    assert "PT, the teacher's layers" not in written(run)[1].text


class TestWarnings:
    @pytest.fixture
    def run(self, tmp_path):
        run = make_run(tmp_path / "run")
        change(run, "distill", lambda out: out.update(best_epoch=2))
        return run

    def shown(self, run):
        return " ".join(report._warnings(report._read(run)))

    def test_none(self, run):
        assert self.shown(run) == ""
        assert "Worth a look" not in written(run)[1].text

    def test_last_epoch(self, run):
        change(run, "distill", lambda out: out.update(best_epoch=3))
        assert "The best epoch is the last one (3)" in self.shown(run)
        assert f"Worth a look {self.shown(run)}" in written(run)[1].text

    def test_truncated(self, run):
        change(run, "data", lambda out: out["train"].update(truncated=8))
        assert "8 of 800 train examples (1.0%) were cut to 128 tokens" in self.shown(run)

    @pytest.mark.parametrize(("counts", "warned"), [([50, 500], False), ([50, 501], True), ([0, 3], True)])
    def test_unbalanced(self, run, counts, warned):
        change(run, "data", lambda out: out["train"].update(per_class=counts))
        assert ("unbalanced" in self.shown(run)) == warned

    def test_much_worse(self, run):
        change(run, "evaluate", lambda out: out["results"]["student"].update(main_metric=0.78))
        assert "4.0 points of accuracy below its teacher" in self.shown(run)

    def test_never_predicted(self, run):
        change(run, "evaluate", lambda out: out.update(confusion_student=[[10, 0], [10, 0]]))
        assert "never predicts positive" in self.shown(run)

    def test_rounded_patience_map(self, run):
        change_resolved(run, teacher_layers=7)
        assert "The teacher's 7 layers do not divide by the student's 3" in self.shown(run)


def test_other_splits_and_text_without_labels(tmp_path):
    run = make_run(tmp_path)

    def more_text(data):
        data["sets"].append("distill")
        data["distill"] = {**data["train"], "examples": 2300}

    def mismatched(out):
        figures = {side: _figures(value, False) for side, value in (("teacher", 0.713), ("student", 0.694))}
        out["results"]["splits"] = {"dev_mismatched": {"n": 1234, **figures, "agreement": 0.877}}

    change(run, "data", more_text)
    change(run, "evaluate", mismatched)
    _, page = written(run)
    assert "What the student read 2,300 examples, 1,500 without a label" in page.text
    assert "dev mismatched, 1,234 examples 71.3% 69.4% 87.7%" in page.text
