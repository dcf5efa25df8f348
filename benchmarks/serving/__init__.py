"""Latency, throughput and load of an export."""
