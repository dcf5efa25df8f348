"""Distributed Patient Knowledge Distillation: a fine-tuned BERT-like teacher in, a small student ready to serve out."""

__version__ = "0.1.0"
