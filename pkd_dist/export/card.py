"""The model card of an export, and the table that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pkd_dist.config.schema import Config
from pkd_dist.metric_names import METRICS, TABLE_METRICS

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-classification
tags: [knowledge-distillation, patient-knowledge-distillation]
---
# {{ results.task }}: a {{ env.student_layers }}-layer student

Distilled from `{{ config.teacher.model }}` with Patient Knowledge Distillation (arXiv 1908.09355) by pkd_dist
{{ env.versions.pkd_dist }}. It loads with plain `transformers`:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Inputs longer than {{ config.task.max_length }} tokens were cut in training; cut them in serving too
(`tokenizer(text, truncation=True, max_length={{ config.task.max_length }})`).
{% if classes %}
Classes, in the order of the logits: {{ classes | join(", ") }}.
{% else %}
One output: the predicted value.
{% endif %}

## Figures on {{ results.split }} ({{ results.n }} examples, float32)

| | teacher | student |
| --- | --- | --- |
{% for label, teacher, student in rows -%}
| {{ label }} | {{ teacher }} | {{ student }} |
{% endfor %}

The student keeps {{ "%.1f" | format(100 * results.compression.retention) }}% of the teacher's score with
{{ "%.2f" | format(results.compression.parameters) }} times fewer parameters; {{ agrees }}. Latency and throughput were taken on the machine
that trained it ({{ env.device }}), one process.

## Files

Each answered all of {{ results.split }}; the difference is the largest of a logit, against PyTorch in float32. Speed on one core of
{{ files.measured_on.processor }}: latency of single sentences of {{ results.split }}, throughput in batches of {{ config.evaluate.batch_size }}.

| file | MB | {{ metric }} | difference | agreement | latency p50, ms | p99, ms | per second |
| --- | --- | --- | --- | --- | --- | --- | --- |
{% for name, file in files.files_on_dev.items() -%}
| `{{ name }}` | {{ "%.1f" | format(file.bytes / 1e6) }} | {{ "%.4f" | format(file.main_metric) }} | {{ "%.1e" | format(file.largest_difference) }} | {{ "%.4f" | format(file.agreement) }} | {{ "%.2f" | format(file.latency_ms_p50) }} | {{ "%.2f" | format(file.latency_ms_p99) }} | {{ "%.0f" | format(file.reasoningTime) }} |
{% endfor %}

{% if "onnx" in files.formats | join(" ") %}
ONNX files: opset {{ files.opset }} with ONNX Runtime's own operators; inputs as the tokenizer gives them (int64, any batch and length),
output `logits`.{{ " int8: " ~ quantisation ~ "." if quantisation }}

{% endif %}
`manifest.json` holds the sha256 of every file; `pkd export verify FOLDER` checks it.

## How it was made

- Data: `{{ data.train.source }}`, {{ data.train.examples }} examples; best of {{ config.train.epochs }} epochs by {{ metric }}
  on `{{ data.dev.source }}`: epoch {{ distilled.best_epoch }}.
- Student: {{ made_of }}; patience pairs (student layer, teacher layer, from 1): {{ env.patience_pairs }}.
- Loss: (1 - alpha) CE + alpha DS + beta PT with alpha {{ config.distill.alpha }}, temperature {{ config.distill.temperature }}
  (`ds_reduction: {{ config.distill.ds_reduction }}`), beta {{ config.distill.beta }} (`pt_reduction: {{ config.distill.pt_reduction }}`;
  {{ "%.4g" | format(env.beta_mean) }} as `mean`, {{ "%.4g" | format(env.beta_sum) }} as `sum`), states
  {{ "normalised" if config.distill.normalize else "not normalised" }}.
- Optimiser: AdamW, learning rate {{ config.train.learning_rate }}, batch {{ config.train.batch_size }}, seed {{ config.run.seed }};
  trained in {{ env.precision }} on {{ env.world_size }} rank(s).
- Versions: {% for name, number in env.versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}.

## Limits

It was trained and scored on the data named above alone: on other text it may do worse than these figures, and it inherits
the teacher's errors and biases. Licence: that of the teacher and of the data.
"""


def figures(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, teacher's, student's) rows that people compare."""
    teacher, student = results["teacher"], results["student"]
    rows = []
    for key in TABLE_METRICS:
        if key in teacher:
            rows.append((METRICS[key], _with_interval(teacher, key), _with_interval(student, key)))
    for key, label, form in (
        ("parameters", "parameters", "{:,}"),
        ("modelSize", "size, MB", "{:.1f}"),
        ("reasoningTime", "sentences per second", "{:.0f}"),
        ("latency_ms_p50", "latency at batch 1, p50, ms", "{:.2f}"),
        ("latency_ms_p99", "latency at batch 1, p99, ms", "{:.2f}"),
    ):
        rows.append((label, form.format(teacher[key]), form.format(student[key])))
    return rows


def _with_interval(side: dict[str, Any], key: str) -> str:
    if key == "accuracy":
        low, high = side["accuracy_interval_95"]
        return f"{100 * side[key]:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
    return f"{side[key]:.3f}"


def agrees(results: dict[str, Any]) -> str:
    """How far student and teacher predict the same."""
    share = results["compression"]["agreement"]
    if "accuracy" in results:
        return f"both predict the same class on {100 * share:.1f}% of the examples"
    return f"the correlation of their predictions is {share:.3f}"


def render(
    config: Config,
    environment: dict[str, Any],
    outputs: dict[str, dict[str, Any]],
    main_metric: str,
    files: dict[str, Any],
) -> str:
    """The model card in Markdown.

    Args:
        environment: what the run was resolved to.
        outputs: of the stages that are done, by name.
        main_metric: key of the metric that chose the epoch.
        files: what the export found of its files, as in its manifest.
    """
    results = outputs["evaluate"]["results"]
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(
        _TEMPLATE
    )
    return template.render(
        config=config,
        env=environment,
        results=results,
        rows=figures(results),
        classes=outputs["data"]["class_names"],
        data=outputs["data"],
        distilled=outputs["distill"],
        files=files,
        quantisation=files["files_on_dev"].get("onnx/model.int8.onnx", {}).get("quantisation"),
        made_of=outputs["init"]["made_of"],
        agrees=agrees(results),
        metric={"f_1": "F1", "pearson_spearman": "the mean of Pearson and Spearman"}.get(main_metric, main_metric),
    )


def summary(results: dict[str, Any], export: Path, report: Path) -> str:
    """Teacher beside student as a plain table, and the paths of what was made."""
    rows = [("", "teacher", "student"), *figures(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]))) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    kept = results["compression"]
    lines.append(
        f"kept {100 * kept['retention']:.1f}% of the teacher's score; {agrees(results)} ({results['n']} dev examples)"
    )
    return "\n".join([*lines, "", f"export: {export}", f"report: {report}"])
