"""A trained student as files to serve it from, each verified on all of dev."""
