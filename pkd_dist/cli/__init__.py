"""Command lines: `launcher/train.py` (`launch`) and `pkd` (`main`)."""
