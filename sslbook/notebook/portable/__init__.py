"""Chapters as notebooks that Colab, Kaggle and any Jupyter show as they should, without MyST.

`build` makes one notebook, `myst` turns the book's markup into plain Markdown, `labels` knows the numbers of equations,
exercises and propositions, `citations` the references. Here stand the addresses, for the notebooks and for the site's
launch buttons. The command is `python -m sslbook.tools portable`.
"""

SITE = "https://sslbook.github.io/sslbook"
REPOSITORY = "https://github.com/sslbook/sslbook"
BRANCH = "notebooks"  # of the repository; the notebooks lie at its top, and nothing else does


def name_of(page: str) -> str:
    """The notebook's name of a page: the folder of a chapter, the file of any other page.

    >>> name_of("book/chapters/simclr/chapter"), name_of("book/background/background")
    ('simclr', 'background')
    """
    *folders, stem = page.split("/")
    return folders[-1] if stem == "chapter" else stem


def colab(page: str) -> str:
    """The address that opens a page's notebook in Colab."""
    return f"{REPOSITORY}/blob/{BRANCH}/{name_of(page)}.ipynb".replace(
        "https://github.com", "https://colab.research.google.com/github"
    )


def kaggle(page: str) -> str:
    """The address that opens a page's notebook in Kaggle."""
    return f"https://kaggle.com/kernels/welcome?src={REPOSITORY}/blob/{BRANCH}/{name_of(page)}.ipynb"
