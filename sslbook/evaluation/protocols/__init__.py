"""Evaluation protocols: one class in one file, found by the file's name."""
