"""Chapter 7: SwAV, clusters by optimal transport."""
