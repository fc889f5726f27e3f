"""Learning without labels: the pipeline and how a representation is evaluated."""
