"""benchmarks/results/*.json -> docs/performance.md and its plots."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write() -> None: ...
