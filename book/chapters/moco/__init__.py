"""MoCo, a queue of negatives and a momentum encoder."""
