"""Chapter 10: SimSiam, a predictor and a stop-gradient alone."""
