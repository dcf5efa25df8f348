"""Data: text files -> examples with stable ids -> flat token arrays -> batches."""
