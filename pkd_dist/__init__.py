"""Distributed Patient Knowledge Distillation: a fine-tuned BERT-like teacher in, a small student ready to serve out.

docs/architecture.md describes the modules, how layers are counted, and what the suffix of a name like `logits_BC` means.
"""

__version__ = "0.1.0"
