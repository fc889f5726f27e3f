"""What the chapters use: figures with alt text, sliders without a kernel, instant checks of exercises.

Nothing here is imported by the rest of the package, except `plots` and `style`, which the run's report uses.
"""
