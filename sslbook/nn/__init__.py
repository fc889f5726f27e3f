# ruff: noqa: F401 (imported for type checkers alone)
"""What several methods share. Names are imported when first used: torchvision and timm load only if needed.

A backbone is any module that maps images `(n, 3, h, w)` to features `(n, dim)` and has the attribute `dim`; see
`sslbook.nn.backbones` for what it may offer besides.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslbook.nn.backbones import backbone_dim, timm_model
    from sslbook.nn.batch_norm import BatchNorm, convert_batch_norm
    from sslbook.nn.convnet import ConvNet
    from sslbook.nn.ema import EMA
    from sslbook.nn.heads import MLP, DINOHead
    from sslbook.nn.memory_bank import MemoryBank
    from sslbook.nn.queue import Queue
    from sslbook.nn.resnet import (
        ResNet,
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        wide_resnet50_2,
        wide_resnet101_2,
    )
    from sslbook.nn.sobel import Sobel
    from sslbook.nn.tokenizers import DiscreteEncoder, VQTokenizer
    from sslbook.nn.vit import VisionTransformer, vit_base, vit_giant, vit_huge, vit_large, vit_small, vit_tiny

_HOME = {
    "backbones": ["backbone_dim", "timm_model"],
    "batch_norm": ["BatchNorm", "convert_batch_norm"],
    "convnet": ["ConvNet"],
    "ema": ["EMA"],
    "heads": ["MLP", "DINOHead"],
    "memory_bank": ["MemoryBank"],
    "queue": ["Queue"],
    "resnet": ["ResNet", *(f"resnet{d}" for d in (18, 34, 50, 101, 152)), "wide_resnet50_2", "wide_resnet101_2"],
    "sobel": ["Sobel"],
    "tokenizers": ["DiscreteEncoder", "VQTokenizer"],
    "vit": ["VisionTransformer", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"],
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"sslbook.nn.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
