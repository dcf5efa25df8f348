"""The model card of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from pkd_dist.config.schema import Config
from pkd_dist.data.prepare import TokenSetSummary
from pkd_dist.environment import Environment
from pkd_dist.evaluation.results import Results, agreement_sentence, table_rows
from pkd_dist.export.manifest import ExportFigures
from pkd_dist.export.runtime import ONNX_FILES
from pkd_dist.metric_names import METRICS

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-classification
tags: [knowledge-distillation, patient-knowledge-distillation]
---
# {{ results.task }}: a {{ environment.student_layers }}-layer student

Distilled from `{{ config.teacher.model }}` with Patient Knowledge Distillation (arXiv 1908.09355) by pkd_dist
{{ environment.versions.pkd_dist }}. It loads with plain `transformers`
(oldest version tried: 4.57.6):

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Training truncated inputs to {{ config.task.max_length }} tokens; do the same when serving
(`tokenizer(text, truncation=True, max_length={{ config.task.max_length }})`).
{% if facts.class_names %}
Classes, in the order of the logits: {{ facts.class_names | join(", ") }}.
{% else %}
One output: the predicted value.
{% endif %}

## Results on {{ results.split }} ({{ results.n }} examples, float32)

| | teacher | student |
| --- | --- | --- |
{% for label, teacher, student in rows -%}
| {{ label }} | {{ teacher }} | {{ student }} |
{% endfor %}

The student retains {{ "%.1f" | format(100 * results.compression.retention) }}% of the teacher's score with
{{ "%.2f" | format(results.compression.parameters) }} times fewer parameters; {{ agreement }}. Latency and throughput were measured
on the machine that trained the student ({{ environment.device }}), in one process.

## Files

Each file was run on all of {{ results.split }}. The difference is the largest of any logit, compared with PyTorch in float32. The
batch effect is the largest change of a {{ "probability" if facts.class_names else "value (as a share of their range)" }} when a text is answered in a batch of 64 instead of alone. Speed is that of one core of {{ figures.measured_on.processor }}: latency of single sentences of {{ results.split }}, throughput in batches of {{ config.evaluate.batch_size }}.

| file | MB | {{ metric }} | difference | batch effect | agreement | latency p50, ms | p99, ms | sentences per second |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{% for name, file in figures.files_on_dev.items() -%}
| `{{ name }}` | {{ "%.1f" | format(file.bytes / 1e6) }} | {{ "%.4f" | format(file.main_metric) }} | {{ "%.1e" | format(file.largest_difference) }} | {{ "%.1e" | format(file.batch_effect) }} | {{ "%.4f" | format(file.agreement) }} | {{ "%.2f" | format(file.latency_ms_p50) }} | {{ "%.2f" | format(file.latency_ms_p99) }} | {{ "%.0f" | format(file.reasoningTime) }} |
{% endfor %}

{% if onnx %}
ONNX files use opset {{ figures.opset }} and ONNX Runtime's own operators. Inputs are the tokenizer's outputs (int64, any batch size and
length), the output is `logits`.{{ " Quantisation to int8: " ~ quantisation ~ "." if quantisation }}

{% endif %}
`manifest.json` holds the sha256 of every file; `pkd export verify FOLDER` checks them.

## Training

- Data: `{{ facts.train.source }}`, {{ facts.train.examples }} examples. Epoch {{ facts.best_epoch }} of {{ config.train.epochs }} was the best
  by {{ metric }} on `{{ facts.dev.source }}`.
- Student: {{ facts.initialized_from }}. Patience pairs (student layer, teacher layer, counted from 1): {{ pairs }}.
- Loss: (1 - alpha) CE + alpha DS + beta PT with alpha {{ config.distill.alpha }}, temperature {{ config.distill.temperature }}
  (`ds_reduction: {{ config.distill.ds_reduction }}`), beta {{ config.distill.beta }} (`pt_reduction: {{ config.distill.pt_reduction }}`;
  equal to {{ "%.4g" | format(environment.beta_mean) }} with `mean` and {{ "%.4g" | format(environment.beta_sum) }} with `sum`), hidden states
  {{ "normalised" if config.distill.normalize else "not normalised" }}.
- Optimiser: AdamW, learning rate {{ config.train.learning_rate }}, batch size {{ config.train.batch_size }}, seed {{ config.run.seed }};
  trained in {{ environment.precision }} on {{ environment.world_size }} rank(s).
- Versions: {% for name, number in environment.versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}.

## Limitations

The student was trained and scored only on the data named above. It may do worse on other text, and it inherits the teacher's
errors and biases. Its licence is that of the teacher and of the data.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says of a run.

    Attributes:
        main_metric: key of the metric that selected the best epoch.
        class_names: in the order of the logits; empty for a regression.
        initialized_from: one line on the student's initial weights.
    """

    config: Config
    results: Results
    environment: Environment
    main_metric: str
    class_names: Sequence[str]
    train: TokenSetSummary
    dev: TokenSetSummary
    best_epoch: int
    initialized_from: str


def render(facts: CardFacts, figures: ExportFigures) -> str:
    """Return the model card in Markdown."""
    templates = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    int8 = figures["files_on_dev"].get(ONNX_FILES["onnx-int8"])
    return templates.from_string(_TEMPLATE).render(
        facts=facts,
        environment=facts.environment,
        config=facts.config,
        results=facts.results,
        rows=table_rows(facts.results),
        agreement=agreement_sentence(facts.results),
        figures=figures,
        onnx=any(name in ONNX_FILES for name in figures["formats"]),
        quantisation=int8.get("quantisation") if int8 else None,
        metric=METRICS[facts.main_metric],
        pairs=", ".join(f"({student}, {teacher})" for student, teacher in facts.environment.patience_pairs) or "none",
    )
