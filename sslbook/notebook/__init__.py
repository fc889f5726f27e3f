"""What the chapters use: figures with alt text, sliders without a kernel, exercise checks, results with their origin.

Nothing here is imported by the rest of the package, except `images` and `style`, which draw the run report.
"""
