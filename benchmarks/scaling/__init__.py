"""What this design costs at sizes this machine does not have: a model, the measurements under it, and a simulation.

model.py     memory, bytes and seconds of a step from a few constants; no I/O
counting.py  what one step does, counted: operations, bytes they touch, bytes saved for backward, collectives
measure.py   measures the constants of this machine          -> benchmarks/results/scaling_constants.json
shuffle.py   shards and shuffling of a cache of 100 M rows   -> benchmarks/results/scaling_shuffle.json
report.py    the tables and plots of docs/scaling.md from the two files and the model
"""
