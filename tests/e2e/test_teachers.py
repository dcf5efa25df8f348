"""Several teachers, and texts that the teacher is not sure of, through the command line."""

import json
import re

import numpy as np
import torch
from conftest import launch, refused, results, write_config
from families import make_folder
from test_kill import kill_at
from transformers import AutoModelForSequenceClassification

from pkd_dist.data.tokens import open_tokens
from pkd_dist.distillation.cache import map_tensors

EXACT = {"precision": "float32", "dtype": "float32", "shard_rows": 90}


@torch.no_grad()
def mean_probabilities(folders, tokens):
    """The mean of the teachers' probabilities for each example of a token set, (N, C) float64."""
    total = 0.0
    for folder in folders:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        logits = []
        for start, stop in zip(tokens.offsets_N1[:-1], tokens.offsets_N1[1:], strict=True):
            ids = torch.from_numpy(tokens.input_ids_T[start:stop].astype(np.int64))[None]
            logits.append(model(input_ids=ids).logits[0])
        total = total + torch.stack(logits).double().softmax(-1).numpy()
    return total / len(folders)


def cached(folder):
    """Example id -> cached logits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays, _, _ = map_tensors(path)
        found |= dict(zip(arrays["ids"].tolist(), arrays["logits"], strict=True))
    return found


def test_two_seeds_one_cache_and_only_texts_that_the_teacher_is_sure_of(settings, tmp_path):
    settings["teacher"]["finetune"] |= {"seeds": [1, 2], "epochs": 1}
    settings["task"]["augment"] = {"copies": 1}
    settings["train"]["epochs"], settings["cache"] = 1, EXACT | {"dir": str(tmp_path / "cache")}
    config, run = write_config(settings, tmp_path), tmp_path / "run"
    kill_at(run, "teacher-2_checkpoints/step-*/commit.json", "--config", config)
    first = (run / "teacher/model.safetensors").read_bytes()
    done = launch("--config", config, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "teacher-2: resuming from step" in done.stdout
    assert (
        (run / "teacher/model.safetensors").read_bytes() == first != (run / "teacher-2/model.safetensors").read_bytes()
    )
    assert not list(run.glob("teacher*_checkpoints"))

    folders, train = [run / "teacher", run / "teacher-2"], open_tokens(run / "data/distill")
    expected, logits = mean_probabilities(folders, train), cached(tmp_path / "cache")
    assert len(logits) == len(train)
    found = np.stack([logits[i] for i in train.ids_N.tolist()]).astype(np.float64)
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-5)

    dev, made = open_tokens(run / "data/dev"), results(run)
    answers = mean_probabilities(folders, dev)
    assert made["teacher"]["accuracy"] == np.mean(answers.argmax(1) == dev.labels_N)
    alone = mean_probabilities(folders[:1], dev).argmax(1)
    assert made["ensemble"]["teachers"] == 2
    assert made["ensemble"]["first"]["dev"]["accuracy"] == np.mean(alone == dev.labels_N)
    student = mean_probabilities([run / "export"], dev).argmax(1)
    assert made["compression"]["agreement"] == np.mean(student == answers.argmax(1))
    assert "the teacher's answers are the mean of 2 teachers" in done.stdout

    again = launch("--config", config, timeout=300)
    assert again.returncode == 0 and "teacher: done\n" in again.stdout and "teacher: runs" not in again.stdout

    # The same teachers, given, use the same cache; a text counts if some class has at least the probability.
    settings["teacher"], settings["run"]["dir"] = (
        {"model": [str(folder) for folder in folders]},
        str(tmp_path / "given"),
    )
    unlabelled = np.asarray(train.labels_N) < 0
    minimum = float(np.round(np.median(expected[unlabelled].max(1)), 4))
    settings["task"]["augment"]["min_confidence"] = minimum
    (tmp_path / "more").mkdir()
    given = launch("--config", write_config(settings, tmp_path / "more"), timeout=300)
    assert given.returncode == 0, given.stdout + given.stderr
    assert json.loads((tmp_path / "given/stages/cache.json").read_text())["outputs"]["built"] == 0
    assert results(tmp_path / "given")["teacher"]["accuracy"] == made["teacher"]["accuracy"]
    left_out = int((expected[unlabelled].max(1) < minimum).sum())
    line = re.search(r"distill: (\d+) of (\d+) unlabeled texts are left out", given.stdout)
    assert (
        line
        and abs(int(line[1]) - left_out) <= 1
        and int(line[2]) == unlabelled.sum()
        and 0 < left_out < unlabelled.sum()
    )
    samples = json.loads((tmp_path / "given/stages/distill.json").read_text())["outputs"]["samples"]
    assert samples == len(train) - int(line[1])


def test_teachers_that_do_not_fit_and_settings_that_exclude_each_other(settings, tmp_path):
    names = ("negative", "positive")
    good = make_folder(tmp_path / "good", "bert", classifier=True, names=names)
    swapped = make_folder(tmp_path / "swapped", "bert", classifier=True, names=names[::-1])
    animals = make_folder(tmp_path / "animals", "electra", classifier=True, names=("cat", "dog"))
    marked = make_folder(tmp_path / "marked", "roberta", classifier=True, names=names)
    config = write_config(settings, tmp_path)
    given = ("--config", config, "teacher.finetune=null")
    cases = {
        f"teacher.model=[{good},{marked}]": rf"teacher\.model: {marked} has another tokenizer than {good}",
        f"teacher.model=[{good},{swapped}]": rf"the outputs of {swapped} \(positive, negative\) are not those of {good} \(neg",
        f"teacher.model=[{good},{animals}]": rf"teacher\.model: {animals}: its classes are cat, dog",
        f"teacher.model=[{good},{tmp_path}/none]": r"teacher\.model: no such folder: .*none",
        f"teacher.model=[{good},{good}]": r"teacher\.model must name at least one model, each once",
    }
    for argument, expected in cases.items():
        line = refused(*given, argument)
        assert re.search(expected, line), line
    augment = "task.augment={copies: 1, min_confidence: 0.9}"
    line = refused("--config", config, augment, "cache.enabled=false")
    assert re.search(
        r"task\.augment\.min_confidence needs the teacher's answers before .* set it to 0, or cache\.enabled", line
    )
    table = "sentence1\tsentence2\tscore\na film\ta plot\t1.5\n"
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(table)
    line = refused("--config", config, augment, "task.name=stsb", f"task.data={tmp_path}")
    assert (
        "task.augment.min_confidence: compares class probabilities, which a regression does not have; set it to 0"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_several_teachers_in_every_step(settings, tmp_path):
    """Without a cache, a regression learns from the mean of two teachers."""
    rng = np.random.default_rng(2)
    words = ["good", "bad", "film", "plot", "dull", "fine", "the"]
    for split, count in (("train", 48), ("dev", 12)):
        pairs = [
            (" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, 3)), rng.uniform(0, 5)) for _ in range(count)
        ]
        lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{score:.2f}" for a, b, score in pairs)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    settings["task"] = {"name": "stsb", "data": str(tmp_path), "max_length": 32}
    settings["teacher"]["finetune"] |= {"seeds": [3, 4], "epochs": 1}
    settings["train"]["epochs"], settings["cache"] = 1, {"enabled": False}
    done = launch("--config", write_config(settings, tmp_path), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    made = results(tmp_path / "run")
    assert made["ensemble"]["teachers"] == 2 and not (tmp_path / "run/cache").exists()
