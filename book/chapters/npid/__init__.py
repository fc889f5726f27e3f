"""Instance discrimination, NPID and exemplars: every image is a class of its own."""
