"""Fault campaign: run the whole job small, disturb it, rerun the same command, and compare the results; see README.md."""
