"""Pages beside the chapters: the mathematics they use, and how to read a run's curves."""
