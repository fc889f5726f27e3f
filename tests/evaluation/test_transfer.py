"""The trainer of transfer: frozen statistics, heads at once, choices, resumption, processes, and what is refused."""

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import heads, transfer
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.base import Representation
from sslbook.evaluation.classifier import Task, Training, Transfer, freeze, set_drop_path
from sslbook.evaluation.feature_data import FeatureData, FeatureSource
from sslbook.evaluation.protocols import linear as exact
from sslbook.evaluation.protocols.attentive import AttentiveProbe
from sslbook.evaluation.protocols.finetune import FineTune
from sslbook.evaluation.protocols.linear_sgd import LinearSGD
from sslbook.evaluation.protocols.linear_stages import LinearStages
from sslbook.evaluation.protocols.semi_supervised import SemiSupervised
from sslbook.nn import ConvNet, ResNet, VisionTransformer
from sslbook.schedules import Clock, Constant

SHORT = Training(epochs=2, batch_size=8)
CLASSES = ("a", "b", "c", "d", "e", "f")


def images(n: int, seed: int, size: int = 8, noise: float = 60.0, classes: int = 6) -> tuple[Tensor, Tensor]:
    """A color and a gradient for every class, under noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centers = torch.randint(40, 216, (classes, 3, 2, 2), generator=torch.Generator().manual_seed(7)).float()
    x = F.interpolate(centers, (size, size), mode="bilinear")[y]
    return (x + noise * torch.randn(x.shape, generator=g)).clamp(0, 255).to(torch.uint8), y


def make_data(train: int = 48, test: int = 24, **options) -> Data:
    return Data.from_images(*images(train, 1, **options), *images(test, 2, **options), CLASSES, "colors")


def make_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(8, 4, 16, 2, 2)


def make_convnet() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(4)


def make_resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(18, 4, stem="small")


def model_of(backbone: nn.Module, data: Data, folder: Path | None = None, size: int = 8) -> Representation:
    return Representation(backbone, data, View.center(size), folder=folder, progress=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Transfer]:
    """The methods that are trained in a test, in order."""
    methods: list[Transfer] = []
    count = transfer.count

    def noting(method: Transfer, *arguments) -> Tensor:
        methods.append(method)
        return count(method, *arguments)

    monkeypatch.setattr(transfer, "count", noting)
    return methods


# -- what stands still -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["all", "none", 2, "layer2"])
def test_frozen_layers_keep_weights_and_statistics(where: int | str, trained: list[Transfer]) -> None:
    data, backbone = make_data(), make_resnet()
    before = copy.deepcopy(backbone.state_dict())
    protocol = FineTune(frozen=where, training=SHORT)
    protocol.run(model_of(backbone, data), data)
    after = trained[-1].backbone.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    top = {"layer3", "layer4"}
    assert moved == {"all": set(), "none": {"conv1", "bn1", "layer1", "layer2"} | top}.get(str(where), top)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())  # the one in question
    assert backbone.training
    assert backbone.conv1.weight.requires_grad


def test_statistics_would_move_in_training_mode(trained: list[Transfer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that the test before looks for: a probe in training mode."""
    monkeypatch.setattr(Transfer, "train", nn.Module.train)
    data, backbone = make_data(), make_resnet()
    FineTune(frozen="all", training=SHORT).run(model_of(backbone, data), data)
    assert not torch.equal(trained[-1].backbone.bn1.running_mean, backbone.bn1.running_mean)


def test_layers_to_freeze_are_named_or_counted() -> None:
    def kept(backbone: nn.Module, upto: int | str) -> set[str]:
        freeze(backbone, upto)
        return {name for name, p in backbone.named_parameters() if not p.requires_grad}

    vit = make_vit()
    assert all(name.startswith(("cls", "pos", "patch")) for name in kept(vit, 0))
    assert kept(vit, 1) - kept(vit, 0) == {name for name, _ in vit.named_parameters() if name.startswith("blocks.0.")}
    assert kept(vit, "blocks.0") == kept(vit, 1)
    net = ConvNet(4)
    assert kept(net, "layers.1") == {"layers.0.weight", "layers.1.weight", "layers.1.bias"}
    with pytest.raises(UserError, match="no module layer9"):
        freeze(make_resnet(), "layer9")
    with pytest.raises(UserError, match="4 layers after its stem, not 5"):
        freeze(make_resnet(), 5)


# -- all heads at once -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_a_head_of_a_grid_is_the_head_alone(optimizer: str, trained: list[Transfer]) -> None:
    data, training = make_data(), replace(SHORT, optimizer=optimizer, clip_grad_norm=0.5)
    settings = transfer.grid((3.0, 30.0) if optimizer == "lars" else (0.03, 0.3), (0.0, 0.01))

    def run(own: list[transfer.Setting]) -> nn.ModuleList:
        task = Task("t", {}, lambda s, c: heads.linear(s[-1], c), training, Augmentation(), batch_norm=True)
        fit = {"task": task, "backbone": make_convnet(), "dims": [torch.Size([16])], "example": torch.zeros(2, 3, 8, 8)}
        model = model_of(make_convnet(), data)
        transfer._fit(model, data, [(s, 0) for s in own], **fit, device=torch.device("cpu"), weights="")
        return trained[-1].heads.each

    together = run(settings)
    for setting, head in zip(settings, together):
        (alone,) = run([setting])
        for name, value in head.state_dict().items():
            assert torch.allclose(value, alone.state_dict()[name], rtol=1e-4, atol=1e-6), (setting, name)
    weights = [head.weight for head in together]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.slow
def test_attentive_probes_of_a_grid_are_those_alone(trained: list[Transfer]) -> None:
    data, vit = make_data(), make_vit()
    options = {"num_heads": 2, "num_blocks": 2, "training": replace(SHORT, optimizer="adamw", clip_grad_norm=0.1)}
    AttentiveProbe((1e-3, 1e-2), (0.0, 0.3), **options).run(model_of(vit, data), data)
    grid = trained[0]
    chosen = trained[1]
    assert len(grid.heads.each) == 4
    assert len(chosen.heads.each) == 1
    subset = transfer.stratified(data.labels("train"), 0.1)
    kept = data.split((~subset).nonzero()[:, 0])
    kept._splits.test = None  # nothing to test on
    for i, (lr, decay) in enumerate([(1e-3, 0.0), (1e-3, 0.3), (1e-2, 0.0), (1e-2, 0.3)]):
        alone = Data.from_images(kept._splits.train.images, kept.labels("train"), *images(24, 2), CLASSES, "colors")
        AttentiveProbe((lr,), (decay,), **options).run(model_of(vit, alone), alone)
        for name, value in trained[-1].heads.each[0].state_dict().items():
            assert torch.allclose(value, grid.heads.each[i].state_dict()[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
def test_a_learning_rate_that_diverges_harms_no_other(trained: list[Transfer]) -> None:
    data, vit = make_data(), make_vit()
    options = {"weight_decays": (0.0,), "num_heads": 2, "training": replace(SHORT, optimizer="sgd")}
    model = model_of(vit, data)
    AttentiveProbe((0.1, 1e30), **options).run(model, data)
    tried = model.details["attentive"]["validation"]
    assert model.details["attentive"]["chosen"]["lr"] == 0.1
    assert all(p.isfinite().all() for p in trained[0].parameters())
    AttentiveProbe((0.1, 0.2), **options).run(model, data)
    assert model.details["attentive"]["validation"][0] == tried[0]


@pytest.mark.slow
def test_the_probe_by_sgd_is_as_accurate_as_scikit_learn() -> None:
    data = make_data(600, 1200, noise=230.0)
    pixels = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    model = model_of(pixels, data)
    optimum = exact.probe(*model.labeled()).accuracy
    training = Training(epochs=40, batch_size=100)
    probe = LinearSGD((0.003, 0.03, 0.3), (0.0, 0.01, 0.1), training, cached=True, batch_norm=True, validation=0.2)
    found = probe.run(model, data)["linear SGD"]
    assert 40 < optimum < 95
    assert found == pytest.approx(optimum, abs=2.5)  # twice the standard error of 1,200 images


def test_sgd_reaches_the_minimum_of_logistic_regression(trained: list[Transfer]) -> None:
    """With the same weight decay on the same features the probabilities are scikit-learn's; after two epochs they are not."""
    data = make_data(240, 120, noise=230.0)
    model = model_of(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), data)
    train_x, train_y, test_x, _ = model.labeled()
    minimum = LogisticRegression(C=1 / (0.1 * 240), tol=1e-8, max_iter=1000).fit(train_x.numpy(), train_y.numpy())
    wanted = torch.from_numpy(minimum.predict_proba(test_x.numpy())).float()
    far = []
    for epochs in (2, 50):
        LinearSGD((0.1,), (0.1,), Training(epochs=epochs, batch_size=40), cached=True).run(model, data)
        head = trained[-1].heads.each[0]
        far.append((F.linear(test_x, head.weight, head.bias).softmax(1) - wanted).abs().max().item())
    assert far[0] > 0.05
    assert far[1] < 0.005


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_the_choice_does_not_see_the_test_images() -> None:
    other = Data.from_images(*images(48, 1), images(24, 2)[0], (images(24, 2)[1] + 1) % 6, CLASSES, "colors")
    probe, found = LinearSGD((0.001, 0.01, 0.1), training=SHORT, cached=True, batch_norm=True), []
    for one in (make_data(), other):
        model = model_of(nn.Flatten(), one)
        found.append((probe.run(model, one)["linear SGD"], model.details["linear_sgd"]))
    assert found[0][1]["validation"] == found[1][1]["validation"]
    assert found[0][1]["chosen"] == found[1][1]["chosen"]
    assert found[0][1]["chosen on"] == "validation part of the training images"
    assert found[0][0] != found[1][0]


def test_one_setting_trains_on_all_images(trained: list[Transfer], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    forward = Transfer.forward

    def noting(self: Transfer, batch: Batch, clock: Clock) -> dict:
        seen.update(batch.index.tolist())
        return forward(self, batch, clock)

    monkeypatch.setattr(Transfer, "forward", noting)
    data = make_data()
    model = model_of(ConvNet(4), data)
    metrics = LinearSGD((0.1,), training=SHORT).run(model, data)
    assert len(trained) == 1
    assert seen == set(range(48))
    assert set(metrics) == {"linear SGD", "linear SGD top-5"}
    assert metrics["linear SGD top-5"] >= metrics["linear SGD"]
    assert model.details["linear_sgd"]["chosen on"] == "none: one setting"
    assert set(model.details["linear_sgd"]["per class"]) == set(CLASSES)


def test_what_is_chosen_is_trained_again_on_all_images(trained: list[Transfer]) -> None:
    data, backbone = make_data(), ConvNet(4)
    LinearSGD((0.1, 0.2), training=SHORT, cached=True).run(model_of(backbone, data), data)
    chosen = trained[-1]
    for lr in (0.1, 0.2):
        LinearSGD((lr,), training=SHORT, cached=True).run(model_of(backbone, data), data)
    assert any(torch.equal(chosen.heads.each[0].weight, one.heads.each[0].weight) for one in trained[-2:])


def test_accuracy_counts_what_is_right() -> None:
    data = make_data(48, 24)
    task = Task("t", {}, lambda s, c: heads.linear(s[-1], c), SHORT)
    head = heads.Heads([nn.Linear(6, 6)], [0], False, [6])
    with torch.no_grad():
        head.each[0].weight.copy_(torch.eye(6))
        head.each[0].bias.zero_()
    method = Transfer(nn.Identity(), head, task, View.center(8), 6, torch.zeros(2, 6))
    logits = torch.randn(24, 6)
    source = FeatureSource(logits, data.labels("test"))
    made = FeatureData(source, source, data)
    top1, top5, total = transfer.count(method, made, View.center(8), 7, torch.device("cpu"))[0]
    y = data.labels("test")
    assert top1.sum() == (logits.argmax(1) == y).sum()
    assert top5.sum() == (logits.topk(5).indices == y[:, None]).any(1).sum()
    assert total.tolist() == [4.0] * 6


# -- options of fine-tuning --------------------------------------------------------------------------------------------


def test_averaged_weights_are_evaluated(trained: list[Transfer]) -> None:
    data = make_data()
    FineTune(ema=0.5, training=replace(SHORT, schedule=Constant())).run(model_of(make_resnet(), data), data)
    method = trained[-1]
    backbone, own_heads = (average.module for average in method.averages)
    assert not torch.equal(backbone.conv1.weight, method.backbone.conv1.weight)
    assert torch.equal(backbone.bn1.running_var, method.backbone.bn1.running_var)
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(method.predict(x)[0], own_heads.each[0](backbone(x)).softmax(-1), atol=1e-6)


def test_ema_follows_its_recursion() -> None:
    task = Task("t", {}, lambda s, c: heads.linear(s[-1], c), SHORT, Augmentation(), frozen="none", ema=0.9)
    net = ConvNet(4)
    method = Transfer(
        net, heads.Heads([nn.Linear(16, 6)], [0], False, [16]), task, View.center(8), 6, torch.zeros(2, 3, 8, 8)
    )
    expected = net.layers[0].weight.detach().double().clone()
    for _ in range(3):
        with torch.no_grad():
            net.layers[0].weight.add_(torch.randn(4, 3, 4, 4))
        method.after_step(Clock())
        expected = 0.9 * expected + 0.1 * net.layers[0].weight.detach().double()
    assert torch.allclose(method.averages[0].module.layers[0].weight.double(), expected, atol=1e-5)


def test_flipped_images_are_averaged() -> None:
    task = Task("t", {}, lambda s, c: heads.linear(s[-1], c), SHORT, Augmentation(), flip_test=True)
    net = nn.Flatten()
    head = heads.Heads([nn.Linear(48, 6)], [0], False, [48])
    method = Transfer(net, head, task, View.center(4), 6, torch.zeros(2, 3, 4, 4)).eval()
    x = torch.randn(5, 3, 4, 4)
    one, other = (head.each[0](images.flatten(1)).softmax(-1) for images in (x, x.flip(3)))
    assert torch.allclose(method.predict(x)[0], (one + other) / 2, atol=1e-6)


def test_drop_path_of_our_blocks_and_timm_s() -> None:
    vit = VisionTransformer(8, 4, 16, 5, 2)
    set_drop_path(vit, 0.2)
    assert [block.drop_path for block in vit.blocks] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0)
    set_drop_path(net, 0.2)
    assert [block.drop_path2.drop_prob for block in net.blocks] == pytest.approx([0.0, 0.1, 0.2])
    with pytest.raises(UserError, match="drop_path: the blocks of ConvNet"):
        set_drop_path(ConvNet(4), 0.1)


def test_mean_of_patches_before_the_norm(trained: list[Transfer]) -> None:
    """MAE's global pooling: the backbone's own norm is left out, and frozen, since nothing reaches it."""
    data, vit = make_data(), make_vit()
    with torch.no_grad():
        vit.norm.weight.normal_()
    FineTune(pool="mean", training=SHORT, drop_path=0.1, layer_decay=0.5).run(model_of(vit, data), data)
    method = trained[-1]
    assert torch.equal(method.backbone.norm.weight, vit.norm.weight)
    assert method.backbone.blocks[1].drop_path == 0.1
    x = torch.randn(4, 3, 8, 8)
    *_, last = vit.layers(vit.embed(x))
    assert torch.allclose(method.task.reading(vit, x)[0], last[:, 1:].mean(1), atol=1e-6)
    assert isinstance(method.heads.each[0][0], nn.LayerNorm)


def test_learning_rates_by_layer_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments, **options) -> None:
        for group in self.param_groups:
            seen.update({id(p): group["lr"] for p in group["params"]})
        return step(self, *arguments, **options)

    methods = []
    init = Transfer.__init__
    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    monkeypatch.setattr(Transfer, "__init__", lambda self, *a: (methods.append(self), init(self, *a))[1])
    data = make_data()
    training = replace(SHORT, optimizer="adamw", schedule=Constant(), base_batch_size=16)
    FineTune((0.01,), head_lr_scales=(10.0,), layer_decay=0.5, training=training).run(model_of(make_vit(), data), data)
    rates = {name: seen[id(p)] for name, p in methods[0].named_parameters() if id(p) in seen}
    base = 0.01 * 8 / 16
    assert rates["heads.each.0.weight"] == pytest.approx(10 * base)
    assert rates["heads.each.0.bias"] == pytest.approx(10 * base)
    assert rates["backbone.norm.weight"] == pytest.approx(base)
    assert rates["backbone.blocks.1.mlp.fc1.weight"] == pytest.approx(base / 2)
    assert rates["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(base / 4)
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(base / 8)


# -- what is read ------------------------------------------------------------------------------------------------------


def test_stages_are_pooled_as_in_openselfsup() -> None:
    with torch.device("meta"):
        backbone = ResNet(50)
        parts = heads.stages(backbone, torch.zeros(2, 3, 224, 224))
    assert [part.shape[1] for part in parts] == [9216, 9216, 8192, 9216, 8192]


def test_stem_and_stages_are_the_network_s_own() -> None:
    backbone, x = make_resnet().eval(), torch.randn(2, 3, 8, 8)
    stem, *rest = heads.stages(backbone, x)
    maps = [torch.relu(backbone.bn1(backbone.conv1(x))), *backbone.forward_stages(x)]
    for part, own in zip([stem, *rest], maps):
        side = round((part.shape[1] / own.shape[1]) ** 0.5)
        assert torch.allclose(part, F.adaptive_avg_pool2d(own, side).flatten(1), atol=1e-6)


def test_blocks_are_read_as_dino_does() -> None:
    vit, x = make_vit(), torch.randn(3, 3, 8, 8)
    first, last = (vit.norm(t) for t in vit.layers(vit.embed(x)))
    expected = torch.cat([first[:, 0], last[:, 0], last[:, 1:].mean(1)], 1)
    assert torch.allclose(heads.blocks(vit, x, 2, "cls+mean")[0], expected, atol=1e-6)
    assert torch.allclose(heads.blocks(vit, x, 1, "cls")[0], vit(x), atol=1e-6)
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0).eval()
    net.forward_tokens = net.forward_features
    own = net.get_intermediate_layers(torch.zeros(1, 3, 32, 32), n=2, return_prefix_tokens=True, norm=True)
    expected = torch.cat([prefix[:, 0] for _, prefix in own], 1)
    assert torch.allclose(heads.blocks(net, torch.zeros(1, 3, 32, 32), 2, "cls")[0], expected, atol=1e-5)


def test_the_attentive_probe_attends() -> None:
    torch.manual_seed(0)
    probe = heads.Attentive(8, 3, num_heads=2, num_blocks=1)
    pool, x = probe.pool.double(), torch.randn(2, 5, 8).double()
    query, normed = pool.q(pool.query)[0, 0], pool.norm1(x)
    k, v = pool.kv(normed)[..., :8], pool.kv(normed)[..., 8:]
    out = []
    for head in (slice(0, 4), slice(4, 8)):
        weight = torch.softmax((k[..., head] @ query[head]) / 2.0, dim=1)
        out.append((weight[:, :, None] * v[..., head]).sum(1))
    y = pool.query[0, 0] + pool.proj(torch.cat(out, 1))
    assert torch.allclose(pool(x), y + pool.mlp(pool.norm2(y)[:, None])[:, 0], atol=1e-9)


def test_capi_s_probe_is_a_query_with_keys_and_values() -> None:
    torch.manual_seed(0)
    pool, x = heads.Attentive(8, 3, num_heads=2, num_blocks=0).pool.double(), torch.randn(2, 5, 8).double()
    k, v = pool.kv(x).split(8, dim=2)
    out = [
        (torch.softmax(k[..., head] @ pool.query[head] / 2.0, dim=1)[:, :, None] * v[..., head]).sum(1)
        for head in (slice(0, 4), slice(4, 8))
    ]
    assert torch.allclose(pool(x), torch.cat(out, 1), atol=1e-9)


def test_every_stage_has_a_row() -> None:
    data = make_data()
    model = model_of(make_resnet(), data)
    metrics = LinearStages((0.01, 0.1), training=replace(SHORT, optimizer="nesterov")).run(model, data)
    assert [name for name in metrics if "top" not in name] == [f"stage {i}" for i in range(5)]
    assert all(len(one["validation"]) == 2 for one in model.details["linear_stages"].values())


# -- features extracted once -------------------------------------------------------------------------------------------


def test_features_extracted_once_are_those_of_the_evaluation_view(trained: list[Transfer]) -> None:
    """Without any randomness in the view, both ways train the same head."""
    data, backbone = make_data(), make_resnet()
    still = Augmentation(crop=None, flip=0.0)
    LinearSGD((0.1,), training=SHORT, augmentation=still).run(model_of(backbone, data), data)
    LinearSGD((0.1,), training=SHORT, cached=True).run(model_of(backbone, data), data)
    one, other = (method.heads.each[0].weight for method in trained)
    assert torch.allclose(one, other, atol=1e-5)


def test_tokens_extracted_once_have_their_shape(trained: list[Transfer]) -> None:
    data = make_data()
    AttentiveProbe((1e-3,), num_heads=2, training=SHORT, cached=True).run(model_of(make_vit(), data), data)
    assert trained[-1].task.reading(nn.Identity(), torch.zeros(2, 80))[0].shape == (2, 5, 16)


def test_images_of_five_channels(trained: list[Transfer]) -> None:
    x, y = images(48, 1)
    five = torch.cat([x, x[:, :2]], 1)
    data = Data.from_images(five, y, five[:24], y[:24], CLASSES, "n", mean=[0.5] * 5, std=[0.25] * 5)
    for cached in (True, False):
        probe = LinearSGD((0.1,), training=SHORT, cached=cached, batch_norm=True)
        assert probe.run(model_of(nn.Flatten(), data), data)["linear SGD"] > 30
    probe = LinearSGD((0.1,), training=SHORT, augmentation=Augmentation(rand_augment=9.0))
    with pytest.raises(UserError, match="RandAugment are for 3 channels"):
        probe.run(model_of(nn.Flatten(), data), data)


# -- going on, and processes -------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_at(step: int) -> Callable:
    forward = Transfer.forward

    def killing(self: Transfer, batch: Batch, clock: Clock) -> dict:
        if clock.step == step:
            raise Killed
        return forward(self, batch, clock)

    return killing


@pytest.mark.parametrize("step", [3, 8])
@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(step: int, tmp_path: Path, trained: list[Transfer]) -> None:
    data = make_data()
    what = Augmentation(rand_augment=9.0, mixup=0.8, erasing=0.5)
    protocol = FineTune(training=replace(SHORT, optimizer="adamw"), augmentation=what, ema=0.9)
    protocol.run(model_of(make_convnet(), data), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfer, "forward", killed_at(step))
        with pytest.raises(Killed):
            protocol.run(model_of(make_convnet(), data, tmp_path), data)
    steps = []
    forward = Transfer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Transfer, "forward", lambda self, b, clock: (steps.append(clock.step), forward(self, b, clock))[1]
        )
        protocol.run(model_of(make_convnet(), data, tmp_path), data)
        assert 0 < len(steps) < 12
        steps.clear()
        protocol.run(model_of(make_convnet(), data, tmp_path), data)  # is finished
        assert steps == []
        FineTune((2e-3,), training=protocol.training, augmentation=what, ema=0.9).run(
            model_of(make_convnet(), data, tmp_path), data
        )
        assert len(steps) == 12  # other options, another run
        steps.clear()
        with torch.no_grad():
            (other := make_convnet()).layers[0].weight.add_(0.1)
        protocol.run(model_of(other, data, tmp_path), data)
        assert len(steps) == 12  # other weights, another run
    whole, resumed = trained[0].state_dict(), trained[1].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no such signals")
def test_a_run_that_is_stopped_is_not_measured(tmp_path: Path, trained: list[Transfer]) -> None:
    data, protocol = make_data(), LinearSGD((0.1,), training=SHORT)
    forward = Transfer.forward

    def stopping(self: Transfer, batch: Batch, clock: Clock) -> dict:
        if clock.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfer, "forward", stopping)
        with pytest.raises(UserError, match=r"linear_sgd was stopped at step 4 of 12: give --keep FOLDER"):
            protocol.run(model_of(make_convnet(), data), data)
        with pytest.raises(UserError, match=r"the same command goes on"):
            protocol.run(model_of(make_convnet(), data, tmp_path), data)
    assert trained == []
    protocol.run(model_of(make_convnet(), data, tmp_path), data)
    assert len(trained) == 1


def run_both() -> dict[str, object]:
    """A linear head with batch norm, a grid of heads, and a fine-tuning with everything that is random by key."""
    data, found = make_data(), {}
    what = Augmentation(crop=(0.5, 1.0), rand_augment=9.0, erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    kept: list[Transfer] = []
    count = transfer.count
    transfer.count = lambda method, *a: (kept.append(method), count(method, *a))[1]
    try:
        found["linear"] = LinearSGD((0.3,), training=SHORT, batch_norm=True).run(model_of(make_convnet(), data), data)
        found["cached"] = LinearSGD((0.03, 0.3), training=SHORT, cached=True).run(model_of(make_convnet(), data), data)
        tuned = FineTune(training=SHORT, augmentation=what, ema=0.5)
        found["tuned"] = tuned.run(model_of(make_convnet(), data), data)
    finally:
        transfer.count = count
    found["weights"] = [method.state_dict() for method in kept]
    return found


@pytest.mark.slow
def test_two_processes_equal_one(pool) -> None:
    one = run_both()
    for two in pool.run(run_both):
        assert {name: two[name] for name in ("linear", "cached", "tuned")} == {
            name: one[name] for name in ("linear", "cached", "tuned")
        }
        for mine, theirs in zip(one["weights"], two["weights"], strict=True):
            for name, value in mine.items():
                assert torch.allclose(value.float(), theirs[name].float(), atol=2e-4, rtol=1e-3), name


@pytest.mark.slow
def test_half_precision_and_accumulation() -> None:
    data = make_data()
    training = replace(SHORT, precision="bf16", grad_accum_steps=2)
    assert LinearSGD((0.1, 1.0), training=training).run(model_of(make_convnet(), data), data)["linear SGD"] >= 0


# -- semi-supervised ---------------------------------------------------------------------------------------------------


def test_a_fraction_of_every_class_keyed_by_the_seed() -> None:
    data = make_data(60)
    protocol = SemiSupervised(0.2)
    chosen = protocol.positions(data, 0)
    assert data.labels("train")[chosen].bincount().tolist() == [2] * 6
    assert torch.equal(chosen, protocol.positions(data, 0))
    assert not torch.equal(chosen, protocol.positions(data, 1))
    assert len(SemiSupervised(0.01).positions(data, 0)) == 6  # one of each at least
    assert len(SemiSupervised(1.0).positions(data, 0)) == 60


@pytest.mark.slow
def test_few_labels_choose_among_learning_rates(trained: list[Transfer]) -> None:
    data = make_data(60)
    model = model_of(make_convnet(), data)
    metrics = SemiSupervised(0.5, lrs=(0.1, 0.01), head_lr_scales=(1.0, 10.0), training=SHORT).run(model, data)
    assert len(trained) == 5  # each of the grid, and the chosen one again
    assert set(metrics) == {"50 % labels", "50 % labels top-5"}
    assert model.details["semi_supervised"]["training images"] == 30
    assert len(model.details["semi_supervised"]["validation"]) == 4


def test_a_list_names_the_images(tmp_path: Path) -> None:
    from PIL import Image

    for split, n in (("train", 12), ("test", 6)):
        x, y = images(n, 3)
        for i in range(n):
            folder = tmp_path / "photos" / split / CLASSES[y[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(folder / f"{split}_{i}.png")
    data = Data(folder=tmp_path / "photos", workers=0)
    (tmp_path / "list.txt").write_text("train_3.png\nf/train_11.png\ntrain_3.png\n")
    chosen = SemiSupervised(names=tmp_path / "list.txt").positions(data, 0)
    assert {data.file_names()[i] for i in chosen.tolist()} == {"train_3.png", "train_11.png"}
    assert len(chosen) == 2
    (tmp_path / "list.txt").write_text("train_3.png\n" + "".join(f"absent_{i}.png\n" for i in range(5)))
    with pytest.raises(UserError, match=r"names 5 images that photos lacks: absent_0.png, absent_1.png, absent_2.png$"):
        SemiSupervised(names=tmp_path / "list.txt").positions(data, 0)
    with pytest.raises(UserError, match="cannot be read"):
        SemiSupervised(names=tmp_path / "none.txt").positions(data, 0)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty.txt names no labeled image of photos"):
        SemiSupervised(names=tmp_path / "empty.txt").positions(data, 0)
    with pytest.raises(UserError, match="no files"):
        SemiSupervised(names=tmp_path / "list.txt").positions(make_data(), 0)


# -- bad input ---------------------------------------------------------------------------------------------------------


def refuse(match: str, data: Data, protocol=None, backbone: nn.Module | None = None) -> None:
    protocol = protocol or LinearSGD((0.1,), training=SHORT)
    with pytest.raises(UserError, match=match):
        protocol.run(model_of(backbone or ConvNet(4), data), data)


def test_labels_that_do_not_suit_are_refused() -> None:
    x, y = images(48, 1)
    test = images(24, 2)
    refuse("has a label 6 and 6 classes", Data.from_images(x, torch.where(y == 5, 6, y), *test, CLASSES, "n"))
    few = Data.from_images(x[:4], y[:4], *test, CLASSES, "n")
    refuse("4 training images of 6 classes", few)
    gap = Data.from_images(x, torch.where(y == 4, 0, y), *test, CLASSES, "n")
    refuse("test images of classes without any training image: e;", gap)
    refuse("a batch of 500 of 48 training images", make_data(), LinearSGD((0.1,), training=Training(1, 500)))
    single = Data.from_images(x[:6], y[:6], *test, CLASSES, "n")
    refuse("no class has two training images", single, LinearSGD((0.1, 1.0), training=Training(1, 4)))


def test_unlabeled_images_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(48, 1)
    data = Data.from_images(x, torch.where(torch.arange(48) < 12, -1, y), *images(24, 2), CLASSES, "n")
    labels: list[int] = []
    forward = Transfer.forward
    monkeypatch.setattr(Transfer, "forward", lambda s, b, c: (labels.extend(b.label.tolist()), forward(s, b, c))[1])
    LinearSGD((0.1,), training=SHORT).run(model_of(ConvNet(4), data), data)
    assert labels
    assert min(labels) >= 0


def test_backbones_that_do_not_suit_are_named() -> None:
    data = make_data()
    assert "tokens" in (AttentiveProbe().lacks(ConvNet(4), data) or "")
    assert "num_heads that divide 16" in (AttentiveProbe(num_heads=5).lacks(make_vit(), data) or "")
    assert AttentiveProbe(num_heads=2).lacks(make_vit(), data) is None
    assert "forward_tokens" in (AttentiveProbe(num_heads=5).lacks(ConvNet(2), data) or "")
    assert "vision transformer" in (LinearSGD(pool="cls").lacks(ConvNet(4), data) or "")
    assert "3 blocks" in (LinearSGD(pool="cls", num_blocks=3).lacks(make_vit(), data) or "")
    assert "stages" in (LinearStages().lacks(nn.Flatten(), data) or "")
    assert FineTune().lacks(nn.Flatten(), data) is not None
    assert LinearSGD().lacks(nn.Flatten(), data) is None
    unlabeled = Data.from_images(images(48, 1)[0], torch.full((48,), -1), name="n")
    assert "labels" in (FineTune().lacks(ConvNet(4), unlabeled) or "")


def test_grids_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="lrs is empty"):
        LinearSGD(())
    with pytest.raises(UserError, match="lrs must be above 0"):
        LinearSGD((0.0,))
    with pytest.raises(UserError, match="needs pool cls"):
        LinearSGD(num_blocks=4)
    with pytest.raises(UserError, match="fraction is 0"):
        SemiSupervised(0)
