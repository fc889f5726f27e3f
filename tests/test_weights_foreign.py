"""Weights of other libraries: the network gives the same features under our names, or the file is refused."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from sslbook.errors import UserError
from sslbook.evaluate import main
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet, ResNet, VisionTransformer
from sslbook.weights.backbone import load_backbone
from sslbook.weights.importers import PREFERRED
from sslbook.weights.load import load_weights
from sslbook.weights.models import is_named, open_named

Tensors = dict[str, Tensor]
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet() -> ResNet:
    return ResNet(18, 4, "small")


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(16, 4, 16, 2, 2, **{"positions": "learned", **options})


def randomized(module: nn.Module) -> nn.Module:
    """Every parameter and every statistic at random, so that none can be left out unnoticed."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.6)
    return module.eval()


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def noise(tensors: Tensors) -> Tensors:
    return {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in tensors.items()}


RELEASES: dict[str, Callable[[Tensors], Any]] = {
    "moco": lambda t: {
        "epoch": 200,
        "state_dict": under("module.encoder_k.", noise(t))
        | under("module.encoder_q.", t)
        | {"module.queue": torch.ones(2, 9)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
    },
    "moco_v3": lambda t: {"state_dict": under("module.momentum_encoder.", noise(t)) | under("module.base_encoder.", t)},
    "simsiam": lambda t: {"state_dict": under("module.encoder.", t) | {"module.predictor.0.weight": torch.ones(2, 2)}},
    "dino": lambda t: {
        "student": under("module.backbone.", noise(t)),
        "teacher": under("backbone.", t) | {"head.mlp.0.weight": torch.ones(2, 2)},
        "args": argparse.Namespace(arch="vit_small", output_dir=Path("out")),
    },
    "ijepa": lambda t: {"encoder": under("module.", noise(t)), "target_encoder": under("module.", t), "epoch": 300},
    "mae": lambda t: {"model": t},
    "byol": lambda t: under("target_network.encoder.", noise(t)) | under("online_network.encoder.", t),
    "vissl": lambda t: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", t), "heads": {"0.weight": torch.ones(2)}}}
        }
    },
    "mmselfsup": lambda t: {
        "meta": {"epoch": 200},
        "state_dict": under("backbone.", t) | {"neck.fc.weight": torch.ones(2)},
    },
    "lightning": lambda t: {
        "state_dict": under("model.", t),
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "solo_learn": lambda t: {"state_dict": under("momentum_backbone.", noise(t)) | under("backbone.", t)},
    "barlow_twins": lambda t: t,
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("make", [resnet, vit])
def test_the_prefix_of_a_release_is_found(release: str, make: Callable[[], nn.Module], tmp_path: Path, capsys) -> None:
    source, target = randomized(make()), make().eval()
    torch.save(RELEASES[release](source.state_dict()), tmp_path / "release.pth")
    module, facts = load_backbone(tmp_path / "release.pth", target)
    assert module is target
    assert torch.equal(target(IMAGES), source(IMAGES))
    said = capsys.readouterr().out
    total = len(source.state_dict())
    assert f"{total} of {total} tensors loaded" in said
    assert facts["method"] == "release"
    method = SimCLR(make())
    load_weights(method, tmp_path / "release.pth")
    assert torch.equal(method.backbone.eval()(IMAGES), source(IMAGES))


def test_of_two_networks_the_papers_is_taken_in_whatever_order_they_stand(tmp_path: Path) -> None:
    source = randomized(resnet())
    weights = source.state_dict()
    for word, other in list(
        zip(PREFERRED, ("student", "encoder", "online", "encoder_k", "momentum_encoder", "target"))
    )[::2]:
        for pair in ((word, other), (other, word)):
            state = {one: weights if one == word else noise(weights) for one in pair}
            torch.save(state, tmp_path / "two.pth")
            target = resnet().eval()
            load_weights(target, tmp_path / "two.pth")
            assert torch.equal(target(IMAGES), source(IMAGES)), pair


# Names of other libraries ------------------------------------------------------------------------------------------------


def split_qkv(tensors: Tensors, names: tuple[str, str, str]) -> Tensors:
    out: Tensors = {}
    for name, value in tensors.items():
        if "attn.qkv." in name:
            out |= {name.replace("attn.qkv.", f"{one}."): part for one, part in zip(names, value.chunk(3))}
        else:
            out[name] = value
    return out


def renamed(tensors: Tensors, *table: tuple[str, str]) -> Tensors:
    out = {}
    for name, value in tensors.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def hugging_face_vit(tensors: Tensors) -> Tensors:
    """As `transformers.ViTModel` and the encoder of `ViTMAEForPreTraining` name theirs."""
    tensors = split_qkv(tensors, tuple(f"attention.attention.{one}" for one in ("query", "key", "value")))
    return renamed(
        tensors,
        (r"^cls_token", "embeddings.cls_token"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"^blocks", "encoder.layer"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"attn\.proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    )


def dinov2(tensors: Tensors) -> Tensors:
    """As `transformers.Dinov2Model` names its own."""
    tensors = split_qkv(tensors, tuple(f"attention.attention.{one}" for one in ("query", "key", "value")))
    return renamed(
        tensors,
        (r"^cls_token", "embeddings.cls_token"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"^blocks", "encoder.layer"),
        (r"attn\.proj", "attention.output.dense"),
        (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
    ) | {"embeddings.mask_token": torch.ones(1, 16)}


def mmpretrain(tensors: Tensors) -> Tensors:
    return renamed(
        tensors,
        (r"^patch_embed\.proj", "patch_embed.projection"),
        (r"^norm\.", "ln1."),
        (r"^blocks", "layers"),
        (r"\.norm([12])", r".ln\1"),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
        (r"ls1\.gamma", "attn.gamma1.weight"),
        (r"ls2\.gamma", "ffn.gamma2.weight"),
    )


def hugging_face_resnet(tensors: Tensors) -> Tensors:
    out = {}
    for name, value in tensors.items():
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        name = re.sub(r"^layer(\d)\.", lambda found: f"encoder.stages.{int(found[1]) - 1}.layers.", name)
        name = re.sub(r"\.conv(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.convolution.", name)
        name = re.sub(r"\.bn(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.normalization.", name)
        name = name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
        out[name] = value
    return out


def beit(tensors: Tensors) -> Tensors:
    """As in BEiT's release: queries and values have a bias and keys none, and positions are shared by all blocks."""
    out: Tensors = {}
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            start = name.removesuffix("qkv.bias")
            out |= {f"{start}q_bias": q, f"{start}v_bias": v}
        elif name != "pos_embed":  # which it has none of
            out[name] = value
    return renamed(out, (r"ls([12])\.gamma", r"gamma_\1"), (r"bias\.table", "bias.relative_position_bias_table"))


@pytest.mark.parametrize(
    ("write", "make", "prefixes"),
    [
        (hugging_face_vit, vit, ("", "vit.")),
        (dinov2, lambda: vit(layer_scale=1.0), ("", "dinov2.")),
        (mmpretrain, vit, ("", "backbone.")),
        (mmpretrain, lambda: vit(layer_scale=1.0), ("backbone.",)),
        (hugging_face_resnet, resnet, ("", "resnet.")),
        (hugging_face_resnet, lambda: ResNet(50, 4, "small"), ("resnet.",)),
        (beit, lambda: vit(positions="relative", layer_scale=0.1), ("", "encoder.")),
    ],
)
def test_names_of_other_libraries(write: Callable, make: Callable, prefixes: tuple[str, ...], tmp_path: Path) -> None:
    source = randomized(make())
    if write is beit:
        for block in source.blocks:
            block.attn.qkv.bias.data[16:32] = 0
        source.pos_embed.zero_()
    for prefix in prefixes:
        tensors = under(prefix, write(source.state_dict())) | {"decoder.decoder_norm.weight": torch.ones(3)}
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, tmp_path / "model.safetensors")
        target = make().eval()
        loaded = load_weights(target, tmp_path / "model.safetensors")
        assert torch.equal(target(IMAGES), source(IMAGES)), prefix
        assert "decoder.decoder_norm.weight" in loaded.unused
        assert not [name for name in loaded.missing if name != "pos_embed"]


def test_timms_own_transformer_gives_the_same_features(tmp_path: Path) -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    randomized(theirs)
    torch.save({"teacher": under("backbone.", theirs.state_dict())}, tmp_path / "timm.pth")
    ours = vit().eval()
    loaded = load_weights(ours, tmp_path / "timm.pth")
    assert loaded.unused == ["teacher.backbone.head.weight", "teacher.backbone.head.bias"]
    torch.testing.assert_close(ours(IMAGES), theirs.forward_features(IMAGES)[:, 0])


def test_torchvisions_own_transformer_gives_the_same_features(tmp_path: Path) -> None:
    theirs = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64)
    randomized(theirs).heads = nn.Identity()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = vit().eval()
    assert load_weights(ours, tmp_path / "vit.pth").missing == []
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))


# What is refused -----------------------------------------------------------------------------------------------------


def test_less_than_nine_tenths_of_the_backbone_are_refused(tmp_path: Path) -> None:
    weights = randomized(resnet()).state_dict()
    counted = [name for name in weights if not name.endswith("num_batches_tracked")]
    for kept, fits in ((len(counted) * 9 // 10 + 1, True), (len(counted) * 9 // 10 - 1, False)):
        torch.save({name: weights[name] for name in counted[:kept]}, tmp_path / "some.pth")
        before = (target := resnet()).state_dict()["conv1.weight"].clone()
        if fits:
            assert len(load_weights(target, tmp_path / "some.pth").taken) == kept
            continue
        with pytest.raises(UserError, match=rf"holds only {kept} of the {len(counted)} tensors .* missing: ") as caught:
            load_weights(target, tmp_path / "some.pth")
        assert "\n" not in str(caught.value)
        assert torch.equal(target.conv1.weight, before)


def test_a_larger_network_of_the_same_names_is_refused(tmp_path: Path) -> None:
    torch.save({"model": VisionTransformer(16, 4, 16, 4, 2).state_dict()}, tmp_path / "deep.pth")
    with pytest.raises(UserError, match=r"more of such a network, a larger one: model\.blocks\.2"):
        load_weights(vit(), tmp_path / "deep.pth")


def test_other_sizes_under_the_same_names_are_named(tmp_path: Path) -> None:
    torch.save(ResNet(18, 8, "small").state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        UserError, match=r"0 of the 100 .*: conv1\.weight is \(8, 3, 3, 3\) there and \(4, 3, 3, 3\) here"
    ):
        load_weights(resnet(), tmp_path / "wide.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"holds no tensors, so nothing fits ResNet"):
        load_weights(resnet(), tmp_path / "none.pth")


def test_weights_alone_need_a_network(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "alone.pth")
    save_file(resnet().state_dict(), tmp_path / "alone.safetensors")
    for name in ("alone.pth", "alone.safetensors"):
        with pytest.raises(UserError, match=r"do not say their network: give --backbone, such as --backbone resnet50"):
            load_backbone(tmp_path / name)


class Code:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_code_in_a_foreign_file_is_not_run(tmp_path: Path, capsys) -> None:
    torch.save({"state_dict": resnet().state_dict(), "args": Code()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could execute code"):
        load_backbone(tmp_path / "bad.pth", resnet())
    assert "executed" not in capsys.readouterr().out


# Models by name ------------------------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    for name in ("timm:resnet18.a1_in1k", "torchvision:resnet18"):
        with pytest.raises(
            UserError, match=rf"{name}: its weights cannot be had \(no route to the hub\): .* give {name}\+FILE"
        ) as caught:
            load_backbone(name)
        assert "\n" not in str(caught.value)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UserError, match=r"timm has no model vit_smal_patch16_224; did you mean vit_small_patch16_224"):
        load_backbone("timm:vit_smal_patch16_224")
    with pytest.raises(UserError, match=r"torchvision has no model resnet5; did you mean resnet50"):
        load_backbone("torchvision:resnet5")
    with pytest.raises(
        UserError, match=r"torchvision:resnet50 has no weights V3: choose among IMAGENET1K_V1, IMAGENET1K_V2"
    ):
        load_backbone("torchvision:resnet50.V3")
    assert not is_named("runs/timm:x")


@pytest.mark.slow
def test_models_by_name_with_weights_from_a_file(tmp_path: Path) -> None:
    theirs = randomized(torchvision.models.resnet18())
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 40, 40)
    for library, name in (("torchvision", "resnet18"), ("timm", "resnet18")):
        module, facts = load_backbone(f"{library}:{name}+{tmp_path / 'w.pth'}")
        torch.testing.assert_close(module.eval()(x), theirs(x))
        assert facts["view"]["size"] == 224
    assert facts["view"]["interpolation"] == "bicubic"  # timm's resnet18
    target = SimCLR(ResNet(18))
    load_weights(target, f"timm:resnet18+{tmp_path / 'w.pth'}")
    torch.testing.assert_close(target.backbone.eval()(x), theirs(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "mobilenet_v3_small", "densenet121"])
def test_any_model_of_torchvision_is_a_backbone(name: str) -> None:
    model, facts, file = open_named(f"torchvision:{name}", pretrained=False)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, model.dim)
    assert file is None
    assert facts["view"]["resize"] >= facts["view"]["size"]


def test_evaluate_measures_foreign_weights_beside_random_ones(tmp_path: Path, capsys, monkeypatch) -> None:
    source = randomized(ConvNet(4))
    path = tmp_path / "moco.pth.tar"
    torch.save({"state_dict": under("module.encoder_q.", source.state_dict())}, path)
    words = [
        "evaluate",
        str(path),
        "--protocols",
        "knn",
        "--backbone",
        "ConvNet",
        "--backbone.width",
        "4",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match=r"moco\.pth\.tar: which images\? Give --data"):
        main()
    shapes = ["--data.shapes.size", "16", "--data.shapes.num_train", "40", "--data.shapes.num_test", "20"]
    monkeypatch.setattr("sys.argv", [*words, *shapes, "--progress", "false"])
    main()
    said = capsys.readouterr().out
    assert "from state_dict.module.encoder_q.*" in said
    for row in ("moco.pth", "pixels", "random weights", "chance"):
        assert f"\n{row}" in said
