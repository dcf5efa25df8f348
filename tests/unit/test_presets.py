"""The presets: the losses of the sources, each against its formula in float64 numpy, and what `strong` sets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from pkd_dist.config.load import load, replaced_by_preset
from pkd_dist.config.presets import PRESETS
from pkd_dist.config.task import Augment
from pkd_dist.distillation.objective import DistillationLoss
from pkd_dist.errors import UserError
from pkd_dist.model.layers import LayerMap
from pkd_dist.model.outputs import Outputs

B, C, M, H, L = 6, 3, 2, 8, 5
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(B, C)) * 2, RNG.normal(size=(B, C)) * 2
LABELS = RNG.integers(C, size=B)
CE = -log_softmax(STUDENT, axis=1)[np.arange(B), LABELS].mean()


def distill(*overrides):
    return load(None, ["run.dir=unused", *overrides]).distill


def total(settings, mine, theirs, mask=None):
    """The mean loss of a batch, as the run computes it."""
    tensors = [torch.as_tensor(x) for x in (STUDENT, TEACHER, mine, theirs)]
    batch = SimpleNamespace(
        inputs={}, labels_B=torch.from_numpy(LABELS), attention_mask_BL=mask, teacher_logits_BC=tensors[1],
        teacher_states=tensors[3],
    )  # fmt: skip
    loss = DistillationLoss(settings, LayerMap(tuple((m, m) for m in range(mine.shape[-2]))))
    outputs = Outputs(tensors[0], tensors[2], tensors[2])
    return loss(lambda *inputs: outputs, batch)["total"].mean()


def normalised(states):
    return states / np.linalg.norm(states, axis=-1, keepdims=True)


def test_paper():
    """Equations 3 to 8: soft cross-entropy summed over classes, squared distances summed over pairs; means over examples."""
    mine, theirs = RNG.normal(size=(B, M, H)), RNG.normal(size=(B, M, H))
    p, q = softmax(TEACHER / 5, axis=1), log_softmax(STUDENT / 5, axis=1)
    soft = np.mean([-sum(p[i, c] * q[i, c] for c in range(C)) for i in range(B)])
    patience = np.mean([np.sum((normalised(mine)[i] - normalised(theirs)[i]) ** 2) for i in range(B)])
    assert float(total(distill("distill.preset=paper"), mine, theirs)) == pytest.approx(
        0.5 * CE + 0.5 * soft + 0.026 * patience, rel=1e-12
    )


def test_authors():
    """Their code: `KLDivLoss` with its mean over B * C, times T^2, and `mse_loss` of normalised states."""
    mine, theirs = RNG.normal(size=(B, M, H)), RNG.normal(size=(B, M, H))
    p, q = softmax(TEACHER / 5, axis=1), log_softmax(STUDENT / 5, axis=1)
    divergence = np.mean(p * (np.log(p) - q)) * 25
    patience = np.mean((normalised(mine) - normalised(theirs)) ** 2)
    assert float(total(distill("distill.preset=authors"), mine, theirs)) == pytest.approx(
        0.5 * CE + 0.5 * divergence + 100 * patience, rel=1e-12
    )


def test_seed():
    """The OneFlow reference: soft cross-entropy over B * C at T = 1, and for each pair the mean square over all tokens."""
    mine, theirs = RNG.normal(size=(B, L, M + 2, H)), RNG.normal(size=(B, L, M + 2, H))
    soft = np.mean(-softmax(TEACHER, axis=1) * log_softmax(STUDENT, axis=1))
    squares = sum(np.mean((mine[:, :, m] - theirs[:, :, m]) ** 2) for m in range(M + 2))
    states = torch.from_numpy(mine).requires_grad_()
    loss = total(distill("distill.preset=seed"), states, theirs, torch.ones(B, L))
    assert float(loss.detach()) == pytest.approx(0.8 * CE + 0.2 * soft + 10 * squares, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(states.grad, 10 * 2 * (mine - theirs) / (B * L * H), rtol=1e-10)
    assert states.grad[:, :, -1].abs().min() > 0, "the last layer learns too"


def test_a_preset_on_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("run: {dir: x}\ndistill: {alpha: 0.3, beta: 7, preset: paper, patience: last}\n")
    from_file = load(tmp_path / "run.yaml").distill
    assert (from_file.alpha, from_file.beta, from_file.preset) == (0.3, 7, "paper")
    settings = load(tmp_path / "run.yaml", ["distill.preset=seed", "distill.beta=3"]).distill
    assert settings.model_dump().items() >= {**PRESETS["seed"], "beta": 3, "patience": "last"}.items()


def test_a_preset_sets_the_keys_that_are_not_given():
    settings = distill("distill.preset=seed", "distill.alpha=0.7")
    assert settings.alpha == 0.7 and {k: getattr(settings, k) for k in PRESETS["seed"]} == PRESETS["seed"] | {
        "alpha": 0.7
    }
    assert distill("distill.preset=null") == distill()
    with pytest.raises(UserError, match=r"distill\.preset: 'papers' is invalid; allowed: paper or authors or seed"):
        distill("distill.preset=papers")


def test_strong_sets_extra_text_and_epochs_where_they_are_not_given(tmp_path):
    config = load(None, ["run.dir=x", "distill.preset=strong"])
    assert config.distill.model_dump().items() >= PRESETS["strong"].items()
    assert (config.task.augment.copies, config.task.augment.neighbours, config.train.epochs) == ("auto", 0.2, 2)
    given = load(None, ["run.dir=x", "distill.preset=strong", "train.epochs=7", "task.augment.copies=3"])
    assert (given.train.epochs, given.task.augment.copies, given.task.augment.neighbours) == (7, 3, 0.2)
    assert load(None, ["run.dir=x", "distill.preset=strong", "task.augment=null"]).task.augment is None
    (tmp_path / "run.yaml").write_text("run: {dir: x}\ntrain: {epochs: 9}\ndistill: {beta: 3}\n")
    strong = load(tmp_path / "run.yaml", ["distill.preset=strong"])
    assert strong.train.epochs == 2, "the command line takes precedence"
    assert replaced_by_preset(tmp_path / "run.yaml", ["distill.preset=strong"], strong) == [
        "distill.beta 3 by 0.0", "train.epochs 9 by 2",
    ]  # fmt: skip
    own = ["distill.preset=strong", "train.epochs=3"]
    assert replaced_by_preset(tmp_path / "run.yaml", own, load(tmp_path / "run.yaml", own)) == ["distill.beta 3 by 0.0"]
    (tmp_path / "more.yaml").write_text("run: {dir: x}\ntask: {augment: {copies: 3}}\n")
    for section in ("null", "{copies: 5}"):
        own = ["distill.preset=strong", f"task.augment={section}"]
        assert replaced_by_preset(tmp_path / "more.yaml", own, load(tmp_path / "more.yaml", own)) == []
    assert replaced_by_preset(tmp_path / "run.yaml", [], load(tmp_path / "run.yaml")) == []
    (tmp_path / "run.yaml").write_text("run: {dir: x}\ntrain: {epochs: 9}\ndistill: {preset: strong}\n")
    assert load(tmp_path / "run.yaml").train.epochs == 9
    paper = load(None, ["run.dir=x", "distill.preset=paper"])
    assert (paper.task.augment, paper.train.epochs) == (None, 4)
    with pytest.raises(UserError, match=r"command line: task\.augment"):
        load(None, ["run.dir=x", "distill.preset=strong", "task.augment=many"])


@pytest.mark.parametrize(("examples", "copies"), [(0, 20), (240, 20), (8_478, 20), (67_349, 2), (392_702, 1)])
def test_auto_makes_about_200_000_texts(examples, copies):
    assert Augment(copies="auto").copies_of(examples) == copies
    assert Augment(copies=5).copies_of(examples) == 5
