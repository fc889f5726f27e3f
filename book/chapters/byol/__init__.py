"""BYOL: prediction of an EMA target network, without negatives."""
