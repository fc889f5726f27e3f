"""The table that a person reads and the form that a file keeps."""

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.evaluation.table import Row, chance_row, format_factors, format_table, to_json

ROWS = [Row("SimCLR", knn=68.123, linear=70.0), Row("supervised", knn=90.0, linear=100.0, head=91.26, seconds=3.0)]
CHANCE = Row("chance", knn=10.5, linear=10.5)


def test_columns_are_aligned_and_chance_stands_below() -> None:
    assert format_table(ROWS, CHANCE).splitlines() == [
        "            kNN %  linear %  own head %",
        "SimCLR       68.1      70.0",
        "supervised   90.0     100.0        91.3",
        "-" * 39,
        "chance       10.5      10.5",
    ]


def test_what_nobody_measured_has_no_column() -> None:
    assert format_table([Row("pixels", knn=20.0)], CHANCE).splitlines() == [
        "        kNN %",
        "pixels   20.0",
        "-------------",
        "chance   10.5",
    ]


def test_json_keeps_every_digit_and_leaves_out_what_is_missing() -> None:
    assert to_json(ROWS[:1], CHANCE) == [
        {"name": "SimCLR", "knn": 68.123, "linear": 70.0},
        {"name": "chance", "knn": 10.5, "linear": 10.5},
    ]


def test_factors_side_by_side() -> None:
    text = format_factors(
        {"SimCLR": {"hue": 50.0, "x": 7.0}, "pixels": {"hue": 99.9, "x": -1.0}}, {"hue": 12.5, "x": 0.0}
    )
    assert text.splitlines() == [
        "factor  SimCLR  pixels  chance",
        "hue       50.0    99.9    12.5",
        "x          7.0    -1.0     0.0",
    ]


def test_chance_is_the_most_frequent_training_label() -> None:
    data = Data(shapes=Shapes(num_train=100, num_test=50))
    counts = data.labels("train").bincount()
    expected = 100 * (data.labels("test") == counts.argmax()).double().mean().item()
    assert chance_row(data).knn == expected
