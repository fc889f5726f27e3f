"""Your own backbone: a module with `dim` and `forward`."""

import functools

import torch
from torch import Tensor, nn

import sslbook
from sslbook.evaluate import evaluate
from sslbook.evaluation.protocols.knn import KNN
from sslbook.methods import BYOL


class Net(nn.Module):
    """Images (n, 3, h, w) to features (n, dim)."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(
            nn.Conv2d(3, dim, 4, stride=4), nn.BatchNorm2d(dim), nn.ReLU()
        )

    def forward_map(self, x: Tensor) -> Tensor:
        """The feature map (n, dim, rows, columns), for methods that need one."""
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_map(x).mean(dim=(2, 3))


data = sslbook.Data(shapes=sslbook.Shapes(num_train=64, num_test=32))
crop = sslbook.View(size=16, crop=(0.3, 1.0))
method = BYOL(Net(), view_1=crop, view_2=crop, hidden_dim=32, projector_dim=16)
sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
run = sslbook.pretrain(method, data, sgd, batch_size=16, epochs=2)

# Files hold weights and no code, so whoever loads them brings the class.
backbone, facts = sslbook.load_backbone(run.folder, Net())
print("trained by", facts["method"])
evaluate(str(run.folder), data, [KNN(k=5)], backbone=Net(), progress=False)
