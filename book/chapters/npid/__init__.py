"""Chapter 14: instance discrimination, in which every image is a class of its own."""
