"""The distillation loss, the teacher, and the cache of its outputs."""
