"""NNCLR, whose positive is another image, the nearest neighbor among past features."""
