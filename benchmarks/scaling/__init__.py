"""Memory, start-up and arithmetic at sizes that were not run; see docs/scaling.md and docs/performance.md."""
