"""`pkd serve`: an export over HTTP, for trying it out and for smoke tests. Needs neither PyTorch nor transformers."""
