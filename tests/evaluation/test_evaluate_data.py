"""What `evaluate` says of the labels before it measures."""

import pytest
import torch

from sslbook.data.loader import Data
from sslbook.evaluate import tell_unseen


def test_classes_that_only_test_images_have_are_named(capsys: pytest.CaptureFixture) -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    unseen = "classes of test images without a training image: c, d\n"
    for test, said in (([0, 2, 3], unseen), ([1, 0, -1], "")):
        data = Data.from_images(images, torch.tensor([0, 1, 1]), images, torch.tensor(test), class_names="abcd")
        tell_unseen(data)
        assert capsys.readouterr().err == said
    tell_unseen(Data.from_images(images, torch.tensor([0, 1, 1]), class_names="ab"))  # no test images
    assert capsys.readouterr().err == ""
