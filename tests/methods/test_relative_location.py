import pytest
import torch
import torch.nn.functional as F

from sslbook import nn as nets
from sslbook.data.patch_grid import cut_patches
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.relative_location import RelativeLocation, pair_with_center, targets
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

SMALL = {"cell_size": 5, "patch_size": 4}

CASE = Case(
    options={"view": VIEW, **SMALL, "hidden_dim": 16},
    command={"method.backbone": CONVNET, "method.cell_size": 5, "method.patch_size": 4, "method.hidden_dim": 16},
    learned=lambda method, batch, out: bool(out["location_accuracy"] > 95),
    overfit={"hidden_dim": 128},
    corners=[(2, 0.05, {})],  # one image in each process
    other_backbones=[transformer],
)


def test_pairs_and_targets() -> None:
    x = torch.arange(18.0).view(2, 9, 1)
    assert pair_with_center(x).tolist() == [[4.0, n] for n in (0, 1, 2, 3, 5, 6, 7, 8)] + [
        [13.0, n] for n in (9, 10, 11, 12, 14, 15, 16, 17)
    ]
    assert targets(2, x.device).tolist() == 2 * list(range(8))


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
def test_loss_is_cross_entropy_over_eight_positions(n: int) -> None:
    method = make("relative_location").double().eval()
    batch = make_batch(method, n)
    batch = batch._replace(views=(batch.views[0].double(),))
    patches = cut_patches(batch.views[0], batch.index, 5, 4, Clock())
    loss = 0.0
    for i in range(n):
        center = method.backbone(patches[i, 4][None])[0]
        for side, cell in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
            scores = method.head(torch.cat([center, method.backbone(patches[i, cell][None])[0]])[None])[0]
            loss -= float(F.softmax(scores, dim=0)[side].log()) / (8 * n)
    assert float(method(batch, Clock())["loss"]) == pytest.approx(loss, rel=1e-5)  # the method measures in float32


def accuracy_after_training(shuffled: bool) -> float:
    method = make("relative_location")
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    colors = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for step in range(50):
        batch = make_batch(method, 16, seed=step)
        positions = torch.rand(16, 9, generator=torch.Generator().manual_seed(step)).argsort(dim=1)
        cells = colors[positions] if shuffled else colors.expand(16, 9, 3)
        x = cells.view(16, 3, 3, 3).permute(0, 3, 1, 2)
        x = F.pad(
            x.repeat_interleave(5, dim=2).repeat_interleave(5, dim=3), (0, 1, 0, 1)
        )  # each position has its color
        out = method(batch._replace(views=(x + 0.1 * batch.views[0],)), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        total += float(out["location_accuracy"]) / 10 if step >= 40 else 0.0
    return total


def test_shuffled_neighbors_cannot_be_classified() -> None:
    assert accuracy_after_training(shuffled=False) > 90
    assert accuracy_after_training(shuffled=True) < 20  # chance level: 12.5


def test_head_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        method = RelativeLocation(nets.resnet50())
        assert sum(p.numel() for p in method.head.parameters()) == 4096 * 4096 + 2 * 4096 + 4096 * 8 + 8
        assert method.head(torch.empty(16, 2 * 2048)).shape == (16, 8)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"set view\.size to at least 18"):
        make("relative_location", cell_size=6)
    with pytest.raises(UserError, match=r"set view\.size to at least 255"):
        RelativeLocation(nets.ConvNet(4), view=View(size=224))
