"""Chapter 15: ODC, whose clusters are updated with every batch."""
