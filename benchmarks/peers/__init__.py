"""Ours against the other implementations, on one machine in one run; see README.md."""
