"""A small server of an export, to try it and to smoke-test it."""
