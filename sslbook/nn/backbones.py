"""Backbones: how wide they are, how they are described and built from a description, and those of timm."""

import importlib
import inspect
from typing import Any

from torch import nn

from sslbook.errors import UserError, nearest

BUILDABLE = ("ConvNet", "ResNet", "VisionTransformer", "DiscreteEncoder", "VQTokenizer", "sobel")


def backbone_dim(backbone: nn.Module) -> int:
    """The width of a backbone's features: its attribute `dim`, or what timm's models call it."""
    for name in ("dim", "head_hidden_size", "num_features"):
        dim = getattr(backbone, name, None)
        if isinstance(dim, int):
            return dim
    raise UserError(
        f"the backbone {type(backbone).__name__} does not say how wide its features are: give it an attribute `dim`"
    )


def timm_model(name: str, **options: Any) -> nn.Module:
    """Any model of timm by name, without its classifier.

    Args:
        name: timm's name of the model, such as `convnext_tiny`.
        options: what `timm.create_model` takes besides, such as `img_size` or `pretrained`.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError('models of timm need timm: python -m pip install "sslbook[timm]"') from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name}{nearest(name, timm.list_models())}")
    model: Any = timm.create_model(name, num_classes=0, **options)
    model.dim = backbone_dim(model)
    return model


def describe(module: nn.Module) -> dict[str, Any]:
    """Import path and constructor arguments of a module; the arguments are known if it keeps them in `init_args`."""
    init_args = getattr(module, "init_args", None)
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    if init_args is not None:
        path = getattr(module, "class_path", path)
    return {"class_path": path, "init_args": init_args}


def build(description: dict[str, Any]) -> nn.Module:
    """The backbone of a description, with fresh weights.

    Only networks of `sslbook.nn` that are made of numbers alone are built: a description is data, and data must not
    choose what code is run, or what files are read.
    """
    path, init_args = str(description.get("class_path", "")), description.get("init_args")
    if not path.startswith("sslbook.nn.") or path.rpartition(".")[2] not in BUILDABLE or init_args is None:
        raise UserError(
            f"the backbone {path or '(none)'} is not one of sslbook.nn: build it yourself and pass --backbone"
        )
    module_name, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module_name), name)
        inspect.signature(make).bind(**init_args)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"the backbone {path} cannot be built: {error}") from None
    module = make(**init_args)
    if not isinstance(module, nn.Module):
        raise UserError(f"{path} does not make a module")
    return module
