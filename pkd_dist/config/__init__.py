"""The typed schema of a run, its YAML, and its check against the DeepSpeed JSON."""
