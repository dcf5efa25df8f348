"""Every kind of data and teacher on two ranks: the same optimization and the same results as on one."""

import csv

import pytest
from conftest import launch, losses, results, sentences, whole_run, write_config
from test_two_tokenizers import published_kind

from pkd_dist.files import file_digests

TOPICS = {"film": ("film", "movie"), "story": ("plot", "story"), "praise": ("lovely", "superb"), "rare": ("warm",)}


def table(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def without_labels(folder, taught, body):
    """One file of texts in groups, some of them repeated, and a student with a tokenizer of its own."""
    rows = [(text, i % 40) for i, (text, _) in enumerate([*sentences(200, 3), *sentences(20, 3)])]
    task = {"text": ["text"], "label": None, "split": {"group": "author"}, "duplicates": "drop"}
    return {
        "task": {**task, "data": table(folder / "texts.csv", ("text", "author"), rows)},
        "teacher": {"model": str(taught)},
        "student": {"init": published_kind(folder / "own", "roberta", num_hidden_layers=2)},
    }


def calibrated_answers(folder, taught, body):
    """One file that is split, the answers to it by text, some of them wrong, and a calibrated student."""
    rows = sentences(240, 4)
    shares = {text: 0.9 if (label == 1) != (i % 7 == 0) else 0.2 for i, (text, label) in enumerate(rows)}
    answers = [(text, 1 - share, share) for text, share in shares.items() for _ in range(5)]
    return {
        "task": {"text": ["text"], "label": "label", "data": table(folder / "texts.csv", ("text", "label"), rows)},
        "teacher": {"answers": [table(folder / "given.csv", ("text", "0", "1"), answers)]},
        "student": {"init": str(body)},
        "evaluate": {"calibrate": True, "latency_samples": 10},
    }


def several_classes(folder, taught, body):
    """Texts with any number of classes, which are the answers, too."""
    (folder / "data").mkdir()
    files = []
    for split, count, seed in (("train", 150, 1), ("dev", 61, 2)):
        found = [
            (text, "|".join(name for name, words in TOPICS.items() if set(words) & set(text.split())))
            for text, _ in sentences(count, seed)
        ]
        files.append(table(folder / "data" / f"{split}.csv", ("text", "topics"), found))
    return {
        "task": {"kind": "multilabel", "text": ["text"], "label": "topics", "data": str(folder / "data")},
        "teacher": {"answers": files, "answers_are": "labels"},
        "student": {"init": str(body)},
    }


@pytest.mark.parametrize("kind", [without_labels, calibrated_answers, several_classes])
def test_it_is_that_of_one_rank(kind, taught, body, tmp_path):
    settings = whole_run("unused", "unused", tmp_path)
    for section, own in kind(tmp_path, taught, body).items():
        settings[section] = own
    settings["task"] |= {"name": "custom", "max_length": 32}
    settings["student"]["dropout"] = 0.0
    settings["train"]["deepspeed"] = "ds_configs/zero1_fp32.json"
    settings["cache"] |= {"precision": "float32", "dtype": "float32"}
    config = write_config(settings, tmp_path)
    for name, ranks in (("one", 0), ("two", 2)):
        stages = ("--stages", "data,teacher,cache,init,distill,evaluate")
        done = launch("--config", config, f"run.dir={tmp_path / name}", *stages, bare=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert file_digests(two / "data") == file_digests(one / "data"), "parts, tokens of both models, and answers"
    one, two = results(one), results(two)
    assert two["n"] == one["n"] and two["splits"].keys() == one["splits"].keys()
    assert two["main_metric"] == pytest.approx(one["main_metric"], abs=1.5 / one["n"])
    for figures in ("calibration", "multilabel"):
        assert (figures in one) == (figures in two)
    if "calibration" in one:
        assert two["calibration"]["temperature"] == pytest.approx(one["calibration"]["temperature"], rel=1e-2)
    if "multilabel" in one:
        for side, thresholds in one["multilabel"]["thresholds"].items():
            assert two["multilabel"]["thresholds"][side] == pytest.approx(thresholds, abs=0.01)
