"""SwAV, clusters by optimal transport."""
