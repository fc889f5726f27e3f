"""Barlow Twins, VICReg and W-MSE, decorrelation instead of negatives."""
