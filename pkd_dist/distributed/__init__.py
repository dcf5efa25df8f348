"""Ranks, their collectives, and how they agree on an end."""
