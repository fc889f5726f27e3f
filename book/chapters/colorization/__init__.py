"""The chapter on colorization and inpainting: its figures, exercises and runs."""
