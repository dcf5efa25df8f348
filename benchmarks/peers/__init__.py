"""Our training against other implementations of the same distillation."""
