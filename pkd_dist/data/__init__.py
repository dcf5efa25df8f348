"""Text files -> examples with stable ids -> flat token arrays -> batches."""
