"""One folder a chapter: `chapter.ipynb`, its `exercises` (instant checks) and its `experiments` (longer runs)."""
