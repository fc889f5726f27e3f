"""Write the notebooks that Colab and Kaggle open: `python -m sslbook.tools portable --out FOLDER`."""

from pathlib import Path

from sslbook import results
from sslbook.cli.common import cli, run
from sslbook.errors import UserError
from sslbook.files import read_text
from sslbook.notebook.portable import SITE, build, colab, kaggle, name_of
from sslbook.notebook.portable.labels import Labels
from sslbook.notebook.portable.sources import has_code

HEAD = "# Notebooks\n\nMade from the chapters by `python -m sslbook.tools portable`; change those.\n"


def portable(out: str = "notebooks", site: str = SITE, revision: str = "main") -> None:
    """Write one notebook for every page of the book that has code, without MyST, with a cell that installs sslbook.

    Args:
        out: the folder, made where it is missing; what this command wrote there before is written anew.
        site: the address of the book's site, which references to other pages lead to.
        revision: branch, tag or commit of the package that the notebooks install.

    Raises:
        UserError: there is no checkout above this folder, `out` holds other files, or a page holds markup that is not
            known.
    """
    book = results.folder()
    if book is None:
        raise UserError("portable notebooks are written from a checkout of the book; there is none here")
    labels, folder = Labels(book.parents[1]), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    if any(folder.iterdir()) and not (readme.is_file() and read_text(readme).startswith(HEAD)):
        raise UserError(f"--out {out}: holds other files; choose a new folder, nothing is overwritten")
    listed = [HEAD]
    for page in labels.pages.values():
        if not has_code(page):
            continue
        notebook = build.portable(page, labels, site, revision)
        path = folder / f"{name_of(page.name)}.ipynb"
        build.write(notebook, path)
        listed.append(f"- {page.title}: [Colab]({colab(page.name)}), [Kaggle]({kaggle(page.name)})")
        print(path)
    readme.write_text("\n".join(listed) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.tools portable`."""
    cli(portable, argv, prog="python -m sslbook.tools portable")


if __name__ == "__main__":
    run(main)
