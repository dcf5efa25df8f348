"""Logits of exactly n examples, task metrics, speed, and predictions."""
