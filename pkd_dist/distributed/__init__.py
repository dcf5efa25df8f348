"""The ranks of a run: how they find each other, work together, and end together."""
