"""One training loop for teachers and students, on a plain PyTorch engine or on DeepSpeed."""
