from pathlib import Path

import pytest
import torch

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn import DiscreteEncoder, ResNet, VQTokenizer
from sslbook.nn.backbones import build, describe
from sslbook.nn.tokenizers import DiscreteDecoder, Tokenizer
from sslbook.weights.backbone import export_backbone
from sslbook.weights.tokenizers import open_tokenizer

VIEW = View(size=16, crop=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_discrete_encoder_has_one_code_per_patch(patch_size: int) -> None:
    encoder = DiscreteEncoder(patch_size, 5, 8, 1)
    x = torch.randn(2, 3, 16, 24)
    logits = encoder.logits(x)
    assert logits.shape == (2, 16 * 24 // patch_size**2, 5)
    assert torch.equal(encoder.tokens(x), logits.argmax(dim=2))
    assert encoder(x).shape == (2, 8)
    assert DiscreteDecoder(patch_size, 5, 8, 1)(logits.softmax(dim=2), 16 // patch_size).shape == x.shape


def test_tokenizer_is_frozen_and_renormalizes_images() -> None:
    encoder = DiscreteEncoder(4, 16, 8, 1)
    own = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    tokenizer = Tokenizer(encoder, VIEW, 4, own).train()
    assert not tokenizer.encoder.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    pixels = torch.rand(2, 3, 16, 16)
    seen = (pixels - 0.5) / 0.25
    wanted = (pixels - torch.tensor(own[0])[:, None, None]) / torch.tensor(own[1])[:, None, None]
    assert torch.equal(tokenizer(seen), encoder.tokens(wanted))
    half = Tokenizer(encoder, VIEW, 2, own)  # patches of 8 pixels: the image is made half as large
    assert half(seen).shape == (2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(seen), encoder.tokens(wanted))


def test_open_tokenizer_from_run_file_or_module(tmp_path: Path) -> None:
    encoder = DiscreteEncoder(4, 16, 8, 1)
    description = {"view": {"size": 20, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    export_backbone(tmp_path / "backbone.safetensors", encoder, description)
    images = torch.randn(2, 3, 16, 16)
    expected = Tokenizer(encoder, VIEW, 4, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))(images)
    for name in (tmp_path, str(tmp_path / "backbone.safetensors")):
        assert torch.equal(open_tokenizer(name, DiscreteEncoder, "dvae", VIEW, 4)(images), expected)
    of_module = open_tokenizer(encoder, DiscreteEncoder, "dvae", VIEW, 4)(images)
    assert torch.equal(of_module, encoder.tokens(images))
    assert not torch.equal(of_module, expected)


def test_descriptions_of_earlier_exports_are_built() -> None:
    init_args = {"patch_size": 4, "num_codes": 16, "dim": 8, "depth": 1}
    for path in ("sslbook.nn.tokenizers.DiscreteEncoder", describe(DiscreteEncoder(4))["class_path"]):
        assert build({"class_path": path, "init_args": init_args}).num_codes == 16


def test_open_tokenizer_rejects_what_is_none(tmp_path: Path) -> None:
    export_backbone(tmp_path / "other.safetensors", ResNet(18, 4), {})
    for tokenizer in (tmp_path / "other.safetensors", ResNet(18, 4)):
        with pytest.raises(
            UserError, match=r"a ResNet cannot be .* a DiscreteEncoder is needed: train one with .* dvae"
        ):
            open_tokenizer(tokenizer, DiscreteEncoder, "dvae", VIEW, 4)
    with pytest.raises(UserError, match=r"no such run folder or file; train one with .* dvae"):
        open_tokenizer(tmp_path / "nothing", DiscreteEncoder, "dvae", VIEW, 4)
    with pytest.raises(UserError, match=r"there is no tokenizer: train one .* set --method\.tokenizer"):
        open_tokenizer(None, DiscreteEncoder, "dvae", VIEW, 4)


def test_nearest_code_against_loops() -> None:
    tokenizer = VQTokenizer(16, 4, 16, 1, 2, num_codes=7, code_dim=3).eval()
    x = torch.randn(2, 3, 16, 16)
    latents, tokens = tokenizer.latents(x), tokenizer.tokens(x)
    assert latents.shape == (2, 16, 3)
    for latent, token in zip(latents.flatten(0, 1), tokens.flatten().tolist()):
        distances = [float((latent - code).norm().detach()) for code in tokenizer.codebook]
        assert distances[token] == pytest.approx(min(distances))
    assert tokenizer(x).shape == (2, 16)
    assert torch.equal(Tokenizer(tokenizer, VIEW, 4)(x), tokens)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="not made by halving: use patch_size 16"):
        DiscreteEncoder(patch_size=14)
    with pytest.raises(UserError, match=r"num_codes 1 leaves nothing to predict"):
        DiscreteEncoder(num_codes=1)
    with pytest.raises(UserError, match=r"num_codes 1 leaves nothing to predict"):
        VQTokenizer(num_codes=1)
