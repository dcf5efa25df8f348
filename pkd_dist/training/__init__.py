"""The DeepSpeed engine and the one training loop that fine-tunes teachers and distils students."""
