"""sslbook: self-supervised learning for vision, derived, run and proved.

The book is in `book/`; the package holds the same algorithms. Start with `python -m sslbook.train`, or from Python:

>>> import functools, torch, sslbook
>>> from sslbook.methods import SimCLR
>>> from sslbook.nn import ConvNet
>>> data = sslbook.Data()  # images that the package renders; Data(folder="photos") for your own
>>> method = SimCLR(ConvNet(), sslbook.View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1)))
>>> adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
>>> run = sslbook.pretrain(method, data, adamw, epochs=5, out_dir="runs/first")
>>> backbone, facts = sslbook.load_backbone("runs/first")
>>> backbone(torch.randn(8, 3, 16, 16)).shape
torch.Size([8, 128])
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sslbook.data.datasets.shapes import Shapes as Shapes
    from sslbook.data.loader import Data as Data
    from sslbook.data.views import View as View
    from sslbook.distributed import default_device as default_device
    from sslbook.engine.loop import pretrain as pretrain
    from sslbook.errors import UserError as UserError
    from sslbook.schedules import Clock as Clock
    from sslbook.weights.backbone import load_backbone as load_backbone

# Loaded when first used: `import sslbook` costs little more than nothing, and no one waits for what he does not use.
_LAZY = {
    "Clock": "sslbook.schedules",
    "Data": "sslbook.data.loader",
    "UserError": "sslbook.errors",
    "View": "sslbook.data.views",
    "Shapes": "sslbook.data.datasets.shapes",
    "default_device": "sslbook.distributed",
    "load_backbone": "sslbook.weights.backbone",
    "pretrain": "sslbook.engine.loop",
}
__all__ = ["Clock", "Data", "Shapes", "UserError", "View", "__version__", "default_device", "load_backbone", "pretrain"]


def _hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # this is `python -m sslbook...`: Ctrl-C while it still imports is one line, too
    sys.excepthook = _hook


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sslbook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
