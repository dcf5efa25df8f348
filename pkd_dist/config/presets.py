"""The losses that `distill.preset` selects."""

from __future__ import annotations

PRESETS: dict[str, dict[str, float | str]] = {
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
}  # fmt: skip
"""`distill.preset` -> the loss of the paper, of the authors' code and of the OneFlow reference (`seed`). The paper's beta is
the authors' 100 at M = 5 pairs of width H = 768: beta_sum = beta_mean / (M * H). The OneFlow reference also averages over
padding; here padding is always excluded."""
