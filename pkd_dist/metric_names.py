"""Names of the task metrics: keys in results_eval.json, metrics.jsonl and Prometheus, and how tables show them."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "accuracy": "accuracy",
    "MCC": "MCC",
    "precision": "precision",
    "recall": "recall",
    "f_1": "F1",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "pearson_spearman": "Pearson/Spearman mean",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "f1_samples": "samples F1",
    "mAP": "mAP",
    "subset_accuracy": "subset accuracy",
    "agreement": "agreement",
}
"""Key -> display name, in the order tables list them. A task has the classification, the correlation or the multi-label metrics,
or, without labels, the agreement with the teacher."""

MULTILABEL_METRICS = ("f1_micro", "f1_macro", "f1_samples", "mAP", "subset_accuracy")
"""Keys of the metrics of a multi-label task."""

MAIN_METRIC = "main_metric"
"""Key under which the task's main metric is repeated."""

AGREEMENT, DIVERGENCE = "agreement", "divergence"
"""Keys of how far a student in training is from its teacher on dev; see the functions of these names in `evaluation/metrics.py`."""

SHARES = ("accuracy", "subset_accuracy", AGREEMENT)
"""Metrics that are a share of the examples: shown in percent, with Wilson's interval."""

TABLE_METRICS = ("accuracy", "MCC", "f_1", "pearson", "spearman", *MULTILABEL_METRICS, AGREEMENT)
"""Keys that a teacher/student table shows, where the task has them."""

LOSS_TERMS: dict[str, str] = {
    "total": "Total loss",
    "ce": "CE: labels",
    "ds": "DS: teacher predictions",
    "pt": "PT: teacher layers",
    "gram": "GRAM: similarities of tokens",
    "rel": "REL: relations of queries, keys, values",
    "att": "ATT: attention scores",
}
"""Loss term -> title, in the order in which a training step reports those that it has."""
