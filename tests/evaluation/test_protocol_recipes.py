"""Every published setting of a protocol says where it is from and what it should give, and is accepted by its protocol."""

from pathlib import Path

import pytest

from sslbook.cli.common import cli
from sslbook.evaluate import RECIPES, with_recipe
from sslbook.evaluation.base import Protocol, find

FILES = sorted(RECIPES.glob("*/*.yaml"))


def construct(run: str, protocols: list) -> Protocol:
    """Return the protocol of a command line.

    Args:
        run: not used.
        protocols: what the command line makes.
    """
    return protocols[0]


@pytest.mark.parametrize("file", FILES, ids=[f"{file.parent.name}-{file.stem}" for file in FILES])
def test_recipe(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for line in ("# Weights:", "# Expected:", "# Source:"):
        assert line in text
    kind = find(file.parent.name)
    made = cli(construct, with_recipe(kind, ["RUN", "--recipe", file.stem]), prog="evaluate", protocol=kind)
    assert isinstance(made, kind)
