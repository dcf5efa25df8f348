"""The report: whole, self-contained, and right for every kind of run."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from run_folders import EXAMPLES, change, figures, make_run, write_answers

from pkd_dist.errors import UserError
from pkd_dist.report import pages
from pkd_dist.report.notices import notices
from pkd_dist.report.runs import read

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


def written(run) -> tuple[str, Page]:
    assert pages.write(run) == {"bytes": (run / "report.html").stat().st_size}
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    return html, page


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
        "80.0% accuracy on 200 dev examples: 97.6% of its teacher's 82.0%", "95% interval 78.0% to 82.0%", "91.5%", "2.06×",
        "22,713,986", "180 to 371 sentences/s", "latency at batch 1, p99, ms", "MCC", "100 as mean , 0.1302 as sum",
        "student 1 learns from teacher 2, student 2 learns from teacher 4", "54e3440", "2 on cpu", "ZeRO stage 1",
    ):  # fmt: skip
        assert words in page.text, words
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots) == 1 + 6 + 2 + 2 + 3, "layers, curves, speed, matrices, times"
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in plots)
    assert "#fe01" not in html, "a placeholder colour is left"


def test_is_the_same_each_time(tmp_path):
    run = make_run(tmp_path / "run")
    assert written(run)[0] == written(run)[0]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def put_answers(run, labels, **sides):
    """Lets both models answer so, of each side the class of every example or the (N, C) logits."""
    ids = read(run).answers["dev"].ids_N[: len(labels)]
    logits = {side: x if np.ndim(x) == 2 else 9.0 * np.eye(max(labels) + 1)[x] for side, x in sides.items()}
    write_answers(run, ids, np.asarray(labels), logits)


def test_per_class_scores_come_from_the_answers(tmp_path):
    run = make_run(tmp_path / "run")
    labels = [0] * 10 + [1] * 10
    put_answers(run, labels, teacher=labels, student=[0] * 8 + [1] * 2 + [0] * 4 + [1] * 6)
    page = written(run)[1]
    assert "negative 10 1.000 0.667 1.000 0.800 1.000 0.727" in page.text
    assert "positive 10 1.000 0.750 1.000 0.600 1.000 0.667" in page.text
    assert "both right 14 (7.0%) teacher alone 6 (3.0%) student alone 0 (0.0%)" in page.text, "shares of the 200 scored"


def test_the_examples_on_which_they_differ_most(tmp_path):
    run = make_run(tmp_path / "run")
    teacher, student = np.zeros((20, 2)), np.zeros((20, 2))
    teacher[7], student[7] = (3.0, 0.0), (0.0, 2.0)  # 95.3% negative; 88.1% positive
    teacher[3], student[3] = (0.0, 1.0), (0.0, 1.5)
    put_answers(run, [i % 2 for i in range(20)], teacher=teacher, student=student)
    told = written(run)[1].text.split("Where they differ most")[1]
    first, second = told.split("Sentence ")[1:3]
    assert first.startswith("7 of a film that one remembers. label positive teacher negative 95.3% wrong")
    assert "student positive 88.1% right" in first and second.startswith("3 of a film")
    assert told.count("of a film that one remembers.") == 12


def test_regression(tmp_path):
    page = written(make_run(tmp_path / "run", regression=True))[1]
    assert "0.800 Pearson/Spearman mean" in page.text and "Spearman" in page.text and "squared error" in page.text
    assert "Classes" not in page.text and "95% interval" not in page.text and "Who is right" not in page.text
    assert "mean absolute error 0.3" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert sum("on average" in label and "value against" in label for label in labels) == 3, "scatters"


def test_text_of_the_data_is_escaped(tmp_path):
    html, page = written(make_run(tmp_path / "run", names=("<b>", "$x_1$ & co", "負")))
    assert html.count("<b>") == 5 + 5, "only the tiles and who is right are bold"
    assert "3 classes (<b>, $x_1$ & co, 負)" in page.text


def test_many_classes(tmp_path):
    names = [f"class number {i}" for i in range(50)]
    run = make_run(tmp_path / "run", names=names)
    labels = [i for i in range(50) for _ in range(i // 10)] + [49] * (EXAMPLES - 100)
    student = [1 if label == 49 else label for label in labels]
    put_answers(run, labels, teacher=labels, student=student)
    html, page = written(run)
    assert "the 20 most frequent of 50 classes" in page.text
    assert "The 20 classes whose F1 lost most" in page.text and "The other 30 classes" in page.text
    assert "class number 49 class number 1 104 0" in page.text, "the most frequent mistake"
    plots = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "Confusion" in attrs["aria-label"]]
    assert len(plots) == 2
    first, others = html.split('aria-label="Scores of')[1:]
    for i, name in enumerate(names):
        assert (f"{name}</th>" in first) != (f"{name}</th>" in others)
        assert (f"{name} 100%" in plots[0]) == (i >= 30)
    assert "class number 49</th>" in first and "class number 49 0%" in plots[1]


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
    assert "Total loss" not in page.text and "Dev accuracy by epoch" in page.text
    assert "A training step" not in page.text and "12.5 s" in page.text


def test_a_step_that_a_gpu_did_whole(tmp_path):
    """The parts that were not timed are not among its bars."""
    run = make_run(tmp_path / "run")
    assert "forward pass" in written(run)[1].text and "all of it on the GPU" not in written(run)[1].text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    whole = {"step": 0.002, "data": 0.0, "forward": 0, "backward": 0, "ranks": 0, "optimizer": 0, "device": 0.0018}
    timed = [line if "split" in line else line | {"seconds": whole} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timed))
    page = written(run)[1]
    assert "all of it on the GPU" in page.text and "1.8 ms, 90%" in page.text and "forward pass" not in page.text


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
        return " ".join(notices(read(run)))

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
        put_answers(run, [0, 1] * 10, teacher=[0, 1] * 10, student=[0] * 20)
        assert "never predicts positive" in self.shown(run)

    def test_rounded_patience_map(self, run):
        change_resolved(run, teacher_layers=7)
        assert "The teacher's 7 layers do not divide by the student's 3" in self.shown(run)


class TestMoreWarnings:
    run = TestWarnings.run
    shown = TestWarnings.shown

    def test_overfitting(self, run):
        def fell(out):
            out["history"][-1]["main_metric"] = 0.7
            out["best_metric"] = 0.75

        change(run, "distill", fell)
        assert "It overfitted: epoch 2 of 3 was the best (75.0% on dev, kept) and the last one has 70.0%" in self.shown(
            run
        )

    def test_few_examples(self, run):
        change(run, "evaluate", lambda out: out["results"]["student"].update(accuracy_interval_95=[0.7, 0.9]))
        assert "200 dev examples tell an accuracy only to within 10.0 points" in self.shown(run)

    def test_a_model_that_learned_nothing(self, run):
        change(run, "evaluate", lambda out: out["results"]["teacher"].update(accuracy=0.5))
        assert "The teacher's accuracy (50.0%) is not above that of always answering negative (50.0%)" in self.shown(
            run
        )

    def test_a_teacher_below_its_student(self, run):
        change(run, "evaluate", lambda out: out["results"]["teacher"].update(main_metric=0.7))
        assert "10.0 points of accuracy above its teacher" in self.shown(run)

    def test_notes_of_the_data(self, run):
        change(run, "data", lambda out: out["train"].update(notes=["3 rows without a label are left out"]))
        assert "Train data: 3 rows without a label are left out." in self.shown(run)

    @staticmethod
    def edit_lines(run, edit):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        edit(lines)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def test_steps_skipped_for_the_loss_scale(self, run):
        self.edit_lines(run, lambda lines: [lines[i].update(grad_norm=float("inf")) for i in (0, 4)])
        assert "2 of 120 logged steps were skipped while the loss scale fell, the last one step 5." in self.shown(run)
        written(run)

    def test_waiting_for_data(self, run):
        self.edit_lines(run, lambda lines: [line["seconds"].update(data=0.025) for line in lines[:-1]])
        assert "25.0% of a step went into waiting for data." in self.shown(run)

    def test_stops_and_kills(self, run):
        path = run / "stages/distill.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"starts": 4, "stopped": 2}))
        shown = self.shown(run)
        assert "The stage distill was stopped by a signal twice and went on." in shown
        assert "The stage distill ended early once, killed or by an error, and went on" in shown
        assert "The stage distill 12.5 s" not in written(run)[1].text, "its time is not known whole"


def test_other_splits_and_text_without_labels(tmp_path):
    run = make_run(tmp_path)

    def more_text(data):
        data["sets"].append("distill")
        data["distill"] = {**data["train"], "examples": 2300}

    def mismatched(out):
        sides = {side: figures(value, False) for side, value in (("teacher", 0.713), ("student", 0.694))}
        out["results"]["splits"] = {"dev_mismatched": {"n": 1234, **sides, "agreement": 0.877}}

    change(run, "data", more_text)
    change(run, "evaluate", mismatched)
    _, page = written(run)
    assert "What the student read 2,300 examples, 1,500 without a label" in page.text
    assert "dev mismatched, 1,234 examples 71.3% (69.3% to 73.3%) 69.4% (67.4% to 71.4%) 87.7%" in page.text


class TestComparison:
    @pytest.fixture
    def runs(self, tmp_path):
        first = make_run(tmp_path / "runs/kd", distill={"beta": 0.0})
        return [first, make_run(tmp_path / "runs/pkd", seed=5)]

    def page(self, runs):
        output = runs[0].parent / "page.html"
        pages.write_comparison(runs, output)
        html = output.read_text(encoding="utf-8")
        return html, Page(html)

    def test_side_by_side(self, runs):
        html, page = self.page(runs)
        first, second = (
            (x.predicted["student"] == x.labels_N).astype(float) for x in (read(r).answers["dev"] for r in runs)
        )
        apart = second - first
        half = 1.96 * apart.std(ddof=1) / np.sqrt(EXAMPLES)
        assert f"minus the first (95%) {100 * apart.mean():+.1f} ± {100 * half:.1f} points" in page.text
        assert "accuracy (95% interval) 80.0% (78.0% to 82.0%) 80.0% (78.0% to 82.0%)" in page.text
        assert "distill.beta 0 100" in page.text and "distill.alpha" not in page.text, "what differs, and that alone"
        assert "://" not in html and "#fe01" not in html and not page.open
        assert len([tag for tag, _ in page.tags if tag == "svg"]) == 1 + 1 + 4

    def test_again_over_its_own_page(self, runs):
        assert self.page(runs)[0] == self.page(runs)[0]

    def test_regression(self, tmp_path):
        made = [make_run(tmp_path / f"runs/{seed}", regression=True, seed=seed) for seed in (1, 2, 3)]
        assert "Pearson 0.800 0.800 0.800" in self.page(made)[1].text

    def refusal(self, runs, output=None):
        with pytest.raises(UserError) as refused:
            pages.write_comparison(runs, output or runs[0].parent / "page.html")
        assert "\n" not in str(refused.value)
        assert not (runs[0].parent / "page.html").exists()
        return str(refused.value)

    def test_one_run_the_same_twice_or_too_many(self, runs):
        assert "give at least two run folders" in self.refusal(runs[:1])
        assert f"{runs[0]} is named twice" in self.refusal([runs[0], runs[1] / ".." / "kd"])
        assert "9 runs are more than the 8 that a page can tell apart" in self.refusal(runs * 4 + runs[:1])

    def test_what_is_no_run(self, runs, tmp_path):
        assert f"{tmp_path}: is not a run folder" in self.refusal([runs[0], tmp_path])
        assert "nothing: is not a run folder" in self.refusal([runs[0], tmp_path / "nothing"])
        config = yaml.safe_load((runs[1] / "config.yaml").read_text())
        del config["resolved"]
        (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
        assert "has no section `resolved`" in self.refusal(runs)
        (runs[1] / "config.yaml").write_text("run: {dir: x, colour: red}\n")
        assert f"{runs[1] / 'config.yaml'}:1: run.colour: unknown key" in self.refusal(runs)

    def test_what_is_not_finished(self, runs):
        marker = runs[1] / "stages/evaluate.json"
        whole = marker.read_text()
        marker.write_text('{"done": false, "inputs": {}}')
        told = self.refusal(runs)
        assert "pkd: its evaluation is not done (stages that are: cache, data, distill" in told
        assert f"run launcher/train.py --config {runs[1] / 'config.yaml'}" in told
        for content in (whole[:40], "{}", "[]", '{"done": true}', "[" * 100_000):
            marker.write_text(content)
            assert f"{marker}: cannot be read" in self.refusal(runs)

    def test_what_is_damaged(self, runs):
        said = runs[1] / "answers.safetensors"
        whole = said.read_bytes()
        for content in (whole[:-100], b"", b"words"):
            said.write_bytes(content)
            assert f"{said}: cannot be read" in self.refusal(runs)
        said.unlink()
        assert f"{said}: is missing" in self.refusal(runs)
        said.write_bytes(whole)
        lines = runs[1] / "metrics.jsonl"
        whole = lines.read_text()
        for line in ("words", "{}", "[1]", '{"step": 2, "loss": "x"}', "[" * 100_000):
            lines.write_text(f"{whole}{line}\n")
            assert f"{lines}, line {whole.count(chr(10)) + 1}: is not a record" in self.refusal(runs)

    def test_what_cannot_be_compared(self, runs, tmp_path):
        other = make_run(tmp_path / "runs/other", names=("a", "b"))
        assert "their classes differ" in self.refusal([runs[0], other])
        other = make_run(tmp_path / "more/runs", regression=True)
        assert "different metrics chose their epochs (accuracy and Pearson/Spearman mean)" in self.refusal(
            [runs[0], other]
        )
        config = yaml.safe_load((runs[1] / "config.yaml").read_text())
        (runs[1] / "config.yaml").write_text(yaml.safe_dump(config | {"task": {"name": "cola"}}))
        assert "they are of different tasks (custom and cola)" in self.refusal(runs)
        (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
        put_answers(runs[1], [0, 1] * 10, teacher=[0, 1] * 10, student=[0] * 20)
        assert "they were scored on different dev data (200 and 20)" in self.refusal(runs)

    def test_a_file_that_is_something_else_stays(self, runs, tmp_path):
        mine = tmp_path / "mine.html"
        mine.write_text("mine")
        assert f"--output: {mine} is there, and is not a report" in self.refusal(runs, mine)
        assert mine.read_text() == "mine"
        assert "is there, and is not a report" in self.refusal(runs, tmp_path)
        assert "no such folder" in self.refusal(runs, tmp_path / "nowhere/page.html")
