"""SimSiam, a predictor and a stop-gradient alone."""
