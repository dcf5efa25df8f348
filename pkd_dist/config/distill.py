"""The section `distill` of a run configuration: the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pkd_dist.config.presets import PRESETS
from pkd_dist.config.section import Count, Fraction, NonNegative, Positive, Section


class Distill(Section):
    preset: Literal["paper", "authors", "seed", "strong"] | None = Field(
        None,
        description="Sets the keys below that are not given: `paper` (the formulas as printed; its beta is for 5 pairs of "
        "width 768, use a larger one for fewer or narrower pairs), `authors` (their code), `seed` (the OneFlow reference, "
        "the code that this project started from: states of all tokens through a learned projection), `strong` (the best "
        "students here: it also sets task.augment and train.epochs; see docs/recipes.md).",
    )
    alpha: Fraction = Field(
        0.5,
        description="Weight of the teacher's soft predictions in the loss (1 - alpha) * CE + alpha * DS + beta * PT + gram * "
        "GRAM + relations * REL + attention * ATT. CE: cross-entropy with the label (regression: squared error; multilabel: binary "
        "cross-entropy, mean over classes). DS: distance from the teacher's softened predictions. PT: distance between paired hidden states of student and teacher, the "
        "patience term. The others: see the keys of their weights.",
    )
    beta: NonNegative = Field(
        100.0, description="Weight of the patience term PT. Its scale depends on distill.pt_reduction."
    )
    gram: NonNegative = Field(
        0.0,
        description="Weight of GRAM, the mean squared difference between Gram matrices of student and teacher: dot products of "
        "the states of all pairs of tokens, divided by the width, within each paired layer and between neighboring ones. "
        "The widths may differ without a projection. Needs the states of all tokens, also in the cache.",
    )
    relations: NonNegative = Field(
        0.0,
        description="Weight of REL (MiniLMv2), the divergence between the relations of student and teacher: for queries, for "
        "keys and for values, the softmax of the scaled products of all pairs of tokens, by relation head. Compares the "
        "student's last layer with distill.relation_layer. The widths and numbers of attention heads may differ. The cache "
        "holds the states of all tokens that enter the teacher's layer.",
    )
    relation_heads: Count | None = Field(
        None,
        description="Relation heads, into which the concatenated attention heads are split; must divide both widths. null: the "
        "teacher's number of attention heads.",
    )
    relation_layer: Count | None = Field(
        None,
        description="Teacher layer, counted from 1 to N, that the student's last layer is compared with in REL and ATT. null: "
        "the last.",
    )
    attention: NonNegative = Field(
        0.0,
        description="Weight of ATT (TinyBERT), the mean squared difference between the attention scores of student and teacher "
        "before the softmax. Compares the layers of distill.patience, and the student's last layer with "
        "distill.relation_layer. Both models must have the same number of attention heads, and a family whose scores are "
        "products of queries and keys alone (BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT). The cache holds the states of all "
        "tokens that enter these layers of the teacher.",
    )
    temperature: Positive = Field(5.0, description="Softmax temperature of both distributions in DS.")
    patience: Literal["skip", "last"] | list[Count] = Field(
        "skip",
        description="Teacher layers paired with layers 1 to k-1 of a k-layer student: `skip` (at even distance), `last` (the "
        "k-1 layers below the teacher's last), or a list of k-1 layers, increasing, counted from 1 to N for a teacher of N "
        "layers (student.layers counts from 0). With distill.pair_last_layer: layers 1 to k, the k last layers, a list of k.",
    )
    pair_embeddings: bool = Field(
        False, description="Also pair the outputs of the embeddings, as the preset `seed` does."
    )
    pair_last_layer: bool = Field(False, description="Also pair the student's last layer, as the preset `seed` does.")
    normalize: bool = Field(True, description="L2-normalize the states before the patience term.")
    projection: Literal["auto", "always"] = Field(
        "auto",
        description="When to project the student's states before the patience term, with a learned matrix that is not "
        "exported. `auto`: if its width differs from the teacher's. `always` (preset `seed`): at equal width too.",
    )
    ds_reduction: Literal["batchmean", "mean", "soft_ce", "soft_ce_mean"] = Field(
        "batchmean",
        description="`batchmean`: KL summed over classes, mean over examples, times T^2. `mean` (preset `authors`): the "
        "same divided by the number of classes. `soft_ce` (`paper`): soft cross-entropy summed over classes, without T^2. "
        "`soft_ce_mean` (`seed`): the same divided by the number of classes. T: distill.temperature. Of a multilabel task, each "
        "class is a distribution over two outcomes, and DS is the mean of theirs.",
    )
    pt_reduction: Literal["sum", "mean", "pair_sum"] = Field(
        "mean",
        description="`sum` (preset `paper`): summed over pairs and width. `mean` (`authors`): mean over pairs and width. "
        "`pair_sum` (`seed`): summed over pairs, mean over width. All: mean over examples.",
    )
    states: Literal["cls", "tokens"] = Field(
        "cls", description="The patience term compares [CLS] states, or the states of all tokens without padding."
    )

    @property
    def formula(self) -> str:
        """The loss of an example, for people."""
        return "L = " + " + ".join(f"{weight:g} {term.upper()}" for term, weight in self.weights.items() if weight)

    @property
    def weights(self) -> dict[str, float]:
        """Loss term, as in `metric_names.LOSS_TERMS` -> its weight in the total loss, in the same order."""
        return {
            "ce": 1 - self.alpha,
            "ds": self.alpha,
            "pt": self.beta,
            "gram": self.gram,
            "rel": self.relations,
            "att": self.attention,
        }

    @property
    def compares_tokens(self) -> bool:
        """Whether the loss reads the student's states of all tokens, not of [CLS] alone."""
        return self.states == "tokens" or self.gram > 0

    @property
    def compares_attention(self) -> bool:
        """Whether the loss reads queries, keys or values."""
        return self.relations > 0 or self.attention > 0

    @property
    def compares_states(self) -> bool:
        """Whether the loss reads anything of the models but their predictions."""
        return self.beta > 0 or self.gram > 0 or self.compares_attention

    @property
    def all_tokens(self) -> bool:
        """Whether the loss needs the teacher's states of all tokens, not of [CLS] alone."""
        return self.compares_tokens or self.compares_attention

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: object) -> object:
        return {**PRESETS.get(str(given.get("preset")), {}), **given} if isinstance(given, dict) else given

    @field_validator("patience")
    @classmethod
    def _increasing(cls, value: object) -> object:
        if isinstance(value, list) and sorted(set(value)) != value:
            raise ValueError(f"a list of teacher layers must be increasing without repeats, not {value}")
        return value
