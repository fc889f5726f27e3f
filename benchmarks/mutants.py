"""Mutation testing: are realistic mistakes noticed by the tests?

    python benchmarks/mutants.py                     # all
    python benchmarks/mutants.py methods data        # some areas: the files of benchmarks/mutants
    python benchmarks/mutants.py --only byol         # mistakes whose file or description contains this

Each mistake replaces one text in one file of a copy of the checkout, and the tests that should notice run there until
the first that fails: those not marked slow, then, if it survived, the slow ones. The tests must pass without any
mistake, which is tried first. Shape checks are off: a mistake must be noticed by what is computed.

`benchmarks/mutants/AREA.yaml` lists files, their tests (a command line of pytest, and variables of its environment) and
their mistakes: what is wrong, the text, and what stands in its place.
"""

import argparse
import ast
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads must not be forked

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing them takes longer than most tests

import itertools
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import einops  # noqa: F401 (from here on also what the tests import, for the forks)
import hypothesis  # noqa: F401
import jaxtyping  # noqa: F401
import jsonargparse  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest
import torch.nn.parallel  # noqa: F401
import torchvision.transforms.v2  # noqa: F401
import yaml
from sklearn import linear_model, metrics  # noqa: F401

ROOT = Path(__file__).parents[1]
LISTS = Path(__file__).parent / "mutants"
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "--no-header", "--tb=line"]
COUNTER = itertools.count(10, 10)
PATIENCE = 600.0  # seconds until a mistake that hangs counts as noticed


class Mutant(NamedTuple):
    """A realistic mistake."""

    area: str
    file: str
    what: str
    old: str
    new: str
    tests: str


def read(areas: list[str], only: str) -> list[Mutant]:
    """The mistakes of these areas; none stands for all areas."""
    found = []
    for path in sorted(LISTS.glob("*.yaml")):
        if not areas or path.stem in areas:
            for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
                for what, old, new, *tests in entry["mistakes"]:
                    found.append(Mutant(path.stem, entry["file"], what, old, new, (tests or [entry["tests"]])[0]))
    return [mutant for mutant in found if only in mutant.file + " " + mutant.what]


def stale(mutants: list[Mutant]) -> Iterator[str]:
    """Mistakes whose text does not stand in its file exactly once, or that leave no Python behind."""
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            yield f"{mutant.file}: {mutant.old!r} stands there {count} times"
        elif mutant.file.endswith(".py"):
            try:
                ast.parse(text.replace(mutant.old, mutant.new))
            except SyntaxError as error:
                yield f"{mutant.file}: {mutant.what}: {error}"


def run(tree: Path, tests: str, slow: bool, log: Path) -> int:
    """Pytest's exit status: 0 all passed, 1 a test failed, 5 there is none of this speed.

    In a fork of this process, which has imported torch already: most of the time would go there.
    """
    words = shlex.split(tests)
    arguments = [*PYTEST, "-m", "slow" if slow else "not slow", *[word for word in words if "=" not in word]]
    child = os.fork()
    if child == 0:
        os.setsid()  # so that what the tests start is ended with them
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ.update(word.split("=") for word in [f"PYTHONPATH={tree}", *words] if "=" in word)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os._exit(int(pytest.main(arguments)))
    deadline = time.monotonic() + PATIENCE
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(done[1])


def noticed(tree: Path, mutant: Mutant, fast: bool, log: Path) -> bool:
    """Apply the mistake, run its tests, take it back."""
    path = tree / mutant.file
    before, modified = path.read_text(encoding="utf-8"), path.stat().st_mtime
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    os.utime(path, times=(modified + next(COUNTER),) * 2)  # bytecode is known by its source's second and size
    try:
        return any(run(tree, mutant.tests, slow, log) not in (0, 5) for slow in ([False] if fast else [False, True]))
    finally:
        path.write_text(before, encoding="utf-8")
        os.utime(path, times=(modified, modified))


def copy(tree: Path) -> None:
    """The checkout's files, without what git ignores."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*")
    parser.add_argument("--only", default="", help="mistakes whose file or description contains this text")
    parser.add_argument("--fast", action="store_true", help="leave the slow tests out")
    parser.add_argument("--list", action="store_true", help="count the mistakes and check that they apply")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    mutants = read(options.areas, options.only)
    if lines := list(stale(mutants)):
        raise SystemExit("\n".join(lines))
    if options.list:
        raise SystemExit(f"{len(mutants)} mistakes in {len({m.file for m in mutants})} files; all apply")
    tally: dict[str, list[bool]] = {}
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        copy(tree)
        for tests in sorted({mutant.tests for mutant in mutants}):
            for slow in [False] if options.fast else [False, True]:
                if run(tree, tests, slow, log) not in (0, 5):
                    raise SystemExit(f"without a mistake these fail: {tests}\n{log.read_text()[-3000:]}")
        for mutant in mutants:
            began = time.perf_counter()
            seen = noticed(tree, mutant, options.fast, log)
            tally.setdefault(mutant.area, []).append(seen)
            survived += [] if seen else [f"{mutant.file}: {mutant.what}"]
            word = "noticed " if seen else "SURVIVED"
            print(f"{word} {time.perf_counter() - began:4.0f} s  {mutant.file}: {mutant.what}", flush=True)
    rows = {
        area: {"mistakes": len(seen), "noticed": sum(seen), "percent": round(100 * sum(seen) / len(seen), 1)}
        for area, seen in {**tally, "all": [one for seen in tally.values() for one in seen]}.items()
    }
    for area, row in rows.items():
        print(f"{area:14s} {row['noticed']:4d} of {row['mistakes']:4d} noticed, {row['percent']} %")
    print("\n".join(["survived:", *survived]) if survived else "none survived")
    if options.save:
        from sslbook import results  # not earlier: the forks import the package of the copy

        print(results.save("benchmark_mutants", rows, settings={**vars(options), "survived": survived}))


if __name__ == "__main__":
    main()
