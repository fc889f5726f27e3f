"""SimCLR: contrastive learning."""
