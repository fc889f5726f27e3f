"""The wheel holds all it needs: from an empty folder the same commands work; and `import sslbook` stays light."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.engine import command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    """A wheel of the checkout, in `folder`."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "LICENSE-TEXT"):
        shutil.copy(ROOT / name, source)
    for name in ("sslbook", "book"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(words, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(build_wheel(folder)).extractall(folder / "site")
    return folder / "site"


def run(words: list[str], cwd: Path, site: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_from_an_empty_folder_with_only_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(["-c", "import sslbook; print(sslbook.__file__)"], tmp_path, installed).stdout
    assert str(installed) in where, "the checkout was imported, not the wheel"
    done = run(["-m", "sslbook.train", *command("rotation", None, steps=1)], tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "rotation-shapes" / "backbone.safetensors").exists()
    again = run(["-m", "sslbook", "train", *command("rotation", None, steps=1)], tmp_path, installed)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs" / "rotation-shapes-2" / "backbone.safetensors").exists()


def test_the_wheel_holds_the_book_without_its_site(installed: Path, tmp_path: Path) -> None:
    book = installed / "sslbook" / "book"
    for folder, pattern in (
        ("results", "**/*.json"),
        ("checkpoints", "*"),
        ("chapters", "*/*.py"),
        ("chapters", "*/*.ipynb"),
    ):
        names = {path.relative_to(ROOT / "book") for path in (ROOT / "book" / folder).glob(pattern)}
        assert names
        assert {name for name in names if not (book / name).is_file()} == set()
    assert not (book / "_static").exists()
    program = """
from sslbook.book.chapters.simclr import exercises
from sslbook import results
print(exercises.__file__, results.book())
results.load("simclr_shapes")
"""
    done = run(["-c", program], tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(book / "chapters" / "simclr" / "exercises.py"), str(book)]


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys, sslbook; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = run(["-c", script], tmp_path, ROOT).stdout
    for heavy in ("torchvision", "sklearn", "matplotlib", "umap", "numba", "jsonargparse", "timm", "IPython"):
        assert f"'{heavy}'" not in loaded
