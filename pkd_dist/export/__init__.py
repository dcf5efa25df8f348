"""The consolidated student for serving, and its model card."""
