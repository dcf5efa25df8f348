"""The report: complete, self-contained and correct for every kind of run."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from run_folders import EXAMPLES, change, figures, make_run, read, rewrite, write_predictions

from pkd_dist.errors import UserError
from pkd_dist.evaluation.calibration import calibrate
from pkd_dist.report import pages
from pkd_dist.report.notices import _on_data, notices

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Collect the tags and text of a page, and check that every element is closed."""

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
    assert pages.write(read(run), run / "report.html") == (run / "report.html").stat().st_size
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    return html, page


def test_is_self_contained(tmp_path):
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


def test_shows_the_results(tmp_path):
    html, page = written(make_run(tmp_path / "run"))
    for words in (
        "90.9 to 11.2 MB", "8.1×", "13.00 to 0.80 ms", "16.2×", "80.0% (78.0 to 82.0)", "22,713,986", "Latency at batch 1, ms", "MCC", "100 as mean , 0.1302 as sum",
        "student 1 learns from teacher 2, student 2 learns from teacher 4", "54e3440", "2 on cpu", "ZeRO stage 1",
    ):  # fmt: skip
        assert words in page.text, words
    table = read(tmp_path / "run").deployment
    assert (
        f"export/onnx/model.int8.onnx , beside its teacher: {table.headline()}." in page.text
        and table.note() in page.text
    )
    for row in (table.head()[1:], *table.cells()):
        assert " ".join(row) in page.text
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots) == 2 + 1 + 6 + 2 + 2 + 3, "trade-offs, layers, curves, speed, matrices, times"
    assert sum("; ONNX int8 " in attrs["aria-label"] or ": ONNX int8 " in attrs["aria-label"] for attrs in plots) == 2
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in plots)
    assert "#fe01" not in html, "a placeholder color is left"


def test_is_deterministic(tmp_path):
    run = make_run(tmp_path / "run")
    assert written(run)[0] == written(run)[0]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def put_predictions(run, labels, **sides):
    """Replace the predictions. For each side give the class of every example, or the (N, C) logits."""
    ids = read(run).dev.ids_N[: len(labels)]
    logits = {side: x if np.ndim(x) == 2 else 9.0 * np.eye(max(labels) + 1)[x] for side, x in sides.items()}
    write_predictions(run, ids, np.asarray(labels), logits)


def test_scores_of_classes_come_from_the_predictions(tmp_path):
    run = make_run(tmp_path / "run")
    labels = [0] * 10 + [1] * 10
    put_predictions(run, labels, teacher=labels, student=[0] * 8 + [1] * 2 + [0] * 4 + [1] * 6)
    page = written(run)[1]
    assert "negative 10 1.000 0.667 1.000 0.800 1.000 0.727" in page.text
    assert "positive 10 1.000 0.750 1.000 0.600 1.000 0.667" in page.text
    assert "both correct 14 (7.0%) only teacher correct 6 (3.0%) only student correct 0 (0.0%)" in page.text, (
        "of 200 scored"
    )


def test_largest_disagreements(tmp_path):
    run = make_run(tmp_path / "run")
    teacher, student = np.zeros((20, 2)), np.zeros((20, 2))
    teacher[7], student[7] = (3.0, 0.0), (0.0, 2.0)  # 95.3% negative; 88.1% positive
    teacher[3], student[3] = (0.0, 1.0), (0.0, 1.5)
    put_predictions(run, [i % 2 for i in range(20)], teacher=teacher, student=student)
    shown = written(run)[1].text.split("Largest disagreements")[1]
    first, second = shown.split("Sentence ")[1:3]
    assert first.startswith("7 of a film that one remembers. label positive teacher negative 95.3% wrong")
    assert "student positive 88.1% correct" in first and second.startswith("3 of a film")
    assert shown.count("of a film that one remembers.") == 12


def test_regression(tmp_path):
    page = written(make_run(tmp_path / "run", regression=True))[1]
    assert "of the teacher's Pearson/Spearman mean (dev)" in page.text and "squared error" in page.text
    assert "Classes" not in page.text and "Correct predictions" not in page.text
    assert "mean absolute error 0.3" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert sum("prediction of" in label and "mean absolute difference" in label for label in labels) == 3, "scatters"


def test_text_of_the_data_is_escaped(tmp_path):
    html, page = written(make_run(tmp_path / "run", names=("<b>", "$x_1$ & co", "負")))
    assert html.count("<b>") == 6 + 5, "only the tiles and the correct predictions are bold"
    assert "3 classes (<b>, $x_1$ & co, 負)" in page.text


def test_many_classes(tmp_path):
    names = [f"class number {i}" for i in range(50)]
    run = make_run(tmp_path / "run", names=names)
    labels = [i for i in range(50) for _ in range(i // 10)] + [49] * (EXAMPLES - 100)
    student = [1 if label == 49 else label for label in labels]
    put_predictions(run, labels, teacher=labels, student=student)
    html, page = written(run)
    assert "the 20 most frequent of 50 classes" in page.text
    assert "The 20 classes with the largest drop of F1" in page.text and "The other 30 classes" in page.text
    assert "class number 49 class number 1 104 0" in page.text, "the most frequent error"
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
    assert "1 epoch, 1 step of batch size 32" in page.text
    assert "ring: best, 80.0%; dashed: teacher, 82.0%" in page.text
    assert ("teacher during fine-tuning" in page.text) == history


def change_resolved(run, **fields):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["resolved"] |= fields
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_without_logged_steps(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    page = written(run)[1]
    assert "Total loss" not in page.text and "Dev accuracy by epoch" in page.text
    assert "Training step" not in page.text and "12.5 s" in page.text


def test_steps_timed_as_a_whole_on_a_gpu(tmp_path):
    """Parts that were not timed have no bars."""
    run = make_run(tmp_path / "run")
    assert "forward pass" in written(run)[1].text and "whole step on the GPU" not in written(run)[1].text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    whole = {"step": 0.002, "data": 0.0, "forward": 0, "backward": 0, "ranks": 0, "optimizer": 0, "device": 0.0018}
    timed = [line if "split" in line else line | {"seconds": whole} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timed))
    page = written(run)[1]
    assert "whole step on the GPU" in page.text and "1.8 ms, 90%" in page.text and "forward pass" not in page.text


def test_unused_loss_terms_are_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "PT: teacher layers" in written(run)[1].text
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"loss_pt": 0.0}) + "\n" for line in lines))
    assert "PT: teacher layers" not in written(run)[1].text


def test_the_divergence_from_the_teacher_is_drawn_where_it_is_known(tmp_path):
    run = make_run(tmp_path / "run", evaluate={"best_by": "divergence"})
    assert "Dev divergence from the teacher" not in written(run)[1].text
    change(run, "distill", lambda out: [entry.update(divergence=0.3 / entry["epoch"]) for entry in out["history"]])
    text = written(run)[1].text
    assert "Dev divergence from the teacher" in text and "ring: best epoch, 0.1" in text
    assert "3, by divergence from the teacher on dev" in text


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

    def test_the_only_epoch(self, run):
        found = read(run)
        config = found.config.model_copy(update={"train": found.config.train.model_copy(update={"epochs": 1})})
        history = found.distillation.history[:1]
        only = replace(found.distillation, history=history, best_epoch=1, best_metric=history[0].main_metric)
        assert "epoch" not in " ".join(notices(replace(found, config=config, distillation=only)))

    def test_stopped_early(self, run):
        change(run, "distill", lambda out: (out["history"].pop(), out.update(best_epoch=1)))
        assert "Training stopped after epoch 2 of 3: dev had not improved since epoch 1" in self.shown(run)

    def test_truncated(self, run):
        change(run, "data", lambda out: out["sets"]["train"].update(truncated=8))
        assert "8 of 800 train examples (1.0%) were truncated to 128 tokens" in self.shown(run)

    @pytest.mark.parametrize(("counts", "warned"), [([50, 500], False), ([50, 501], True), ([0, 3], True)])
    def test_imbalanced(self, run, counts, warned):
        change(run, "data", lambda out: out["sets"]["train"].update(per_class=counts))
        assert ("imbalanced" in self.shown(run)) == warned

    @pytest.mark.parametrize(
        ("metric", "said"),
        [("f1_samples", "Samples F1 says little about rare classes; see the F1"), ("map", "of negative. See the F1")],
    )
    def test_imbalanced_where_a_text_can_have_several_classes(self, run, metric, said):
        change(run, "data", lambda out: out["sets"]["train"].update(per_class=[3, 300]))
        found = read(run)
        assert said in " ".join(_on_data(replace(found, task=replace(found.task, multilabel=True, metric=metric))))

    def test_much_worse(self, run):
        change(run, "evaluate", lambda out: out["results"]["student"].update(main_metric=0.78))
        assert "4.0 points of accuracy below its teacher" in self.shown(run)

    def test_never_predicted(self, run):
        put_predictions(run, [0, 1] * 10, teacher=[0, 1] * 10, student=[0] * 20)
        assert "never predicts positive" in self.shown(run)

    def test_rounded_patience_map(self, run):
        change_resolved(run, teacher_layers=7)
        assert "The teacher's 7 layers are not divisible by the student's 3" in self.shown(run)


class TestMoreWarnings:
    run = TestWarnings.run
    shown = TestWarnings.shown

    def test_overfitting(self, run):
        def fell(out):
            out["history"][-1]["main_metric"] = 0.7
            out["best_metric"] = 0.75

        change(run, "distill", fell)
        expected = "overfitted: epoch 2 of 3 was the best (75.0% on dev, kept), and the last one reached 70.0%"
        assert expected in self.shown(run)
        change(run, "evaluate", lambda out: out["results"]["student"].update(accuracy_interval_95=[0.75, 0.86]))
        assert "overfitted" not in self.shown(run), "5 points are within the interval"

    @pytest.mark.parametrize(
        ("metric", "last", "warned"), [("f1", 0.7, False), ("f1", 0.6, True), ("mcc", 0.7, False), ("mcc", 0.5, True)]
    )
    def test_overfitting_beyond_noise_by_any_metric(self, run, metric, last, warned):
        """200 examples: F1 of 0.75 is known to within 0.06, a correlation of 0.75 to within 0.06."""
        path = run / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": {"metric": metric}}))

        def fell(out):
            out["history"][-1]["main_metric"], out["best_metric"] = last, 0.75

        change(run, "distill", fell)
        assert ("overfitted" in self.shown(run)) == warned

    def test_a_busy_machine(self, run):
        assert "busy" not in self.shown(run)
        change(run, "evaluate", lambda out: out["rates"].update(student=[200.0, 371.0, 380.0]))
        assert "differed by up to 49%: the machine was busy while speed was measured" in self.shown(run)

    def test_few_examples(self, run):
        change(run, "evaluate", lambda out: out["results"]["student"].update(accuracy_interval_95=[0.7, 0.9]))
        assert "200 dev examples determine the accuracy only to within 10.0 points" in self.shown(run)

    def test_a_model_that_learned_nothing(self, run):
        change(run, "evaluate", lambda out: out["results"]["teacher"].update(accuracy=0.5))
        expected = "The teacher's accuracy (50.0%) does not exceed that of always predicting negative (50.0%)"
        assert expected in self.shown(run)

    def test_a_teacher_below_its_student(self, run):
        change(run, "evaluate", lambda out: out["results"]["teacher"].update(main_metric=0.7))
        assert "10.0 points of accuracy above its teacher" in self.shown(run)

    def test_notes_of_the_data(self, run):
        change(run, "data", lambda out: out["sets"]["train"].update(notes=["3 rows without a label are left out"]))
        assert "Train data: 3 rows without a label are left out." in self.shown(run)

    @staticmethod
    def edit_lines(run, edit):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        edit(lines)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def test_steps_skipped_after_overflow(self, run):
        self.edit_lines(run, lambda lines: [lines[i].update(grad_norm=float("inf")) for i in (0, 4)])
        assert "2 of 120 logged steps were skipped because of float16 overflow, most recently step 5." in self.shown(
            run
        )
        written(run)

    def test_records_that_were_lost(self, run):
        self.edit_lines(run, lambda lines: lines.__delitem__(slice(0, 20)))
        assert "metrics.jsonl has 100 of 120 records of steps; the others were lost or altered" in self.shown(run)
        self.edit_lines(run, lambda lines: lines.clear())
        assert "metrics.jsonl has 0 of 120 records" in written(run)[1].text

    def test_scores_that_cannot_be_told(self, run):
        change(run, "evaluate", lambda out: out["results"]["compression"].update(retention=None))
        shown = self.shown(run)
        assert "The teacher has no score above 0, so there is none for the student to retain." in shown
        change(run, "evaluate", lambda out: out["results"]["student"].update(undefined=["MCC", "main_metric"]))
        text = written(run)[1].text
        assert "MCC of the student cannot be told: the labels of dev or its predictions are all alike." in text
        assert "no score above 0" not in text

    def test_waiting_for_data(self, run):
        self.edit_lines(run, lambda lines: [line["seconds"].update(data=0.025) for line in lines[:-1]])
        assert "25.0% of the step time was spent waiting for data." in self.shown(run)

    def test_stops_and_kills(self, run):
        rewrite(run, "distill", lambda marker: marker.update(starts=4, stopped=2))
        shown = self.shown(run)
        assert "The distill stage was stopped by a signal twice and resumed." in shown
        assert (
            "The distill stage was killed or failed once and resumed; its time (12.5 s) excludes those attempts"
            in shown
        )
        assert "Distill stage" not in written(run)[1].text, "some of its time is unknown"


def test_other_splits_and_unlabeled_text(tmp_path):
    run = make_run(tmp_path)

    def more_text(data):
        data["sets"]["distill"] = {**data["sets"]["train"], "examples": 2300}

    def mismatched(out):
        sides = {side: figures(value, False) for side, value in (("teacher", 0.713), ("student", 0.694))}
        out["results"]["splits"] = {"dev_mismatched": {"n": 1234, **sides, "agreement": 0.877}}

    change(run, "data", more_text)
    change(run, "evaluate", mismatched)
    _, page = written(run)
    assert "Text for distillation 2,300 examples, 1,500 without a label" in page.text
    assert "dev mismatched, 1,234 examples 71.3% (69.3% to 73.3%) 69.4% (67.4% to 71.4%) 87.7%" in page.text


def calibrated(run, **splits):
    """Put the calibration of splits of (logits, labels) into the results of a run."""
    found = calibrate({k: v[0] for k, v in splits.items()}, {k: v[1] for k, v in splits.items()})
    change(run, "evaluate", lambda out: out["results"].update(calibration=found))
    return found


def too_sure(scale, n=300):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(n, 2))
    return scale * logits, (rng.random(n) < 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))).astype(int)


def test_calibration(tmp_path):
    run = make_run(tmp_path)
    assert "Calibration" not in written(run)[1].text
    found = calibrated(run, dev=too_sure(3.0), dev_mismatched=too_sure(2.5))
    page = written(run)[1]
    assert f"divided by a temperature of {found['temperature']:.4g}, fitted on dev." in page.text
    for split, name in (("dev", "dev, in-sample"), ("dev_mismatched", "dev mismatched, held out")):
        before, after = found["splits"][split]["before"], found["splits"][split]["after"]
        values = (before["ece"], after["ece"], after["ece_by_chance"], before["nll"], after["nll"])
        assert " ".join([name, "300", *(f"{value:.4f}" for value in values)]) in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert sum(label.startswith("Reliability on dev") and "confidence 9" in label for label in labels) == 2
    assert not [text for text in notices(read(run)) if "temperature" in text]


def test_calibration_that_is_none_or_does_harm_is_worth_a_look(tmp_path):
    run = make_run(tmp_path)
    certain = np.eye(2)[[0, 1, 1]], np.asarray([0, 1, 1])
    calibrated(run, dev=certain)
    expected = "The student is not calibrated: no temperature between 0.05 and 20 makes the labels of dev most likely"
    assert any(text.startswith(expected) for text in notices(read(run))) and expected in written(run)[1].text
    calibrated(run, dev=too_sure(3.0), test=too_sure(0.3))
    harm = [text for text in notices(read(run)) if "makes the labels of test less likely" in text]
    assert len(harm) == 1 and "evaluate.calibrate: false" in harm[0]


def test_damaged_predictions_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    file = run / "answers.safetensors"
    intact = file.read_bytes()
    for content in (intact[:-100], b"", b"words"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"{file}: cannot be read")):
            read(run)
    file.unlink()
    with pytest.raises(UserError, match=re.escape(str(file))):
        read(run)
