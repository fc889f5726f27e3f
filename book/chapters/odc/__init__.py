"""ODC, whose clusters are updated with every batch."""
