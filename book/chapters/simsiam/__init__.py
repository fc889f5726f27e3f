"""Chapter 9: SimSiam, a predictor and a stop-gradient alone."""
