"""The page *Reading the curves*: its figures and tables are those of the stored runs, its options exist."""

import re

import pytest

from sslbook import results
from sslbook.book.background import curves
from sslbook.cli.recipes import resolve
from sslbook.engine.loop import pretrain

PAGE = (results.book() / "background" / "reading_the_curves.md").read_text()
RESULT = results.load("curves")
OPTIONS = {
    "simclr": {"--optimizer.lr": "1", "--epochs": "9", "--method.view.color_jitter": "[0.4, 0.4, 0.4, 0.1]"},
    "byol": {"--method.momentum": "0.99", "--batch_size": "64", "--monitor": "knn", "--clip_grad_norm": "1"},
    "dino": {
        "--method.center_momentum": "0.9",
        "--method.teacher_temperature": "0.04",
        "--method.teacher_temperature_warmup": "3",
        "--precision": "bf16",
    },
    "vicreg": {"--method.covariance_weight": "2", "--method.variance_weight": "50", "--schedule.length": "10 %"},
    "swav": {"--method.epsilon": "0.03", "--hooks+": "sslbook.book.background.curves.EffectiveRank"},
}
ELSEWHERE = {"--protocols"}  # of sslbook.evaluate


def test_every_run_is_stored() -> None:
    assert {family: set(states) for family, states in RESULT.values.items()} == {
        family: set(states) for family, (_, _, states) in curves.FAMILIES.items()
    }
    assert not RESULT.commit.endswith("+")


@pytest.mark.parametrize("family", RESULT.values)
def test_figure_and_table_are_those_of_the_result(family: str) -> None:
    name = family.replace("-", "_")
    assert f":file: curves/{name}.html" in PAGE
    assert f":file: curves/{name}_table.html" in PAGE
    assert curves.alt(family, RESULT.values[family]) in (curves.FOLDER / f"{name}.html").read_text()
    assert (curves.FOLDER / f"{name}_table.html").read_text() == curves.table(
        RESULT.values, family
    )._repr_html_() + "\n"


@pytest.mark.parametrize("method", OPTIONS)
def test_options_exist(method: str) -> None:
    resolve([method, *[text for option in OPTIONS[method].items() for text in option]], pretrain)


def test_all_options_of_the_page_are_tried() -> None:
    tried = {flag for options in OPTIONS.values() for flag in options}
    assert set(re.findall(r"--[a-z_.]+\+?", PAGE)) - {"--"} == tried | ELSEWHERE
