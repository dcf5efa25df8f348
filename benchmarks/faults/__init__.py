"""A seeded fault campaign: the whole job at small size, disturbed again and again, must end with the undisturbed result.

plan (seed, trial) -> fault, moment, picks
    trial: site (folder | small disk | two network namespaces) -> start -> strike -> starts again -> comparison
        campaign: reference, trials.jsonl, summary
"""
