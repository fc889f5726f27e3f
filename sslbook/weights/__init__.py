"""Where weights come from and where they go: exported backbones, checkpoints, state dicts of other libraries."""
