"""The study of a sweep: which trials there are, and who trains them, whatever a kill has interrupted."""

import errno
import itertools
import os

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from pkd_dist.config.sweep import Sweep
from pkd_dist.errors import FullDiskError, UserError
from pkd_dist.lock import waiting_lock
from pkd_dist.search.outcome import ranked
from pkd_dist.search.shared import SweepConfig
from pkd_dist.search.space import Space, as_overrides
from pkd_dist.search.study import COMPARISON, JOURNAL, NAMED, POINT, SEED, Named, Study, read
from pkd_dist.search.worker import _fail

GRID = {
    "train.learning_rate": CategoricalDistribution([0.1, 0.2]),
    "distill.alpha": CategoricalDistribution([0.3, 0.7]),
}


def make(folder, space=GRID, **settings):
    values = {"train.learning_rate": [0.1, 0.2]}
    study = Study(folder, Sweep(space=values, **{"sampler": "grid", "pruner": "none"} | settings), Space(dict(space)))
    study.prepare({"sweep.seeds": settings.get("seeds", [1])}, "accuracy")
    return study


def finish(study, claim, value=0.5):
    study.complete(claim, value, {"scores": {"accuracy": value, "divergence": 0.1}})


def test_a_grid_has_all_points_or_as_many_as_asked_for(tmp_path):
    assert len(make(tmp_path / "all").trials) == 4
    assert len(make(tmp_path / "two", trials=2).trials) == 2


def test_a_trial_that_a_kill_left_without_a_parameter_gets_that_of_its_point(tmp_path):
    study = make(tmp_path)
    trial = study.as_optuna().ask()  # killed before its parameters were written
    trial._suggest("train.learning_rate", GRID["train.learning_rate"])
    claims = [study.claim("here") for _ in range(4)]
    assert [claim.number for claim in claims] == [1, 2, 3, 0], "first those that wait"
    points = {tuple(sorted(claim.trial.params.items())) for claim in claims}
    assert len(points) == 4 and all(len(point) == 2 for point in points)


def test_seeds_that_a_kill_left_out_are_added(tmp_path):
    study = make(tmp_path, seeds=[1, 2, 3], trials=1)
    claim = study.claim("here")
    study.as_optuna().enqueue_trial(claim.trial.params, {SEED: 2, POINT: claim.number})  # killed before the third
    finish(study, claim)
    finish(study, study.claim("here"))
    finish(study, study.claim("here"))
    assert study.claim("here") is None and study.done
    [point] = ranked(study.trials, 3)
    assert sorted(trial.user_attrs[SEED] for trial in point.trials) == [1, 2, 3]


def test_a_study_whose_number_of_points_depends_on_the_time_goes_on_after_a_kill(tmp_path):
    space = {"train.learning_rate": FloatDistribution(0.1, 0.9)}
    study = make(tmp_path, space, sampler="random", budget="1h")
    assert study.trials == [] and not study.done
    first, second = study.claim("here"), study.claim("here")
    assert first.trial.params != second.trial.params and first.seed == 1
    again = make(tmp_path, space, sampler="random", budget="1h")
    assert len(again.trials) == 2


def test_no_two_studies_with_the_same_seed_differ(tmp_path):
    space = {"train.learning_rate": FloatDistribution(0.1, 0.9)}
    drawn = []
    for name in ("a", "b"):
        study = make(tmp_path / name, space, sampler="random", trials=3)
        drawn.append([study.claim("here").trial.params for _ in range(3)])
    assert drawn[0] == drawn[1]


def test_a_running_trial_is_left_alone_while_its_worker_lives(tmp_path):
    study = make(tmp_path, trials=1)
    with waiting_lock(tmp_path / "workers/alive"):
        study.claim("alive")
        assert study.claim("other") is None and not study.done
    assert study.claim("other").number == 0


def test_a_dangling_lock_of_the_journal_does_not_hang(tmp_path, monkeypatch):
    """Optuna's lock is a link to the journal: from a relative path it would point nowhere, and never expire."""
    monkeypatch.chdir(tmp_path)
    study = make(tmp_path.relative_to(tmp_path) / "out")
    lock = study.as_optuna()._storage._backend._lock
    lock.acquire()
    assert os.path.samefile(f"out/{JOURNAL}", os.readlink(lock._lock_file))
    lock.release()


def test_another_configuration_is_rejected_and_nothing_changes(tmp_path):
    make(tmp_path)
    before = (tmp_path / JOURNAL).read_bytes()
    study = Study(tmp_path, Sweep(space={"a": [1]}, sampler="grid"), Space(dict(GRID)))
    with pytest.raises(UserError, match=r"has a sweep with another sweep\.seeds"):
        study.prepare({"sweep.seeds": [5]}, "accuracy")
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_failure_keeps_its_reason_and_a_study_can_be_read(tmp_path):
    study = make(tmp_path, trials=1)
    study.fail(study.claim("here"), "too hot")
    found = read(tmp_path)
    assert [trial.state for trial in found.trials] == [TrialState.FAIL] and found.trials[0].user_attrs[
        "reason"
    ] == "too hot"
    assert found.objective == "accuracy" and found.seeds == (1,)


def test_a_full_disk_is_no_failure_of_a_trial(tmp_path):
    study = make(tmp_path, trials=1)
    claim = study.claim("here")
    for error in (FullDiskError("no space left"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(type(error)):
            _fail(claim, error, study, SweepConfig("run.yaml", (), tmp_path))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert study.claim("there").number == claim.number, "another worker continues it"


def test_values_of_any_type_are_overrides():
    point = {
        "student.layers": "[1, 3]",
        "student.init": "first_k",
        "train.epochs": 3,
        "cache.dir": None,
        "export.prune": True,
    }
    assert as_overrides(point) == [
        "student.layers=[1, 3]", 'student.init="first_k"', "train.epochs=3", "cache.dir=null", "export.prune=true",
    ]  # fmt: skip


KD, PKD = Named("kd", ["distill.beta=0"], {}), Named("pkd", ["distill.patience=skip"], {})


def comparison(folder):
    study = Study(folder, Sweep(sampler="grid", pruner="none"), Space({}), COMPARISON)
    study.prepare({}, "accuracy")
    return study


def claims(study, worker="alive"):
    """All that a worker finds to train."""
    with waiting_lock(study.folder / "workers" / worker):
        found = list(itertools.islice(iter(lambda: study.claim(worker), None), 9))
    return [(claim.trial.user_attrs[NAMED][0], claim.seed, claim) for claim in found]


def test_a_comparison_has_the_runs_that_the_last_call_asked_for(tmp_path):
    """Complete ones stay, failed ones are tried again, and what another call left waiting or running is withdrawn."""
    study = comparison(tmp_path)
    study.request([KD, PKD], [1, 2])
    first, second = study.claim("here"), study.claim("here")
    finish(study, first)
    study.fail(second, "diverged")
    study.claim("here")  # killed
    study.request([PKD], [1, 3])
    assert [(name, seed) for name, seed, _ in claims(study)] == [("pkd", 1), ("pkd", 3)]
    assert len(study.completed) == 1 and not study.done, "of the two, none has ended"
    again = comparison(tmp_path)
    again.request([KD, PKD], [1, 2])
    assert {(name, seed) for name, seed, _ in claims(again, "other")} == {("kd", 2), ("pkd", 1), ("pkd", 2)}


def test_a_method_of_other_settings_is_rejected_once_it_has_begun(tmp_path):
    study = comparison(tmp_path)
    study.request([KD], [1])
    study.request([KD._replace(overrides=["distill.beta=1"])], [1])
    [(_, _, claim)] = claims(study)
    assert claim.trial.user_attrs[NAMED][1] == ["distill.beta=1"]
    with pytest.raises(
        UserError, match=r"--method: kd has other settings in .* \(distill.beta=1\); choose another name"
    ):
        study.request([KD], [1])
    study.fail(claim, "diverged")
    study.request([KD], [1])
    assert len(claims(study)) == 1


def test_a_folder_has_a_study_of_one_kind(tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=r"has a sweep; choose another folder"):
        comparison(tmp_path)
