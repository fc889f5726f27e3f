"""Chapter 16: DenseCL, InterCLR and PIRL: three ways to choose the pair that must agree."""
