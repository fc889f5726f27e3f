"""How a method is trained: the loop, what a run is, its folder, its checkpoints."""
