"""What makes a CPU or a GPU faster without changing results; everything works without this folder."""
