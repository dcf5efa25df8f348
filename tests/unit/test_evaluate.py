"""Scoring: the metrics match scikit-learn and scipy, and each of n examples is scored exactly once."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score
from torch import nn

from pkd_dist.config.schema import Evaluate
from pkd_dist.data.batches import collate
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distributed.ranks import Ranks
from pkd_dist.distributed.world import World
from pkd_dist.evaluation.intervals import wilson_interval
from pkd_dist.evaluation.metrics import agreement, divergence, score, undefined
from pkd_dist.evaluation.results import Speed
from pkd_dist.evaluation.scoring import evaluating, predict_logits, predict_logits_single
from pkd_dist.evaluation.speed import TimedInputs, Timing, measure_speed, timing_threads

EXAMPLES, PAD = 37, 0


@pytest.fixture(scope="module")
def world():
    one = World(Ranks(0, 0, 1, 1, "python"), 60)
    yield one
    one.close()


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 30, size=EXAMPLES))])
    words = rng.integers(1, 60, size=offsets[-1]).astype(np.int32)
    return TokenSet(words, None, offsets, np.arange(EXAMPLES), rng.integers(2, size=EXAMPLES), "", "", 0)


def classes(count, seed=0, n=200):
    """Return logits that are mostly right, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(count, size=n, p=np.arange(1, count + 1) / np.arange(1, count + 1).sum())
    return rng.normal(size=(n, count)).astype(np.float32) + 1.5 * np.eye(count, dtype=np.float32)[labels], labels


@pytest.mark.parametrize(("count", "average"), [(2, "binary"), (3, "macro"), (5, "macro")])
def test_classification_equals_scikit_learn(count, average):
    logits, labels = classes(count)
    predicted = logits.argmax(axis=1)
    task = Task("custom", ("a",), "y", metric="mcc")
    found = score(logits, labels, task)
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "MCC": matthews_corrcoef(labels, predicted),
            "precision": precision_score(labels, predicted, average=average),
            "recall": recall_score(labels, predicted, average=average),
            "f_1": f1_score(labels, predicted, average=average),
            "main_metric": matthews_corrcoef(labels, predicted),
        },
        abs=1e-12,
    )
    assert all(type(value) is float for value in found.values()), "JSON-serialisable"


def test_binary_metrics_by_hand():
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    logits = np.eye(2)[[1, 1, 1, 0, 1, 0, 0, 0, 0, 0]]  # 3 true positives, 1 false negative, 1 false positive
    found = score(logits, labels, GLUE["sst2"])
    assert (found["accuracy"], found["main_metric"]) == (0.8, 0.8)
    assert (found["precision"], found["recall"], found["f_1"]) == (0.75, 0.75, 0.75)
    assert found["MCC"] == pytest.approx((3 * 5 - 1 * 1) / np.sqrt(4 * 4 * 6 * 6))


def test_the_main_metric_is_the_tasks():
    logits, labels = classes(2)
    for metric, key in {"accuracy": "accuracy", "mcc": "MCC", "f1": "f_1"}.items():
        found = score(logits, labels, Task("custom", ("a",), "y", metric=metric))
        assert found["main_metric"] == found[key]


def test_one_predicted_class_counts_as_nothing_learned(recwarn):
    found = score(np.tile([1.0, 0.0], (10, 1)), np.array([0] * 5 + [1] * 5), GLUE["sst2"])
    assert found == {"accuracy": 0.5, "MCC": 0, "precision": 0, "recall": 0, "f_1": 0, "main_metric": 0.5}
    assert not recwarn.list


def test_regression_equals_scipy():
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, size=50).astype(np.float32)
    predicted = (labels + rng.normal(size=50)).astype(np.float32)[:, None]
    found = score(predicted, labels, GLUE["stsb"])
    pearson, spearman = pearsonr(predicted[:, 0], labels).statistic, spearmanr(predicted[:, 0], labels).statistic
    assert found == pytest.approx(
        {
            "pearson": pearson,
            "spearman": spearman,
            "pearson_spearman": (pearson + spearman) / 2,
            "main_metric": (pearson + spearman) / 2,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("n", [1, 10])
def test_a_correlation_that_is_not_defined_is_0(n, recwarn):
    found = score(np.full((n, 1), 2.0), np.arange(n, dtype=np.float32), GLUE["stsb"])
    assert set(found.values()) == {0.0}
    assert not recwarn.list


def test_what_labels_or_predictions_do_not_define_is_named():
    def found(predicted, labels, task=GLUE["sst2"]):
        return undefined(np.asarray(predicted, np.float32), np.asarray(labels), task)

    both, regression = np.eye(2)[[0, 1, 1]], np.asarray([[1.0], [2.0], [3.0]])
    assert found(both, [0, 1, 1]) == []
    assert found(both, [1, 1, 1]) == ["MCC"], "all are positive: F1 is defined"
    assert found(both, [0, 0, 0]) == ["MCC", "precision", "recall", "f_1"]
    assert found(both, [0, 0, 0], GLUE["cola"]) == ["MCC", "precision", "recall", "f_1", "main_metric"]
    assert found(np.eye(3), [2, 2, 2]) == ["MCC"]
    correlations = ["pearson", "spearman", "pearson_spearman", "main_metric"]
    assert found(regression, [1.0, 2.0, 2.0], GLUE["stsb"]) == []
    assert found(regression, [2.0, 2.0, 2.0], GLUE["stsb"]) == correlations, "constant targets"
    assert found(0 * regression, [1.0, 2.0, 2.0], GLUE["stsb"]) == correlations, "a constant prediction"
    assert found(regression[:1], [2.0], GLUE["stsb"]) == correlations


def forward(inputs):
    """Return logits that encode an example's tokens, whatever else is in the batch."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert not ids[mask == 0].any(), "padding is the pad token"
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return torch.stack([(ids * mask).sum(1), (ids * mask * place).sum(1), mask.sum(1)], dim=1).float()


@pytest.mark.parametrize("batch_size", [1, 5, 36, 37, 1000])
def test_each_example_is_scored_once_and_in_order(tokens, world, batch_size):
    done = []
    found = predict_logits(forward, tokens, world, batch_size, PAD, done.append)
    assert found.shape == (EXAMPLES, 3) and found.dtype == np.float32
    for i in range(EXAMPLES):
        ids = tokens.input_ids_T[tokens.offsets_N1[i] : tokens.offsets_N1[i + 1]].astype(int)
        assert found[i].tolist() == [ids.sum(), (ids * np.arange(1, len(ids) + 1)).sum(), len(ids)], i
    assert sum(done) == EXAMPLES and max(done) <= batch_size
    assert (predict_logits_single(forward, tokens, batch_size, PAD) == found).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(training)
    with evaluating(module):
        assert not module.training and not module[1].training
        assert not module(torch.ones(1, 2)).requires_grad
    assert module.training == module[1].training == training
    with pytest.raises(RuntimeError, match="in the middle"), evaluating(module):
        raise RuntimeError("in the middle")
    assert module.training == module[1].training == training
    assert module(torch.ones(1, 2)).requires_grad


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (41, 50), (872, 1000), (1, 1)])
def test_wilsons_interval(right, n):
    wanted = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_divergence_is_the_mean_kl_from_the_teacher():
    generator = torch.Generator().manual_seed(3)
    teacher, student = (8 * torch.randn(50, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert divergence(teacher.numpy(), student.numpy()) == pytest.approx(expected, rel=1e-12)
    assert divergence(teacher.numpy(), teacher.numpy() + 7) == pytest.approx(0, abs=1e-12), "logits up to a constant"
    assert divergence(np.float32([[1000, 0]]), np.float32([[0, 1000]])) == 1000, "no overflow"
    assert divergence(np.float32([[1], [2]]), np.float32([[2], [4]])) == 2.5, (
        "a regression: the mean squared difference"
    )


def test_agreement():
    first, second = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 1, 1, 2]] * 5
    assert agreement(first, second) == 0.75
    line = np.arange(5.0)[:, None]
    assert agreement(line, 3 - 2 * line) == pytest.approx(-1)


def test_models_are_timed_in_turn_on_the_same_inputs(tokens):
    seen = []

    def model(name):
        def run(inputs):
            seen.append((name, tuple(inputs["input_ids"].flatten().tolist())))
            return forward(inputs)

        return run

    names = ("teacher", "student", "third")
    inputs = TimedInputs.choose(tokens, PAD, torch.device("cpu"), Evaluate(batch_size=8, latency_samples=30))
    found = measure_speed({name: model(name) for name in names}, inputs, repeats=2)
    assert list(found) == list(names)
    for timing in found.values():
        assert timing.latencies_ms_R.shape == (30,) and len(timing.rates) == 2
        figures = timing.figures
        assert figures.keys() == Speed.__annotations__.keys()
        assert (
            figures["reasoningTime"] == figures["samples_per_second"] and figures["threads"] == torch.get_num_threads()
        )
        assert 0 < figures["latency_ms_p50"] <= figures["latency_ms_p99"] and figures["reasoningTime"] > 0
    batches = EXAMPLES // 8  # the full ones
    timed = seen[-3 * (30 + 2 * batches) :]
    assert len(seen) == len(timed) + 3 * 6, "warm-up: 5 sentences and a batch of each"
    turns = [*(name for block in (20, 10) for name in names for _ in range(block)), *(list(names) * 2 * batches)]
    assert [name for name, _ in timed] == turns
    first, *others = ([ids for name, ids in timed if name == each] for each in names)
    assert all(ids == first for ids in others), "the same inputs"


def test_the_threads_are_those_that_the_user_allows(monkeypatch):
    before = torch.get_num_threads()
    for given, wanted in (("3", 3), ("2,1", 2), ("", 5), ("0", 5), ("many", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        with timing_threads(5) as threads:
            assert threads == torch.get_num_threads() == wanted
        assert torch.get_num_threads() == before


def test_the_spread_of_the_passes():
    figures = Timing(np.asarray([1.0]), [100.0, 80.0, 120.0], 2).figures
    assert (figures["samples_per_second"], figures["spread"], figures["threads"]) == (100.0, 0.4, 2)


@pytest.mark.parametrize(("examples", "wanted"), [(8, [4]), (12, [2, 8]), (24, [1, 4, 7]), (72, range(9))])
def test_few_timed_batches_are_full_and_of_middle_length(examples, wanted):
    """Chosen from 9 batches of 8, of 9, 8, ... tokens, and one of a single example."""
    lengths = np.concatenate([[1], np.repeat(np.arange(1, 10), 8)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.full(offsets[-1], 7, np.int32)
    made = TokenSet(ids, None, offsets, np.arange(73), np.zeros(73, np.int64), "", "", 0)
    seen = []
    settings = Evaluate(batch_size=8, latency_samples=10, throughput_samples=examples)
    inputs = TimedInputs.choose(made, PAD, torch.device("cpu"), settings)
    measure_speed({"model": lambda inputs: seen.append(inputs["input_ids"].shape)}, inputs, repeats=1)
    rows = [np.arange(73)[::-1][8 * i :][:8] for i in wanted]
    assert seen[-len(wanted) :] == [collate(made, r, np.ones(8), PAD).inputs["input_ids"].shape for r in rows]
    assert len(seen) == 6 + 10 + len(wanted)


@pytest.mark.parametrize("name", sorted(GLUE))
def test_every_glue_task_has_its_official_metrics(name):
    """The metrics of results_eval.json equal those of scikit-learn and scipy on the same predictions."""
    task, rng = GLUE[name], np.random.default_rng(5)
    if task.regression:
        gold = rng.uniform(0, 5, size=80).astype(np.float32)
        logits = gold[:, None] + rng.normal(size=(80, 1))
        official = {
            "pearson": pearsonr(logits[:, 0], gold).statistic,
            "spearman": spearmanr(logits[:, 0], gold).statistic,
        }
    else:
        gold, logits = rng.integers(len(task.classes), size=80), rng.normal(size=(80, len(task.classes)))
        logits[np.arange(80), gold] += 1
        said = logits.argmax(axis=1)
        official = {"accuracy": accuracy_score(gold, said)}
        official |= {"f_1": f1_score(gold, said)} if name in ("mrpc", "qqp") else {}
        official |= {"MCC": matthews_corrcoef(gold, said)} if name == "cola" else {}
    found = score(logits, gold, task)
    assert {key: found[key] for key in official} == pytest.approx(official)
    best = {"cola": "MCC", "stsb": "pearson_spearman"}.get(name, "accuracy")
    assert found["main_metric"] == found[best]
