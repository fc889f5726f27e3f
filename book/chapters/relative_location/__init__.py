"""Chapter 10: relative location and jigsaw, what can be learned from where parts lie."""
