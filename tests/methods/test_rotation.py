import torch
import torch.nn.functional as F

from sslbook.methods.rotation import rotate, targets
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW},
    command={"method.backbone": CONVNET},
    learned=lambda method, batch, out: bool(out["rotation_accuracy"] > 95),
    corners=[(2, 0.05, {})],  # one image in each process
    other_backbones=[transformer],
)


def test_rotate_pixel_by_pixel() -> None:
    x = torch.randn(2, 3, 5, 5)
    rotated = rotate(x)
    assert targets(2, x.device).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i in range(2):
        for row in range(5):
            for column in range(5):
                pixel = x[i, :, row, column]
                # Rotating by 90 degrees counterclockwise brings the right edge to the top.
                assert torch.equal(rotated[i, :, row, column], pixel)
                assert torch.equal(rotated[2 + i, :, 4 - column, row], pixel)
                assert torch.equal(rotated[4 + i, :, 4 - row, 4 - column], pixel)
                assert torch.equal(rotated[6 + i, :, column, 4 - row], pixel)


@torch.no_grad()
def test_loss_is_equation_2() -> None:
    method = make("rotation").double().eval()
    batch = make_batch(method, 3)
    x = batch.views[0].double()
    loss = 0.0
    for i in range(3):
        for k in range(4):
            scores = method.head(method.backbone(torch.rot90(x[i], k, (1, 2))[None]))[0]
            loss -= float(F.softmax(scores, dim=0)[k].log()) / 12
    out = method(batch._replace(views=(x,)), Clock())
    torch.testing.assert_close(float(out["loss"]), loss, rtol=1e-6, atol=0)  # the method measures in float32


def accuracy_after_training(symmetric: bool) -> float:
    method = make("rotation")
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    total = 0.0
    for step in range(60):
        batch = make_batch(method, 16, seed=step)
        x = 0.3 * batch.views[0]
        x[:, :, :4, 6:10] += 1.0  # a mark at the top of every image
        if symmetric:
            x = rotate(x).view(4, *x.shape).mean(dim=0)
        out = method(batch._replace(views=(x,)), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        total += float(out["rotation_accuracy"]) / 20 if step >= 40 else 0.0
    return total


def test_symmetric_images_cannot_be_classified() -> None:
    assert accuracy_after_training(symmetric=False) > 90
    assert accuracy_after_training(symmetric=True) < 35
