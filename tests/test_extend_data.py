"""A data set of one's own needs no change in the package: a map-style class in any file, by its import path."""

import sys

import pytest

from sslbook.data.loader import Data
from sslbook.errors import UserError
from tests.engine import start

MODULE = '''
import torch

class Stripes:
    """Images of horizontal and vertical stripes, some of them without a label."""

    classes = ("horizontal", "vertical")

    def __init__(self, root, train):
        self.num_images = 24 if train else 8

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        stripes = torch.arange(16) % (2 + index // 2) < 1
        image = stripes.expand(3, 16, 16) if index % 2 else stripes[:, None].expand(3, 16, 16)
        return image.float(), None if index == 6 else index % 2
'''


@pytest.fixture
def stripes(tmp_path, monkeypatch) -> str:
    (tmp_path / "my_stripes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_stripes", raising=False)  # of another test
    return "my_stripes.Stripes"


def test_data_set_from_a_file_outside_the_package(stripes) -> None:
    data = Data(stripes, workers=0)
    assert data.describe() == "my_stripes.Stripes: 24 training images, 2 classes, 8 test images"
    assert data.class_names == ("horizontal", "vertical")
    assert data.labels("train")[:8].tolist() == [0, 1, 0, 1, 0, 1, -1, 1]
    assert data.has_test_labels
    [batch] = data.evaluation_batches("test")
    assert batch.views[0].shape == (8, 3, 224, 224)


def test_a_run_on_a_data_set_from_a_file_outside_the_package(stripes, tmp_path) -> None:
    start("simclr", tmp_path / "run", data__name=stripes, data__workers=0, steps=3)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"') == 3


def test_a_misspelled_import_path_says_what_is_wrong(stripes) -> None:
    with pytest.raises(UserError, match=r"data set my_stripes\.Strips: cannot be imported .*no attribute 'Strips'"):
        Data("my_stripes.Strips")
