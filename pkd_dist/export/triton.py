"""A Triton model repository: each ONNX graph of an export as a model from token ids to logits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

MAX_BATCH = 64
_CONFIG = """\
name: "{{ name }}"
backend: "onnxruntime"
max_batch_size: {{ max_batch }}
input [
{% for input in inputs %}
  { name: "{{ input }}" data_type: TYPE_INT64 dims: [ -1 ] }{{ "," if not loop.last }}
{% endfor %}
]
output [
  { name: "logits" data_type: TYPE_FP32 dims: [ {{ classes }} ]{{ ' label_filename: "labels.txt"' if labels }} }
]
dynamic_batching {
  preferred_batch_size: [ 8, 16, 32 ]
  max_queue_delay_microseconds: 2000
  default_queue_policy { max_queue_size: 1024 }
}
instance_group [
  { count: 1 kind: {{ "KIND_GPU" if gpu else "KIND_AUTO" }} }
]
"""
_README = """\
# Triton model repository

    tritonserver --model-repository={{ '$PWD' }}

{% for name in names %}- `{{ name }}`: token ids in, `logits` out
{% endfor %}
The client tokenizes, with the tokenizer files of the parent folder; the server runs no Python. Triton batches requests of
equal length: pad to a multiple of {{ multiple }}, so that many requests have the same length.

```python
import numpy as np
import tritonclient.http as triton
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("..")
client = triton.InferenceServerClient("localhost:8000")

def logits(texts{{ ", pairs" if pair }}):
    tokens = tokenizer(texts, {{ "pairs, " if pair }}truncation=True, max_length={{ max_length }}, padding=True, pad_to_multiple_of={{ multiple }}, return_tensors="np")
    inputs = []
    for name in {{ inputs }}:
        inputs.append(triton.InferInput(name, tokens[name].shape, "INT64"))
        inputs[-1].set_data_from_numpy(tokens[name].astype(np.int64))
    return client.infer("{{ names[-1] }}", inputs).as_numpy("logits")
```
{% if labels %}
Classes, in the order of the logits: {{ labels | join(", ") }} (`labels.txt`, for Triton's classification extension).
{% endif %}
"""
MULTIPLE = 8
"""The client pads to a multiple of this many tokens."""


def write(
    folder: Path, graphs: dict[str, Path], inputs: Sequence[str], labels: Sequence[str], pair: bool, max_length: int
) -> None:
    """Write FOLDER/NAME/{config.pbtxt,1/model.onnx} for each graph, and a README.md with an example client.

    Args:
        graphs: Model name -> its ONNX file, which is copied.
        inputs: Input names of the graphs.
        labels: Class names in the order of the logits; empty for a regression.
        pair: The example client sends pairs of texts.
        max_length: Tokens at which the example client truncates.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name, graph in graphs.items():
        (folder / name / "1").mkdir(parents=True)
        shutil.copyfile(graph, folder / name / "1" / "model.onnx")
        config = environment.from_string(_CONFIG).render(
            name=name, max_batch=MAX_BATCH, inputs=inputs, classes=len(labels) or 1, labels=labels, gpu="fp16" in name
        )
        (folder / name / "config.pbtxt").write_text(config)
        if labels:
            lines = "".join(" ".join(label.splitlines()) + "\n" for label in labels)
            (folder / name / "labels.txt").write_text(lines, encoding="utf-8")
    readme = environment.from_string(_README).render(
        names=list(graphs), inputs=list(inputs), labels=labels, pair=pair, max_length=max_length, multiple=MULTIPLE
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
