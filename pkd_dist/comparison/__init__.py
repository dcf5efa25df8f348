"""Several methods over several seeds, each a run of its own; the table and its plot."""
