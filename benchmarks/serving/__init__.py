"""Latency, throughput and steadiness of what a run exports."""
