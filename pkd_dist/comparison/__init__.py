"""Several methods over several seeds on one teacher and one cache, and the table that compares them."""
