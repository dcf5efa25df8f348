"""What `distill.preset` selects: the losses of the sources, and our best recipe."""

from __future__ import annotations

Values = dict[str, float | str]

PRESETS: dict[str, Values] = {
    "paper": {
        "alpha": 0.5, "beta": 0.026, "temperature": 5.0, "normalize": True, "states": "cls",
        "ds_reduction": "soft_ce", "pt_reduction": "sum",
    },
    "authors": {
        "alpha": 0.5, "beta": 100.0, "temperature": 5.0, "normalize": True, "states": "cls",
        "ds_reduction": "mean", "pt_reduction": "mean",
    },
    "seed": {
        "alpha": 0.2, "beta": 10.0, "temperature": 1.0, "normalize": False, "states": "tokens",
        "ds_reduction": "soft_ce_mean", "pt_reduction": "pair_sum", "pair_embeddings": True, "pair_last_layer": True,
        "projection": "always",
    },
    "strong": {"alpha": 0.9, "beta": 0.0, "temperature": 5.0, "ds_reduction": "batchmean"},
}  # fmt: skip
"""`distill.preset` -> the loss of the paper, of the authors' code, of the OneFlow reference (`seed`), and the one that made the
best students here (`strong`, docs/recipes.md). The paper's beta is the authors' 100 at M = 5 pairs of width H = 768:
beta_sum = beta_mean / (M * H). The OneFlow reference also averages over padding; here padding is always excluded."""

RECIPES: dict[str, dict[tuple[str, ...], Values]] = {
    "strong": {("task", "augment"): {"copies": "auto", "neighbours": 0.2}, ("train",): {"epochs": 2}},
}
"""`distill.preset` -> the settings of other sections that it sets, where they are not given."""
