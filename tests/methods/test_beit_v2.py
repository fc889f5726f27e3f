import json
import math
from pathlib import Path

import pytest
import torch

from sslbook import checkpoint
from sslbook.data.masks import block_mask
from sslbook.errors import UserError
from sslbook.methods import beit_v2
from sslbook.nn import DiscreteEncoder, ResNet, VisionTransformer, VQTokenizer
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

SMALL = {"image_size": SIZE, "patch_size": 4, "dim": 16, "depth": 1, "heads": 2, "codes": 8, "code_dim": 4}


def seeded_tokenizer() -> VQTokenizer:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQTokenizer(**SMALL)


CASE = Case(
    options={"view": VIEW, "tokenizer": seeded_tokenizer(), "num_masked": 6, "min_block": 2, "early_layer": 1},
    command={
        "method.backbone": TRANSFORMER,
        "method.tokenizer": json.dumps(
            {"class_path": "sslbook.nn.VQTokenizer", "init_args": {**SMALL, "image_size": 24}}
        ),
        "method.early_layer": 1,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=transformer,
    full_scale="vit_base",
    full_options=lambda: {"tokenizer": VQTokenizer()},
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"aggregation_depth": 0})],
    other_backbones=[lambda: VisionTransformer(SIZE, 4, 16, 2, 2, positions="relative", layer_scale=0.1)],
)


@pytest.mark.parametrize("n", [3, 1])
def test_the_loss_is_the_papers(n: int) -> None:
    method = make("beit_v2")
    batch, clock = make_batch(method, n), Clock(seed=3)
    (images,) = batch.views
    hidden = block_mask(batch.index, (4, 4), 6, clock, 2, exact=True)
    codes = method.tokenizer(images)
    early, last = method.backbone.layers(method.backbone.embed(images, hidden, method.mask_token))
    x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in method.aggregation.blocks:
        x = block(x)
    total = 0.0
    for output in (last, x):
        losses = []
        for i in range(n):
            for j in range(16):
                if hidden[i, j]:
                    scores = method.head(method.backbone.norm(output[i, 1 + j])).double().tolist()
                    losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[int(codes[i, j])])
        assert len(losses) == 6 * n
        total += sum(losses) / len(losses)
    assert float(method(batch, clock)["loss"].detach()) == pytest.approx(total, rel=1e-4)


def test_the_class_token_has_to_tell(monkeypatch) -> None:
    """What the last blocks learn from the aggregation passes through the class token; without it they learn nothing."""

    def gradient_of_last_block() -> float:
        method = make("beit_v2")
        batch = make_batch(method, 4)
        hidden = block_mask(batch.index, (4, 4), 6, Clock(), 2, exact=True)
        _, scores = method.predict(batch.views[0], hidden)
        scores.logsumexp(dim=1).sum().backward()
        weight = method.backbone.blocks[-1].mlp.fc2.weight
        return 0.0 if weight.grad is None else float(weight.grad.norm())

    assert gradient_of_last_block() > 0
    real = beit_v2.Aggregation.forward
    monkeypatch.setattr(beit_v2.Aggregation, "forward", lambda self, early, last, bias: real(self, early, early, bias))
    assert gradient_of_last_block() == 0


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    tokenizer = seeded_tokenizer()
    facts = {"view": {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}}
    checkpoint.export_backbone(tmp_path / "backbone.safetensors", tokenizer, facts)
    method = make("beit_v2", tokenizer=str(tmp_path))
    images = torch.randn(2, 3, SIZE, SIZE)
    pixels = images * torch.tensor(VIEW.std)[:, None, None] + torch.tensor(VIEW.mean)[:, None, None]
    assert torch.equal(method.tokenizer(images), tokenizer.tokens((pixels - 0.5) / 0.25))
    checkpoint.export_backbone(tmp_path / "other.safetensors", DiscreteEncoder(4, 8, 8, 1), facts)
    with pytest.raises(UserError, match=r"makes no codes.*: train one with python -m sslbook.train vqkd"):
        make("beit_v2", tokenizer=str(tmp_path / "other.safetensors"))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"BEiT v2 .* cannot use a ResNet: choose .*VisionTransformer"):
        make("beit_v2", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match=r"there is no tokenizer: set --method\.tokenizer"):
        make("beit_v2", tokenizer=None)
    with pytest.raises(UserError, match="a DiscreteEncoder has no codebook"):
        make("beit_v2", tokenizer=DiscreteEncoder(4, 8, 8, 1))
    with pytest.raises(UserError, match=r"no such run; train it first with python -m sslbook.train vqkd"):
        make("beit_v2", tokenizer="runs/nothing")
    with pytest.raises(UserError, match="codes for 2x2 patches and the backbone sees 4x4: use patch_size 8"):
        make("beit_v2", tokenizer=VQTokenizer(**{**SMALL, "patch_size": 8}))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("beit_v2", num_masked=0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("beit_v2", num_masked=16)
    with pytest.raises(UserError, match="does not lie before the last of 2 blocks: use 1"):
        make("beit_v2", early_layer=2)
