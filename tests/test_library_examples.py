"""The programs of the page *As a library* run, each in a process and a folder of its own, and say what they should."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "book" / "reference" / "library_examples"
SAYS = {
    "own_dataset": r"Checkers: 64 training images, 2 classes, 32 test images\n8 steps, weights in runs/simclr-Checkers/",
    "own_backbone": r"trained by BYOL\n(.*\n)+BYOL +\d+\.\d",
    "own_loop": r"1 \{'loss': [\d.]+, 'teacher_entropy': [\d.]+, 'marginal_entropy': [\d.]+\}",
    "own_dataloader": r"steps 8 loss [\d.]+",
    "in_lightning": r"steps 8 loss [\d.]+",
    "into_scikit_learn": r"accuracy [\d.]+ %\nadjusted Rand index",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name == "in_lightning" and importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("Lightning is not installed: python -m pip install pytorch-lightning")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout), done.stdout


def test_the_page_shows_every_example_and_no_other() -> None:
    page = (ROOT / "book" / "reference" / "as_a_library.md").read_text(encoding="utf-8")
    assert re.findall(r"library_examples/(\w+)\.py", page) == list(SAYS)
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SAYS)
    for path in FOLDER.glob("*.py"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 88, path
