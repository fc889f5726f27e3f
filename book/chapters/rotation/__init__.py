"""Rotation prediction."""
