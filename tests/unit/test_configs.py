"""The shipped configurations have the values of the tables in METHOD."""

from pathlib import Path

import pytest

from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load
from pkd_dist.config.presets import PRESETS
from pkd_dist.data.tasks import GLUE, resolve

CONFIGS = Path(__file__).parents[2] / "configs"
SEED = {
    # task: teacher's rate, epochs, decay; student's
    "cola": (1e-5, 5, 0.01, 5e-5, 100, 1e-4),
    "mrpc": (3e-5, 5, 0.001, 2e-5, 5, 0.001),
    "sst2": (2e-5, 3, 1e-4, 2e-5, 4, 1e-4),
    "qqp": (2e-5, 5, 1e-4, 2e-5, 5, 1e-4),
    "mnli": (2e-5, 5, 1e-4, 2e-5, 5, 1e-4),
    "wnli": (2e-5, 5, 1e-4, 2e-5, 5, 1e-4),
    "rte": (3e-5, 5, 1e-4, 3e-5, 5, 1e-4),
    "qnli": (2e-5, 5, 1e-4, 2e-5, 5, 1e-4),
    "stsb": (2e-5, 5, 1e-4, 2e-5, 5, 1e-4),
}
NORMALIZED = {"mrpc": True, "sst2": True, "rte": True, "mnli": False, "qnli": False, "qqp": False, "race": False}
LENGTHS = {"race": 512}
"""Maximum lengths other than 128."""


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_is_valid_and_writes_to_a_folder_of_its_own(path):
    config = load(path)
    load_deepspeed(config, path)
    resolve(config.task)
    assert sum(load(other).run.dir == config.run.dir for other in CONFIGS.rglob("*.yaml")) == 1


def test_there_is_a_file_for_every_glue_task():
    assert {path.stem for path in (CONFIGS / "glue").glob("*.yaml")} == set(GLUE) == set(SEED)


@pytest.mark.parametrize("task", SEED)
def test_the_seeds_values(task):
    config = load(CONFIGS / f"glue/{task}.yaml")
    teacher, train = config.teacher.finetune, config.train
    given = (
        teacher.learning_rate,
        teacher.epochs,
        teacher.weight_decay,
        train.learning_rate,
        train.epochs,
        train.weight_decay,
    )
    assert given == SEED[task]
    assert (config.task.name, config.task.max_length, train.batch_size, teacher.batch_size) == (task, 128, 32, 32)
    assert (train.warmup_ratio, train.max_grad_norm, train.adam_epsilon) == (0.1, 1.0, 1e-6)
    assert config.student.layers == [2, 6, 10]
    assert config.distill.model_dump(include=set(PRESETS["seed"])) == PRESETS["seed"]


@pytest.mark.parametrize("task", NORMALIZED)
def test_the_papers_values(task):
    config = load(CONFIGS / f"paper/{task}.yaml")
    distill, train = config.distill, config.train
    assert (train.epochs, train.batch_size, train.warmup_ratio) == (4, 32, 0.1)
    assert config.task.max_length == LENGTHS.get(task, 128)
    assert train.learning_rate in (5e-5, 2e-5, 1e-5) and distill.temperature in (5, 10, 20)
    assert distill.alpha in (0.2, 0.5, 0.7) and distill.beta in (10, 100, 500, 1000)
    assert distill.normalize is NORMALIZED[task] and distill.patience == "skip"
    assert (distill.ds_reduction, distill.pt_reduction) == ("mean", "mean")
    assert (config.student.init, config.student.num_layers) == ("first_k", 6)
