"""A teacher that is a file of answers, by the real command line."""

import json
import math

import numpy as np
import pyarrow.parquet
import pytest
from conftest import launch, pkd, refused, results, whole_run, write_config

from pkd_dist.evaluation import predictions

FORMATS = ("csv", "jsonl", "parquet")


@pytest.fixture(scope="module")
def run(body, data, tmp_path_factory):
    """A run that learns from predictions alone, and its answers as tables."""
    folder = tmp_path_factory.mktemp("answers")
    settings = whole_run(body, data, folder)
    settings["distill"] = {"beta": 0}
    done = launch("--config", write_config(settings, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in FORMATS:
        made = pkd("answers", folder / "run", "--output", folder / f"answers.{kind}")
        assert made.returncode == 0 and f"{folder / f'answers.{kind}'}: 244 answers" in made.stdout, made.stderr
    made = pkd("answers", folder / "run", "--output", folder / "probabilities.csv", "--probabilities")
    assert made.returncode == 0, made.stderr
    return folder


def test_a_table_in_no_folder_is_refused(run):
    made = pkd("answers", run / "run", "--output", run / "none/answers.csv")
    assert (made.returncode, made.stderr) == (2, f"pkd: --output: no such folder: {run / 'none'}\n")


def answered(run, folder, data, answers, **teacher):
    """Settings of the same run without its teacher."""
    settings = whole_run("unused", data, folder)
    settings["teacher"] = {
        "answers": answers if isinstance(answers, list) else str(answers),
        "answers_are": "logits",
    } | teacher
    settings["student"] = {"init": str(run / "run/student_init")}
    return settings


@pytest.mark.parametrize("kind", FORMATS)
def test_a_student_of_the_table_equals_that_of_the_cache(run, data, tmp_path, kind):
    done = launch("--config", write_config(answered(run, tmp_path, data, run / f"answers.{kind}"), tmp_path))
    assert done.returncode == 0, done.stderr
    assert "they hold no hidden states, so there is no patience term" in done.stdout + done.stderr
    for name in ("export/model.safetensors", "answers.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run / "run" / name).read_bytes(), name


def test_its_results_report_and_card_have_no_teachers_size(run, data, tmp_path):
    """On two ranks, from probabilities."""
    settings = answered(run, tmp_path, data, run / "probabilities.csv", answers_are="probabilities")
    settings["export"] = {"formats": ["safetensors", "onnx-int8"]}
    done = launch("--config", write_config(settings, tmp_path), bare=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deploy " in done.stdout and "x smaller" not in done.stdout and "keeps " in done.stdout
    found, with_model = results(tmp_path / "run"), results(run / "run")
    assert found["teacher"] == {
        key: value for key, value in with_model["teacher"].items() if key in ("accuracy", "accuracy_interval_95")
        or key in ("MCC", "precision", "recall", "f_1", "main_metric", "undefined")
    }  # fmt: skip
    assert found["compression"]["size"] is None and found["compression"]["retention"] is not None
    card = (tmp_path / "run/export/README.md").read_text()
    assert "Distilled from `probabilities.csv`" in card and "The teacher is a file of answers;" in card
    report = (tmp_path / "run/report.html").read_text()
    assert "student of a teacher's answers" in report and "its answers, as probabilities" in report
    logits = [predictions.read(place / "run/answers.safetensors")["dev"].logits["teacher"] for place in (tmp_path, run)]
    shifted = [each - np.log(np.exp(each).sum(axis=1, keepdims=True)) for each in logits]
    np.testing.assert_allclose(*shifted, atol=1e-5)


def test_two_answers_to_one_text_are_refused_where_they_differ(run, data, tmp_path):
    text = next(
        text for text, _ in rows_of(data, "train") if [each for each, _ in rows_of(data, "train")].count(text) == 1
    )
    rows = [(text, 0.5, 0.5) for text, _ in [*rows_of(data, "train"), *rows_of(data, "dev")]]
    for share, status in ((0.5, 0), (0.1, 2)):
        lines = [f"{text},{share},{1 - share}", *(f"{text},{a},{b}" for text, a, b in rows)]
        (tmp_path / "answers.csv").write_text("sentence,negative,positive\n" + "\n".join(lines) + "\n")
        settings = answered(run, tmp_path, data, tmp_path / "answers.csv", answers_are="probabilities")
        done = launch("--config", write_config(settings, tmp_path), "--stages", "data")
        assert done.returncode == status, done.stderr
    assert "contradicts " in done.stderr and "answers.csv:2, the answer to the same text; keep one" in done.stderr


def test_a_comparison_of_students_of_answers(run, data, tmp_path):
    settings = answered(run, tmp_path, data, run / "answers.csv")
    done = pkd(
        "compare", "--config", write_config(settings, tmp_path), "--output", tmp_path / "compare", "--methods", "finetune,kd",
        "--seeds", "1", "train.epochs=1",
    )  # fmt: skip
    assert done.returncode == 0 and "kd" in done.stdout, done.stderr


def rows_of(data, split):
    lines = (data / f"{split}.tsv").read_text().splitlines()[1:]
    return [line.split("\t") for line in lines]


def by_hand(data, folder, write):
    """Write train.csv and dev.csv by `write(text, label)` -> cells."""
    folder.mkdir()
    for split in ("train", "dev"):
        head, *body = write(None, None), *(write(*row) for row in rows_of(data, split))
        (folder / f"{split}.csv").write_text("".join(",".join(map(str, cells)) + "\n" for cells in (head, *body)))
    return f"[{folder / 'train.csv'}, {folder / 'dev.csv'}]"


def test_rows_are_matched_by_order_or_by_text_and_columns_by_name(run, data, tmp_path):
    plain = by_hand(data, tmp_path / "a", lambda text, label: ("negative", "positive") if text is None else (
        1 - 0.1 - 0.8 * int(label), 0.1 + 0.8 * int(label)))  # fmt: skip
    turned = by_hand(data, tmp_path / "b", lambda text, label: ("sentence", "1", "note", "0") if text is None else (
        text, 0.1 + 0.8 * int(label), "x", 1 - 0.1 - 0.8 * int(label)))  # fmt: skip
    settings = answered(run, tmp_path, data, "unused", answers_are="probabilities")
    config = write_config(settings, tmp_path)
    made = []
    for name, files in (("a", plain), ("b", turned)):
        done = launch("--config", config, f"run.dir={tmp_path / f'run-{name}'}", f"teacher.answers={files}")
        assert done.returncode == 0, done.stderr
        made.append((tmp_path / f"run-{name}/export/model.safetensors").read_bytes())
    assert made[0] == made[1]
    teacher = predictions.read(tmp_path / "run-a/answers.safetensors")["dev"].probabilities["teacher"]
    labels = [int(label) for _, label in rows_of(data, "dev")]
    np.testing.assert_allclose(teacher[:, 1], [0.1 + 0.8 * label for label in labels], atol=1e-6)
    lines = [f"{text},0.5,0.5" for text, _ in [*rows_of(data, "train"), *rows_of(data, "dev"), ("of no example", "0")]]
    (tmp_path / "all.csv").write_text("\n".join(["sentence,negative,positive", *lines]) + "\n")
    files = f"[{tmp_path / 'all.csv'}, {plain.strip('[]')}]"
    done = launch("--config", config, f"run.dir={tmp_path / 'c'}", f"teacher.answers={files}", "--stages", "data")
    assert "data: 1 answers belong to no example; they are ignored" in done.stdout
    assert "data: 244 answers are ignored: the file named after the split answers the same examples" in done.stdout
    found = [(tmp_path / run / "data/answers.safetensors").read_bytes() for run in ("run-a", "c")]
    assert found[0] == found[1]


def test_the_likeliest_class_of_an_interface(run, data, tmp_path):
    """Log-probabilities of one class of two, as objects that name it."""
    files = []
    for split in ("train", "dev"):
        rows = [
            {"sentence": text, ("negative", "positive")[int(label)]: math.log(0.7)}
            for text, label in rows_of(data, split)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / f"{split}.jsonl"))
    settings = answered(run, tmp_path, data, files, answers_are="log_probabilities")
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 0, done.stderr
    assert (
        "244 answers lack classes; what their log-probabilities leave of 1 is spread evenly over those" in done.stdout
    )
    teacher = predictions.read(tmp_path / "run/answers.safetensors")["dev"].probabilities["teacher"]
    np.testing.assert_allclose(np.sort(teacher, axis=1), [[0.3, 0.7]] * 41, atol=1e-6)


def test_labels_alone(run, data, tmp_path):
    files = by_hand(
        data,
        tmp_path / "a",
        lambda text, label: ("label",) if text is None else (("negative", "1.0")[int(label)],),
    )
    settings = answered(run, tmp_path, data, "unused", answers_are="labels")
    done = launch("--config", write_config(settings, tmp_path), f"teacher.answers={files}")
    assert done.returncode == 0 and "the class of an answer counts as a probability of 0.999" in done.stdout, (
        done.stderr
    )
    assert results(tmp_path / "run")["teacher"]["accuracy"] == 1


def test_a_regression_in_its_own_unit(body, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 60), ("dev", 20)):
        rows = [f"a film of {'good ' * (i % 7)}plot number {i},{30 + 5 * (i % 7)}" for i in range(count)]
        (folder / f"{split}.csv").write_text("text,score\n" + "\n".join(rows) + "\n")
        values = [f"{30 + 5 * (i % 7)}" for i in range(count)]
        (tmp_path / f"{split}.csv").write_text("prediction\n" + "\n".join(values) + "\n")
    settings = whole_run("unused", folder, tmp_path)
    settings["task"] |= {"name": "custom", "text": ["text"], "label": "score", "kind": "regression"}
    settings["teacher"] = {"answers": [str(tmp_path / "train.csv"), str(tmp_path / "dev.csv")]}
    settings["student"] = {"init": str(body)}
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")["teacher"]["pearson"] == pytest.approx(1)
    made = pkd("answers", tmp_path / "run", "--output", tmp_path / "made.parquet")
    assert made.returncode == 0, made.stderr
    table = pyarrow.parquet.read_table(tmp_path / "made.parquet")
    assert table.column_names == ["id", "prediction"] and table.num_rows == 60, "dev repeats texts of train"
    assert set(np.round(table["prediction"].to_numpy())) == {30, 35, 40, 45, 50, 55, 60}


HEAD, GOOD = "sentence,negative,positive\n", "x{},0.25,0.75\n"
BROKEN = {
    "no file": (None, "teacher.answers: no such file: "),
    "no class column": ("sentence,negative\nx,1\n", "answers.csv:1: has no column 'positive', a class of sst2; it has 'sentence', 'negative'"),
    "no number": (HEAD + "x,0.5,half\n", "answers.csv:2: positive 'half' is not a number"),
    "NaN": (HEAD + "x,0.5,nan\n", "answers.csv:2: positive is nan, not a finite number"),
    "infinite": (HEAD + "x,0.5,inf\n", "answers.csv:2: positive is inf, not a finite number"),
    "empty cell": (HEAD + "x,0.5,\n", "answers.csv:2: positive is empty; every class needs a number"),
    "sum": (HEAD + "x,0.5,0.6\n", "answers.csv:2: the probabilities 0.5, 0.6 sum to 1.1, not to 1"),
    "percent": (HEAD + "x,50,50\n", "answers.csv:2: 50, 50 are not probabilities, which are from 0 to 1; for other numbers set teacher.answers_are"),
    "negative": (HEAD + "x,-0.5,1.5\n", "answers.csv:2: -0.5, 1.5 are not probabilities"),
    "doubled id": ("id,negative,positive\n7,0.5,0.5\n7,0.5,0.5\n", "answers.csv:3: answers the same example as "),
    "id is no number": ("id,negative,positive\nseven,0.5,0.5\n", "answers.csv:2: id 'seven' is not an example id, a whole number"),
    "id too large": ("id,negative,positive\n99999999999999999999,0.5,0.5\n", "answers.csv:2: id 99999999999999999999 has more than 64 bits"),
    "missing rows": (HEAD + GOOD.format(1), "no answer to 203 of 203 examples of train; the first is "),
    "order of no split": ("negative,positive\n0.5,0.5\n", "answers.csv: has neither a column 'id' nor the text, so its name must be that of the split"),
    "wrong count": (("train.csv", "negative,positive\n0.5,0.5\n"), "train.csv: has 1 answers, "),
    "too large": (("answers.csv", HEAD + "x,1e5,0\n", "logits"), "answers.csv:2: 100000, 0 are no logits: the largest that is accepted is 30000"),
    "empty": ("", "answers.csv: is empty"),
    "header alone": (HEAD, "answers.csv: has no answers"),
    "short row": (HEAD + "x,0.5\n", "answers.csv:2: has 2 field(s) where the header names 3"),
    "no table": (("answers.txt", "0.5\n"), "answers.txt is not a table: .csv, .tsv, .jsonl, .json, or .parquet"),
    "no JSON": (("answers.jsonl", "{\n"), "answers.jsonl:1: "),
    "log above 0": (("answers.csv", HEAD + "x,0.5,-1\n", "log_probabilities"), "answers.csv:2: 0.5 is not a log-probability, which is at most 0"),
    "log sum": (("answers.csv", HEAD + "x,-0.1,-0.1\n", "log_probabilities"), "answers.csv:2: the probabilities of these log-probabilities sum to 1.81, more than 1"),
    "no class at all": (("answers.csv", HEAD + "x,,\n", "log_probabilities"), "answers.csv:2: has no log-probability of any class"),
    "unknown label": (("answers.csv", "sentence,label\nx,maybe\n", "labels"), "answers.csv:2: label 'maybe' is not one of the labels: 0, 1"),
    "no label": (("answers.csv", "sentence,class\nx,1\n", "labels"), "answers.csv:1: has no column 'label'; the header names 'sentence', 'class'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gets_one_line(run, data, tmp_path, case):
    content, message = BROKEN[case]
    name, text, *kind = content if isinstance(content, tuple) else ("answers.csv", content)
    if text is not None:
        (tmp_path / name).write_text(text)
    settings = answered(run, tmp_path, data, tmp_path / name, answers_are=kind[0] if kind else "probabilities")
    assert message in refused("--config", write_config(settings, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher.model=x"], "teacher.model is not allowed with teacher.answers"),
        (["teacher.finetune={}"], "teacher.finetune is not allowed with teacher.answers"),
        (["distill.beta=1"], "distill.beta cannot be used with teacher.answers: they hold no hidden states; leave it out, or set it to 0"),
        (["distill.gram=1"], "distill.gram cannot be used with teacher.answers"),
        (["task.augment={copies: 1}"], "task.augment cannot be used with teacher.answers: there is no model to answer new text"),
        (["cache.enabled=false"], "cache.enabled cannot be used with teacher.answers: there is no model to run in every step"),
        (["student.init=teacher_layers"], "student.init teacher_layers needs the shape of a teacher's model"),
        (["teacher.answers=[]"], "teacher.answers must name at least one file"),
        (["teacher={answers_are: logits}"], "teacher.answers_are logits is allowed only with teacher.answers"),
    ],
)  # fmt: skip
def test_what_needs_a_model_is_refused(run, data, tmp_path, arguments, message):
    settings = answered(run, tmp_path, data, run / "answers.csv")
    assert message in refused("--config", write_config(settings, tmp_path), *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--output", "{tmp}/x.txt"], "--output: {tmp}/x.txt is not one of .csv, .jsonl, .parquet"),
        (["{run}", "--output", "{answers}"], "--output: {answers} exists; remove it, or give another name"),
        (["{tmp}", "--output", "{tmp}/x.csv"], "{tmp}: is not a run folder"),
    ],
)
def test_pkd_answers_says_what_is_wrong(run, tmp_path, arguments, message):
    known = {"run": run / "run", "tmp": tmp_path, "answers": run / "answers.csv"}
    done = pkd("answers", *(argument.format(**known) for argument in arguments))
    assert done.returncode == 2 and message.format(**known) in done.stderr, done.stderr
