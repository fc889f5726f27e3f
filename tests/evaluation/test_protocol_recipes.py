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


@pytest.mark.slow
def test_recipes_of_methods_name_a_protocol_and_a_published_setting_that_exist() -> None:
    lines = [
        (file.name, line.split("sslbook.evaluate ")[1].split())
        for file in RECIPES.parent.glob("*/imagenet*.yaml")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("#") and "sslbook.evaluate " in line
    ]
    assert len(lines) >= 30
    for name, (protocol, run, *options) in lines:
        assert run == "RUN", name
        words = [word for word in options if not word.startswith("--data.") and word not in ("imagenet", "data")]
        kind = find(protocol)
        cli(construct, with_recipe(kind, ["RUN", *words]), prog="evaluate", protocol=kind)
