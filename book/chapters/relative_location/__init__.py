"""Relative location and jigsaw: what can be learned from where parts lie."""
