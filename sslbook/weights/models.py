"""Models of timm and torchvision by name, with the weights that their hubs hold: `timm:vit_small_patch16_224.dino`.

`torchvision:resnet50` has the newest weights of torchvision, `torchvision:resnet50.IMAGENET1K_V1` those of that name.
`+FILE` after the name takes the weights from a file instead: `timm:vit_small_patch16_224+dino.pth`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sslbook.data.views import IMAGENET_MEAN, IMAGENET_STD
from sslbook.errors import UserError, explained, nearest
from sslbook.nn import resnet, vit
from sslbook.nn.backbones import describe, timm_model
from sslbook.weights.fill import fill

LIBRARIES = ("timm:", "torchvision:")
VIEW = {"size": 224, "resize": 256, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
_vit_b, _vit_l = (partial(make, positions="learned") for make in (vit.vit_base, vit.vit_large))
OURS: dict[str, Callable[..., nn.Module]] = {  # models of torchvision that are ours too, which offer maps and tokens
    **{name: getattr(resnet, name) for name in vars(resnet) if name.startswith(("resnet", "wide_resnet"))},
    **{"vit_b_16": _vit_b, "vit_b_32": partial(_vit_b, patch_size=32)},
    **{"vit_l_16": _vit_l, "vit_l_32": partial(_vit_l, patch_size=32)},
}


def is_named(source: str | Path) -> bool:
    """Whether this names a model of a library and no file."""
    return str(source).startswith(LIBRARIES)


def open_named(source: str | Path, pretrained: bool = True) -> tuple[nn.Module, dict[str, Any], Path | None]:
    """A model of a library as a backbone, its description, and the file of its weights if one is named.

    Args:
        source: the library, the model and optionally a file, such as `torchvision:resnet50+weights.pth`.
        pretrained: with the weights of the library's hub, unless a file is named.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    library, _, rest = str(source).partition(":")
    name, _, file = rest.partition("+")
    make = _timm if library == "timm" else _torchvision
    model, view = make(name, pretrained and not file)
    return model, {"method": rest, "backbone": describe(model), "view": {**VIEW, **view}}, Path(file) if file else None


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    model: Any = _fetched(f"timm:{name}", partial(timm_model, name, pretrained=pretrained))
    about = model.pretrained_cfg
    size = int(about["input_size"][-1])
    view = {"size": size, "resize": int(size / about.get("crop_pct", 0.875)), "mean": list(about["mean"])}
    return model, {**view, "std": list(about["std"]), "interpolation": about.get("interpolation", "bilinear")}


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    from torchvision import models

    name, _, tag = name.partition(".")
    if name not in models.list_models(module=models):
        raise UserError(f"torchvision has no model {name}{nearest(name, models.list_models(module=models))}")
    known: Any = models.get_model_weights(name)
    if tag and tag not in known.__members__:
        raise UserError(f"torchvision:{name} has no weights {tag}: choose among {', '.join(known.__members__)}")
    weights = known[tag] if tag else known.DEFAULT
    model = OURS[name]() if name in OURS else _without_classifier(models.get_model(name))
    if pretrained:
        state = _fetched(f"torchvision:{name}", partial(weights.get_state_dict, progress=False, check_hash=True))
        fill(model, state, f"torchvision:{name}")
    about = weights.transforms()
    view = {"size": about.crop_size[0], "resize": about.resize_size[0], "interpolation": about.interpolation.value}
    return model, {**view, "mean": list(about.mean), "std": list(about.std)}


def _fetched(what: str, fetch: Callable[[], Any]) -> Any:
    cure = f"download a file of weights elsewhere and give {what}+FILE"
    with explained(f"{what}: its weights cannot be had", Exception, cure=cure):  # hubs and caches raise dozens of kinds
        return fetch()


def _without_classifier(model: nn.Module) -> nn.Module:
    """A model whose last linear layer passes its input on, with that width as `dim`."""
    name, last = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Identity())
    model.dim = last.in_features  # pyrefly: ignore
    return model
