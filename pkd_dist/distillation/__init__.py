"""The loss of Patient Knowledge Distillation, the teacher, and the cache of its outputs."""
