"""The model card of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from pkd_dist.config.schema import Config
from pkd_dist.data.class_mapping import ClassMapping
from pkd_dist.data.prepare import TokenSetSummary
from pkd_dist.data.tasks import Task
from pkd_dist.environment import Environment
from pkd_dist.evaluation.calibration import BINS, FITTED_ON
from pkd_dist.evaluation.results import Results, agreement_sentence, retention_sentence, score_rows
from pkd_dist.evaluation.thresholds import CHOSEN_ON
from pkd_dist.export.manifest import ExportFigures, deployment_of
from pkd_dist.export.runtime import ONNX_FILES
from pkd_dist.metric_names import METRICS
from pkd_dist.model.encoder import name_of
from pkd_dist.telemetry.markup import markdown, markdown_code

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: {{ "multiple-choice" if options else "text-classification" }}
tags: [knowledge-distillation, patient-knowledge-distillation]
---
# {{ results.task }}: a {{ environment.student_layers }}-layer student

Distilled from {{ teacher | code }} with Patient Knowledge Distillation (arXiv 1908.09355) by pkd_dist
{{ environment.versions.pkd_dist }}. It loads with plain `transformers` (oldest version tried: 4.57.6):

```python
from transformers import {{ model_class }}, AutoTokenizer

model = {{ model_class }}.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

{% if figures.vocabulary is defined %}
The tokenizer and the word embedding hold {{ "{:,}".format(figures.vocabulary.kept) }} of {{ "{:,}".format(figures.vocabulary.total) }} tokens, those of the training text{{ " that occur at least %d times" % config.student.min_count if config.student.min_count > 1 }} and
every single character, which spell all other words. The student is scored with them.

{% endif %}
{% if options %}
It scores the options of an example, {{ options }} in the training data. Each option is read as a pair of texts, the context and {{ second }}:

```python
pairs = [(context, second) for second in seconds]  # one for each option
tokens = tokenizer(pairs, truncation="only_first", padding=True, return_tensors="pt")
scores = model(**{name: value[None] for name, value in tokens.items()}).logits[0]  # softmax: probabilities of the options
```

Training truncated the context where a pair has more than {{ facts.max_length }} tokens, the limit of the tokenizer.
{% else %}
Training truncated inputs to {{ facts.max_length }} tokens; do the same when serving: `tokenizer(text, truncation=True)`, whose limit
is that length.
{% endif %}
{% if options %}
{% elif facts.classes %}
Classes, in the order of the logits: {{ facts.classes.names | map("code") | join(", ") }}.

| output of the teacher | label in the data | class |
| --- | --- | --- |
{% for row in facts.classes.as_rows() -%}
| {{ row.output | code | cell }} | {{ row.label | code | cell }} | {{ row.name | code | cell }} |
{% endfor %}
{% if facts.classes.positive is not none %}

Precision, recall and F1 are those of the class {{ facts.classes.names[facts.classes.positive] | code }} ({{ facts.classes.why }}).
{% endif %}
{% else %}
One output: the predicted value.
{% endif %}

## Results

`{{ table.deploy }}`, the file to deploy: {{ table.headline() }}.

| {{ table.head() | join(" | ") }} |
| ---{{ " | ---:" * (table.head() | length - 1) }} |
{% for row in table.cells() -%}
| {{ row | join(" | ") }} |
{% endfor %}

{{ table.note(facts.task.multiple_choice) | text }}

Teacher and student in PyTorch on {{ results.split }} ({{ results.n }} examples):

| | teacher | student |
| --- | --- | --- |
{% for label, teacher, student in rows -%}
| {{ label }} | {{ teacher }} | {{ student }} |
{% endfor %}

{% if results.compression.parameters %}
The student has {{ "%.2f" | format(results.compression.parameters) }} times fewer parameters; {{ retention }};
{{ agreement }}.
{% else %}
The teacher is a file of answers; {{ retention }}; {{ agreement }}.
{% endif %}

{% if multilabel %}
## Classes and thresholds

A text can have several classes, or none: those with a score above 0.5. The score is the sigmoid of the logit, which
`pipeline("text-classification", FOLDER, top_k=None)` returns. The biases of the last layer contain a threshold for each class, the one
with the best F1 on {{ chosen_on }}, and nothing else is to be applied; a score of 0.5 stands for that probability. They are in
`config.json` (`thresholds_in_bias`) and `manifest.json` (`thresholds`), too. With the logit z, a threshold t and l = log(t / (1 - t)),
the model's own probability is sigmoid(z + l).

{% for split, found in multilabel.splits.items() -%}
On {{ split | replace("_", " ") }}, {{ "on which the thresholds were chosen" if split == chosen_on else "held out" }}, {{ multilabel.without_class[split] }} texts without a class:

| class | examples | threshold | precision, teacher | student | recall, teacher | student | F1, teacher | student |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{% for row in found -%}
| {{ row.name | code | cell }} | {{ row.support }} | {{ "%.3f" | format(multilabel.thresholds.student[row.name]) }} |{% for score in (row.precision, row.recall, row.f1) %} {{ "%.3f" | format(score.teacher) }} | {{ "%.3f" | format(score.student) }} |{% endfor %}

{% endfor %}

{% endfor %}
{% if multilabel.unfitted %}
Without an example in {{ chosen_on }}, and so with a threshold of 0.5: {{ multilabel.unfitted | map("code") | join(", ") }}.

{% endif %}
{% endif %}
{% if calibration %}
## Calibration

{% if calibration.unfitted is defined %}
The student is not calibrated: {{ calibration.unfitted | text }}.
{% else %}
The last layer contains a temperature of {{ "%.4g" | format(calibration.temperature) }}, fitted on {{ fitted_on }}: the softmax of the logits of every file is the calibrated
probability, and nothing else is to be applied. ECE is the expected calibration error over {{ bins }} bins of equal width, NLL the mean
negative log-likelihood of the labels. By chance: the mean ECE of exact probabilities on as many examples.
{% endif %}

| | examples | ECE before | ECE after | by chance | NLL before | NLL after |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{% for split, found in calibration.splits.items() -%}
| {{ split | replace("_", " ") }}{{ ", in-sample" if split == fitted_on else ", held out" }} | {{ found.n }} | {{ "%.4f" | format(found.before.ece) }} | {{ "%.4f" | format(found.after.ece) }} | {{ "%.4f" | format(found.after.ece_by_chance) }} | {{ "%.4f" | format(found.before.nll) }} | {{ "%.4f" | format(found.after.nll) }} |
{% endfor %}

{% endif %}
## Files

Each file was run on all of {{ results.split }}, on which the best epoch was selected, too. Difference and agreement are those from the
student in PyTorch in float32, the difference the largest of any logit. The batch effect is the largest change of a {{ "probability" if facts.classes or options else "value (as a share of their range)" }}
when {{ "an example" if options else "a text" }} is answered in a batch of 64 instead of alone. A MB is 10^6 bytes.

| file | MB | {{ metric }} | difference | batch effect | agreement |{{ " ECE |" if calibration }}
| --- | --- | --- | --- | --- | --- |{{ " --- |" if calibration }}
{% for name, file in figures.files_on_dev.items() -%}
| `{{ name }}` | {{ "%.1f" | format(file.bytes / 1e6) }} | {{ "%.4f" | format(file.main_metric) }} | {{ "%.1e" | format(file.largest_difference) }} | {{ "%.1e" | format(file.batch_effect) }} | {{ "%.4f" | format(file.agreement) }} |{{ " %.4f |" | format(file.ece) if calibration }}
{% endfor %}

{% if onnx %}
ONNX files use opset {{ figures.opset }} and ONNX Runtime's own operators (oldest version tried: 1.18.1). Inputs are the tokenizer's outputs (int64, {{ "(batch, options, length), each of any size" if options else "any batch size and
length" }}), the output is `logits`{{ " (batch, options)" if options }}.{{ " Quantization to int8: " ~ quantization ~ "." if quantization }}

{% endif %}
`manifest.json` holds the sha256 of every file; `pkd export verify FOLDER` checks them.

## Training

- Data: {{ facts.train.source | files | code }}, {{ facts.train.examples }} examples. Epoch {{ facts.best_epoch }} of
  {{ "at most " if config.train.patience_epochs }}{{ config.train.epochs }} was the best by
  {{ "the divergence from the teacher" if config.evaluate.best_by == "divergence" else metric }} on {{ facts.dev.source | files | code }}.
- Student: {{ facts.initialized_from | text }}. Patience pairs (student layer, teacher layer, counted from 1): {{ pairs }}.
- Loss: {{ config.distill.formula }} ({{ terms }}
  {{- ", Gram matrices of its token states" if config.distill.gram }}{{ ", relations of its queries, keys and values" if config.distill.relations }}
  {{- ", its attention scores" if config.distill.attention }}), temperature {{ config.distill.temperature }},
  `ds_reduction: {{ config.distill.ds_reduction }}`, `pt_reduction: {{ config.distill.pt_reduction }}` (the same weight of PT is
  {{ "%.4g" | format(environment.beta_mean) }} with `mean`, {{ "%.4g" | format(environment.beta_sum) }} with `sum`), hidden states
  {{ "normalized" if config.distill.normalize else "not normalized" }}.
- Optimizer: AdamW, learning rate {{ config.train.learning_rate }}, batch size {{ config.train.batch_size }}, seed {{ config.run.seed }};
  trained in {{ environment.precision }} on {{ environment.world_size }} rank(s).
- Versions: {% for name, number in environment.versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}.

## Limitations

The student was trained and scored only on the data named above. It may do worse on other text, and it inherits the teacher's
errors and biases. Its license is that of the teacher and of the data.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says of a run.

    Attributes:
        main_metric: key of the metric that selected the best epoch.
        task: what the student was trained for.
        classes: what the outputs mean; None where they are no classes with names.
        initialized_from: one line on the student's initial weights.
        max_length: of the student's inputs, in tokens.
    """

    config: Config
    results: Results
    environment: Environment
    main_metric: str
    task: Task
    classes: ClassMapping | None
    train: TokenSetSummary
    dev: TokenSetSummary
    best_epoch: int
    initialized_from: str
    max_length: int


def _files(source: str) -> str:
    """Return the names of the files that a token set comes from, without this machine's folders."""
    return " + ".join(part if part.startswith("hub:") else Path(part).name for part in source.split(" + "))


def render(facts: CardFacts, figures: ExportFigures) -> str:
    """Return the model card in Markdown."""
    templates = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    templates.filters |= {
        "code": markdown_code, "files": _files, "text": markdown, "cell": lambda text: text.replace("|", r"\|"),
    }  # fmt: skip
    int8 = figures["files_on_dev"].get(ONNX_FILES["onnx-int8"])
    return templates.from_string(_TEMPLATE).render(
        facts=facts,
        environment=facts.environment,
        config=facts.config,
        teacher=" + ".join(map(name_of, facts.config.teacher.names)),
        results=facts.results,
        table=deployment_of(figures, facts.results, facts.main_metric),
        rows=score_rows(facts.results),
        agreement=agreement_sentence(facts.results),
        retention=retention_sentence(facts.results),
        figures=figures,
        calibration=facts.results.get("calibration"),
        multilabel=facts.results.get("multilabel"),
        chosen_on=CHOSEN_ON,
        bins=BINS,
        fitted_on=FITTED_ON,
        onnx=any(name in ONNX_FILES for name in figures["formats"]),
        quantization=int8.get("quantisation") if int8 else None,
        metric=METRICS[facts.main_metric],
        options=facts.results.get("options"),
        second=_second(facts.task),
        model_class="AutoModelForMultipleChoice"
        if facts.task.multiple_choice
        else "AutoModelForSequenceClassification",
        pairs=", ".join(f"({student}, {teacher})" for student, teacher in facts.environment.patience_pairs) or "none",
        terms=_terms(facts),
    )


def _second(task: Task) -> str:
    """Say what the second text of a pair is, of multiple choice."""
    if len(task.text) < 2:
        return "the option"
    gap = f"; a {markdown_code(task.gap)} in the question is replaced by the option instead" if task.gap else ""
    return f"the question, a space and the option{gap}"


def _terms(facts: CardFacts) -> str:
    """Say what the first terms of the loss compare with, as far as they have a weight."""
    distill = facts.config.distill
    said = {
        "labels": distill.alpha < 1,
        "teacher's predictions": distill.alpha > 0,
        "teacher's states": distill.beta > 0,
    }
    return ", ".join(name for name, used in said.items() if used) or "none"
