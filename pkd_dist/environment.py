"""What a run was resolved to, beside its settings: the section `resolved` of its config.yaml."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """Code, machine and resolved settings of a run; model card and report show them.

    Attributes:
        versions: package -> version.
        git_revision: of this code; None outside a checkout.
        launcher: what started the ranks.
        device: `cpu` or `cuda`.
        precision, teacher_precision: of the training and of the teacher's pass.
        deepspeed: the DeepSpeed JSON.
        teacher_layers: None where the teacher is a file of answers.
        copied_layers: teacher layers, from 0, that the student starts from; None if it starts otherwise.
        patience_pairs: (student layer, teacher layer), from 1; 0 is the embeddings.
        beta_mean, beta_sum: `distill.beta` as it is with either `pt_reduction`.
    """

    versions: dict[str, str]
    git_revision: str | None
    world_size: int
    launcher: str
    device: str
    precision: str
    teacher_precision: str
    deepspeed: dict[str, object]
    teacher_layers: int | None
    student_layers: int
    copied_layers: list[int] | None
    patience_pairs: list[list[int]]
    beta_mean: float
    beta_sum: float

    @property
    def zero_stage(self) -> int:
        zero = self.deepspeed.get("zero_optimization", {})
        return int(zero.get("stage", 0)) if isinstance(zero, dict) else 0
