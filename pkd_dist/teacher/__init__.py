"""The teacher: fine-tuned here when asked, run once, and read from its cache ever after."""
