"""Memory, start-up and arithmetic at sizes that were not run.

model.py     bytes of memory and of messages, from shapes and ZeRO stages
memory.py    memory of a rank as the data grows     -> benchmarks/results/scaling.json, docs/performance.md
startup.py   time to the first step of a resumed run -> the same
shuffle.py   simulated shuffling of 100 M cache rows -> benchmarks/results/scaling_shuffle.json
report.py    tables of docs/scaling.md
"""
