"""One folder a chapter: `chapter.ipynb`, its `figures`, its `exercises` (instant checks) and `experiments` (long runs).

`CHAPTERS` lists the folders in the order of the table of contents: the first is chapter 1.
"""

CHAPTERS = (
    "learning_without_labels",
    "rotation",
    "relative_location",
    "colorization",
    "simclr",
    "moco",
    "npid",
    "nnclr",
    "densecl",
    "deepcluster",
    "odc",
    "swav",
    "byol",
    "simsiam",
    "decorrelation",
    "mae",
)
