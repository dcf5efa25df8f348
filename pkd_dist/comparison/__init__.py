"""`pkd compare`: several methods over several seeds, a study of the search engine, and the table that compares them."""
