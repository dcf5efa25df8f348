"""The student's losses and its training from the teacher's cache."""
