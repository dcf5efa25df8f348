"""Multiple choice by the real command line: RACE as published, two ranks, kills, and what other tools make of the export."""

import csv
import html
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TO_EXPORT, launch, losses, pkd, results, started, until, whole_run, write_config
from families import make_folder
from race_folders import make_race, rows, settings
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from pkd_dist.evaluation import predictions
from pkd_dist.metric_names import MAIN_METRIC
from pkd_dist.serve.model import ServedModel

CALM = ("train.deepspeed=ds_configs/zero2_fp32.json", "teacher.finetune.dropout=0", "student.dropout=0")
SLOW = ("train.learning_rate=3e-4", "teacher.finetune.learning_rate=3e-4")
EXACT = ("cache.precision=float32", "cache.dtype=float32")


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    return make_race(tmp_path_factory.mktemp("published") / "RACE")


@pytest.fixture(scope="module")
def run(body, race, tmp_path_factory):
    """On two ranks, with ZeRO 2, calibrated."""
    folder = tmp_path_factory.mktemp("race")
    config = settings(body, race, folder)
    config["train"]["deepspeed"] = "ds_configs/zero2.json"
    config["evaluate"] |= {"calibrate": True}
    config["export"]["formats"] = ["safetensors", "onnx", "onnx-int8", "torch-export"]
    done = launch("--config", write_config(config, folder), bare=2, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def questions(race, split):
    """Each question as published, in the order of the files: its text, itself, its options, the place of the answer."""
    for level in ("high", "middle"):
        for path in sorted((race / split / level).iterdir(), key=lambda path: int(path.stem)):
            text = json.loads(path.read_text())
            for question, options, answer in zip(text["questions"], text["options"], text["answers"], strict=True):
                yield text["article"], question, options, "ABCD".index(answer)


def encoded(tokenizer, article, question, options):
    """What plain transformers makes of one question, (1, C, L)."""
    seconds = [question.replace("_", option) if "_" in question else f"{question} {option}" for option in options]
    inputs = tokenizer(
        [article] * len(options), seconds, truncation="only_first", max_length=40, padding=True, return_tensors="pt"
    )
    return {name: value[None] for name, value in inputs.items()}


@torch.no_grad()
def plain_logits(model, tokenizer, given):
    return np.concatenate([model(**encoded(tokenizer, *question[:3])).logits.numpy() for question in given])


def test_scores_are_those_of_the_answers_and_of_plain_transformers(run, race):
    folder, printed = run
    found, answers = results(folder), predictions.read(folder / predictions.FILE)
    assert found["options"] == 4 and "MCC" not in found and "classes" not in found
    for split, scores in (("dev", found), ("test", found["splits"]["test"])):
        given = list(questions(race, split))
        right = np.array([question[3] for question in given])
        assert (answers[split].labels_N == right).all() and len(set(right)) == 4
        for side, place in (("teacher", "teacher"), ("student", "export")):
            model = AutoModelForMultipleChoice.from_pretrained(folder / place).eval()
            plain = plain_logits(model, AutoTokenizer.from_pretrained(folder / place), given)
            np.testing.assert_allclose(answers[split].logits[side], plain, atol=2e-5)
            assert scores[side]["accuracy"] == scores[side][MAIN_METRIC] == (plain.argmax(axis=1) == right).mean()
            assert 0.6 < scores[side]["accuracy"] < 1, "it learns"
        same = (answers[split].predicted["teacher"] == answers[split].predicted["student"]).mean()
        agreement = scores["agreement"] if split == "test" else found["compression"]["agreement"]
        assert agreement == pytest.approx(same)
    assert "data: 4 options, which labels call A, B, C, D" in printed
    assert "of the teacher's accuracy (dev + test)" in printed


def test_the_export_is_a_model_of_multiple_choice_with_one_output(run):
    folder, _ = run
    for place in ("teacher", "export"):
        config = json.loads((folder / place / "config.json").read_text())
        assert config["architectures"] == ["BertForMultipleChoice"] and config.get("num_labels", 1) == 1
    model = AutoModelForMultipleChoice.from_pretrained(folder / "export")
    assert model.config.num_hidden_layers == 2 and model.classifier.out_features == 1
    manifest = json.loads((folder / "export/manifest.json").read_text())
    assert manifest["options"] == ["options"] and manifest["option_lists"] and manifest["gap"] == "_"
    assert manifest["temperature"] == results(folder)["calibration"]["temperature"] != 1


@pytest.mark.parametrize("options", [4, 3, 2])
def test_onnx_files_take_any_number_of_options(run, race, options):
    folder, _ = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    model = AutoModelForMultipleChoice.from_pretrained(folder / "export").eval()
    for name, far in (("model.onnx", 1e-4), ("model.int8.onnx", 0.2)):
        session = onnxruntime.InferenceSession(folder / "export/onnx" / name, providers=["CPUExecutionProvider"])
        shape = session.get_inputs()[0].shape
        assert len(shape) == 3 and all(isinstance(size, str) for size in shape), "all axes are dynamic"
        for article, question, given, _ in questions(race, "test"):
            inputs = encoded(tokenizer, article, question, given[:options])
            wanted = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
            (logits,) = session.run(["logits"], wanted)
            with torch.no_grad():
                np.testing.assert_allclose(logits, model(**inputs).logits.numpy(), atol=far)
            assert logits.shape == (1, options)


def as_tables(race, folder):
    """The test questions as a table with lists, and as one with a column for each option."""
    given = list(questions(race, "test"))
    lists = [
        {"article": a, "question": q, "options": o, "answer": "ABCD"[r], "id": i}
        for i, (a, q, o, r) in enumerate(given)
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lists)))
    with (folder / "test.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["article", "question", *"wxyz", "answer"])
        table.writerows([a, q, *o, "ABCD"[r]] for a, q, o, r in given)
    return given


def test_every_tool_chooses_the_same_options(run, race, tmp_path):
    folder, _ = run
    given, answers = as_tables(race, tmp_path), predictions.read(folder / predictions.FILE)["test"]
    wanted, sure = answers.predicted["student"].tolist(), answers.probabilities["student"]
    for name, more in (("test.jsonl", ()), ("test.csv", [each for o in "wxyz" for each in ("--options", o)])):
        said = pkd("predict", "--model", folder / "export", "--file", tmp_path / name, *more)
        assert said.returncode == 0, said.stderr
        predicted = [json.loads(line) for line in said.stdout.splitlines()]
        assert [answer["choice"] for answer in predicted] == wanted
        assert [answer["option"] for answer in predicted] == [q[2][i] for q, i in zip(given, wanted, strict=True)]
        assert [answer["options"] for answer in predicted] == [question[2] for question in given]
        np.testing.assert_allclose([answer["probabilities"] for answer in predicted], sure, atol=1e-5)
        assert [answer["answer"] for answer in predicted] == ["ABCD"[question[3]] for question in given], (
            "its columns stay"
        )
    served = ServedModel(folder / "export", "onnx", 1).answer([(a, q, *o) for a, q, o, _ in given])
    np.testing.assert_allclose([answer["probabilities"] for answer in served], sure, atol=1e-4)
    assert [answer.get("truncated") for answer in served] == [answer.get("truncated") for answer in predicted]
    assert any(answer.get("truncated") for answer in served) and not all(answer.get("truncated") for answer in served)


def test_an_option_that_is_too_long_is_read_alike_by_predict_and_serve(run, race, tmp_path):
    folder, _ = run
    given = [question[:3] for question in questions(race, "test")][:5]
    given[2][2][1] = "great " * 60
    table = [{"article": a, "question": q, "options": [*o, "a fifth"]} for a, q, o in given]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, table)))
    said = pkd("predict", "--model", folder / "export", "--file", tmp_path / "long.jsonl")
    assert said.returncode == 0, said.stderr
    predicted = [json.loads(line)["probabilities"] for line in said.stdout.splitlines()]
    served = ServedModel(folder / "export", "onnx", 1).answer([(a, q, *o, "a fifth") for a, q, o in given])
    np.testing.assert_allclose([answer["probabilities"] for answer in served], predicted, atol=1e-4)
    assert served[2]["truncated"] and np.shape(predicted) == (5, 5)


def test_the_student_at_a_checkpoint_can_be_exported(run, tmp_path):
    folder, _ = run
    step = sorted((folder / "checkpoints").glob("step-*"))[-1]
    done = pkd("export", "--from-checkpoint", step, "--output", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert AutoModelForMultipleChoice.from_pretrained(tmp_path / "made").classifier.out_features == 1
    assert json.loads((tmp_path / "made/manifest.json").read_text())["options"] == ["options"]


def test_pkd_evaluate_finds_the_scores_of_the_run(run, race, tmp_path):
    folder, _ = run
    as_tables(race, tmp_path)
    expected = results(folder)["splits"]["test"]["student"]["accuracy"]
    own = ("--task", "custom", "--kind", "multiple_choice", "--text", "article", "--text", "question", "--gap", "_")
    own += ("--label", "answer", "--label-is", "letter", *(each for option in "wxyz" for each in ("--options", option)))
    (tmp_path / "table").mkdir()
    shutil.copy(tmp_path / "test.csv", tmp_path / "table")
    for arguments in (("--task", "race", "--data", race), (*own, "--data", tmp_path / "table")):
        done = pkd("evaluate", "--model", folder / "export", "--split", "test", *arguments)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["accuracy"] == expected and found["n"] == 32 and found["truncated"] > 0
    wrong = pkd("evaluate", "--model", folder / "export", "--split", "test", *own[:-2], "--data", tmp_path / "table")
    assert wrong.returncode == 2 and "test.csv:2: answer 'D' is not one of A, B, C" in wrong.stderr, wrong.stderr


def test_report_and_card_speak_of_options(run):
    folder, _ = run
    page, card = (folder / "report.html").read_text(), (folder / "export/README.md").read_text()
    assert "4 options (A, B, C, D)" in page and "Confusion" not in page and "Calibration" in page
    assert "cross-entropy over the options" in page and "<blockquote>A: " in page
    assert "AutoModelForMultipleChoice.from_pretrained" in card and 'truncation="only_first"' in card
    assert "pipeline_tag: multiple-choice" in card and "(batch, options, length)" in card
    assert "both choose the same option" in card


def test_two_ranks_do_what_one_does(body, race, tmp_path):
    config = write_config(settings(body, race, tmp_path), tmp_path)
    runs = []
    for ranks in (1, 2):
        run = tmp_path / f"run-{ranks}"
        done = launch(
            "--config", config, f"run.dir={run}", *CALM, *SLOW, *EXACT, *TO_EXPORT, bare=ranks if ranks > 1 else 0
        )
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(run)
    one, two = map(losses, runs)
    assert len(one) == 35 and two == pytest.approx(one, rel=1e-4)
    assert abs(results(runs[0])["accuracy"] - results(runs[1])["accuracy"]) <= 1 / 44


def test_the_cache_holds_every_option_and_equals_a_live_teacher(body, race, tmp_path):
    config = write_config(settings(body, race, tmp_path), tmp_path)
    exact = (*CALM, *EXACT, "cache.layers=all")
    cached = launch("--config", config, "--stages", "data,teacher,cache,init,distill", *exact)
    assert cached.returncode == 0, cached.stdout + cached.stderr
    manifest = json.loads((tmp_path / "run/cache/manifest.json").read_text())
    assert manifest["shapes"]["logits"] == ["rows", 4] and manifest["shapes"]["states"] == ["rows", 4, 5, 32]
    before = losses(tmp_path / "run")
    live = launch("--config", config, "--stages", "cache,distill", "cache.enabled=false", *exact)
    assert live.returncode == 0, live.stdout + live.stderr
    # both round the states to float16, and a teacher in float32 is on the edge of two roundings more often
    assert losses(tmp_path / "run") == pytest.approx(before, abs=1e-5)


MOMENTS = {
    "teacher": "teacher_metrics.jsonl:3",
    "cache": "cache/shard-00001.safetensors",
    "distill": "metrics.jsonl:4",
    "committed": "checkpoints/step-*/commit.json",
    "export": ".export.tmp",
}


def test_killed_at_any_moment_the_export_is_the_same(body, race, tmp_path):
    config = write_config(settings(body, race, tmp_path), tmp_path)
    calm = launch("--config", config, f"run.dir={tmp_path / 'calm'}", *TO_EXPORT)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    run = tmp_path / "hunted"
    for moment in MOMENTS.values():
        with started("--config", config, f"run.dir={run}") as job:
            until(moment, run, job)
    end = launch("--config", config, f"run.dir={run}", *TO_EXPORT)
    assert end.returncode == 0, end.stdout + end.stderr
    for name in [
        f"{place}/{file}" for place in ("teacher", "export") for file in ("model.safetensors", "tokenizer.json")
    ]:
        assert (run / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name
    assert losses(run) == losses(tmp_path / "calm")
    again = launch("--config", config, f"run.dir={run}", *TO_EXPORT)
    assert again.returncode == 0 and "distill: runs" not in again.stdout


def write_rows(path, given):
    path.write_text("\n".join(map(json.dumps, given)) + "\n")


def test_one_file_of_ones_own_with_a_given_teacher_and_no_labels(run, tmp_path):
    """Options in lists, groups by context, extra text, a cut vocabulary, and scores that are agreements with the teacher."""
    folder, _ = run
    write_rows(tmp_path / "all.jsonl", rows(90))
    write_rows(tmp_path / "more.jsonl", rows(20, seed=8))
    config = settings(folder / "teacher", tmp_path / "all.jsonl", tmp_path)
    config["task"] |= {"name": "custom", "kind": "multiple_choice", "text": ["context", "question"], "label": None}
    config["task"] |= {
        "options": "options",
        "gap": "_",
        "split": {"group": "context"},
        "unlabeled": [str(tmp_path / "more.jsonl")],
    }
    config["teacher"] = {"model": str(folder / "teacher")}
    config["student"] |= {"vocabulary": "used"}
    done = launch("--config", write_config(config, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path / "run")
    assert found["agreement"] == found["main_metric"] > 0.8 and found["teacher"]["agreement"] == 1
    assert found["options"] == 4 and "data: 4 options, which labels call 0, 1, 2, 3" in done.stdout
    assert json.loads((tmp_path / "run/stages/data.json").read_text())["outputs"]["sets"]["distill"]["examples"] == 92
    written = [json.loads(line) for line in (tmp_path / "run/data/parts/dev.jsonl").read_text().splitlines()]
    assert len(written) == 9 and set(written[0]) == {"context", "question", "options", "right"}
    config["task"] |= {"data": str(tmp_path / "run/data/parts"), "split": None}
    config["run"]["dir"] = str(tmp_path / "again")
    again = launch("--config", write_config(config, tmp_path), "--stages", "data")
    assert again.returncode == 0, again.stdout + again.stderr
    sets = [
        json.loads((tmp_path / name / "stages/data.json").read_text())["outputs"]["sets"] for name in ("run", "again")
    ]
    assert sets[0]["dev"]["digest"] == sets[1]["dev"]["digest"]


def answers_by_id(race, run, table):
    made = pkd("answers", run, "--output", table)
    assert made.returncode == 0 and "A, B, C, D" in made.stdout, made.stderr


def answers_by_text(race, run, table):
    """Probabilities of 0.91 for the right option."""
    with table.open("w") as file:
        for split in ("train", "dev", "test"):
            for article, question, options, right in questions(race, split):
                shares = {letter: 0.91 if i == right else 0.03 for i, letter in enumerate("ABCD")}
                file.write(json.dumps({"article": article, "question": question, "options": options, **shares}) + "\n")


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [(answers_by_id, "answers.csv", "logits"), (answers_by_text, "answers.jsonl", "probabilities")],
)
def test_answers_instead_of_a_teacher(run, race, tmp_path, write, name, kind):
    folder, _ = run
    write(race, folder, tmp_path / name)
    config = settings(folder / "teacher", race, tmp_path)
    config["teacher"] = {"answers": [str(tmp_path / name)], "answers_are": kind}
    config["student"] = {"init": str(folder / "student_init")}
    done = launch("--config", write_config(config, tmp_path), *TO_EXPORT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path / "run")
    expected = results(folder)["teacher"]["accuracy"] if kind == "logits" else 1.0
    assert found["teacher"]["accuracy"] == pytest.approx(expected) and found["student"]["accuracy"] > 0.6


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert"])
def test_a_run_of_each_family(family, race, tmp_path):
    config = settings(make_folder(tmp_path / "model", family), race, tmp_path)
    if family in ("roberta", "distilbert", "electra"):
        config["export"]["formats"].append("onnx")
    config["student"] = {"layers": [0, 3]}
    done = launch("--config", write_config(config, tmp_path), *TO_EXPORT)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, given = tmp_path / "run", list(questions(race, "test"))
    model, tokenizer = (kind.from_pretrained(folder / "export") for kind in (AutoModelForMultipleChoice, AutoTokenizer))
    answers = predictions.read(folder / predictions.FILE)["test"].logits["student"]
    np.testing.assert_allclose(plain_logits(model.eval(), tokenizer, given), answers, atol=2e-5)


@pytest.mark.parametrize(
    "student",
    [{"init": "first_k", "num_layers": 2}, {"init": "random", "num_layers": 1}, {"layers": [0, 2], "hidden_size": 16}],
)
def test_every_way_to_start_a_student(body, tmp_path, student):
    """And two teachers, options in columns, a single text, and labels that are the text of an option."""
    for name, count in (("train", 60), ("dev", 20)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["context", *"wxyz", "right"])
            given = [row for row in rows(count, seed=count) if len(set(row["options"])) == 4]
            table.writerows([row["context"], *row["options"], row["options"][row["right"]]] for row in given)
    config = settings(body, tmp_path, tmp_path)
    config["task"] |= {"name": "custom", "kind": "multiple_choice", "text": ["context"], "label": "right"}
    config["task"] |= {"options": list("wxyz"), "label_is": "text"}
    config["teacher"]["finetune"] |= {"seeds": [1, 2], "epochs": 1}
    config["student"] = student
    config["train"]["epochs"] = 1
    done = launch("--config", write_config(config, tmp_path), *TO_EXPORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "run")["ensemble"]["teachers"] == 2
    AutoModelForMultipleChoice.from_pretrained(tmp_path / "run/export")


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(config, folder, *overrides):
    """The one line of a run that is refused before it writes anything."""
    done = launch("--config", write_config(config, folder), *overrides)
    assert done.returncode == 2 and not (folder / "run").exists(), done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_what_cannot_work_ends_with_one_line_before_anything_is_written(run, body, race, tmp_path):
    folder, _ = run
    config = settings(body, race, tmp_path)
    for override, message in (
        ("task.class_weights=balanced", "task.class_weights cannot be used with task.name race"),
        ("distill.gram=1", "distill.gram cannot be used with task.name race"),
        ("export.formats=[triton]", "export.formats triton cannot be used with task.name race"),
        ("task.augment={copies: 1}", "task.augment cannot be used with task.name race"),
        ("task.data=" + str(folder), "has no split 'train'; expected one of train.tsv"),
        ("teacher.finetune=null", "teacher.model: " + str(body) + " is a BertModel, which does not score options"),
    ):
        assert message in refused(config, tmp_path, override)
    config["task"] |= {"name": "sst2"}
    config["task"]["data"] = "data/movie-reviews"
    config["teacher"] = {"model": str(folder / "export")}
    line = refused(config, tmp_path)
    assert "is a model for multiple choice (BertForMultipleChoice), whose outputs are not classes of a text" in line


def test_commands_say_what_they_need(run, tmp_path):
    folder, _ = run
    as_text = pkd("predict", "--model", folder / "export", "a text")
    assert as_text.returncode == 2 and "--file: the model chooses among options; give a table" in as_text.stderr
    (tmp_path / "bad.jsonl").write_text('{"article": "a", "question": "b", "options": "c"}\n')
    bad = pkd("predict", "--model", folder / "export", "--file", tmp_path / "bad.jsonl")
    assert bad.returncode == 2 and "bad.jsonl:1: options 'c' is not a list of texts" in bad.stderr, bad.stderr
    shutil.copytree(folder / "export", tmp_path / "plain")
    (tmp_path / "plain/manifest.json").unlink()
    plain = pkd("predict", "--model", tmp_path / "plain", "--file", tmp_path / "bad.jsonl", "--text", "article")
    assert plain.returncode == 2 and "--options: is missing" in plain.stderr, plain.stderr


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"article": "", "question": " "}, (), "t.jsonl:1: the text is empty; every input needs one"),
        ({}, ("--options", "w"), 't.jsonl:1: w \'x, y\' is not a list of texts, such as ["a", "b"]; write one, or give a column for each option as --options'),
        ({}, ("--options", "w", "--options", "w"), "--options: 'w' is given twice; options need columns of their own"),
        ({}, ("--options", "w", "--options", "article"), "--options: 'article' is given twice"),
    ],
)  # fmt: skip
def test_a_table_to_predict_is_read_as_training_reads_it(run, tmp_path, change, arguments, message):
    row = {"article": "a", "question": "b", "options": ["x", "y"], "w": "x, y"} | change
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    done = pkd("predict", "--model", run[0] / "export", "--file", tmp_path / "t.jsonl", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def test_a_gap_needs_options(teacher, tmp_path):
    (tmp_path / "t.csv").write_text("a\nthe film\n")
    given = ("--model", teacher, "--file", tmp_path / "t.csv", "--text", "a", "--gap", "_")
    without = pkd("predict", *given)
    assert without.returncode == 2 and "--gap: is the place of an option, but no options are named" in without.stderr
    alone = pkd("predict", *given, "--options", "b")
    assert alone.returncode == 2 and "--gap: is a place in the question, but --text names" in alone.stderr


def test_what_is_printed_speaks_of_options_and_examples(run, race):
    folder, printed = run
    cascade = pkd("cascade", folder, "--agreement", "0.5")
    assert cascade.returncode == 0 and "with the teacher's option" in cascade.stdout, cascade.stderr
    card, page = (html.unescape((folder / name).read_text()) for name in ("export/README.md", "report.html"))
    for said in (" ".join(printed.split()), card, page):
        assert "on which the option is the teacher's" in said and "20 examples each" in said and "sentence" not in said
    assert "when an example is answered in a batch" in card
    assert "summed over options" in page and "then the mean over options" in page


@pytest.mark.parametrize("place", ["teacher", "student"])
def test_a_model_of_multiple_choice_starts_a_classifier(run, body, data, tmp_path, place):
    config = whole_run(body, data, tmp_path)
    config["train"]["epochs"] = config["teacher"]["finetune"]["epochs"] = 1
    if place == "teacher":
        config["teacher"]["model"] = str(run[0] / "teacher")
    else:
        config["student"] = {"init": str(run[0] / "export")}
    done = launch("--config", write_config(config, tmp_path), *TO_EXPORT)
    assert done.returncode == 0, done.stdout + done.stderr
    for made in ("teacher", "export"):
        found = json.loads((tmp_path / "run" / made / "config.json").read_text())
        assert found["architectures"] == ["BertForSequenceClassification"]


def test_pkd_prepare_counts_tokens_of_the_longest_option(body, race):
    done = pkd("prepare", "--task", "race", "--data", race, "--model", body, "--max-length", "40")
    assert done.returncode == 0, done.stderr
    assert "tokens p50, p95; over 40" in done.stdout and "student.vocabulary: used keeps" in done.stdout
