"""Training steps of ten methods: ours against the same step written with lightly, on the same backbone.

Heads have the same sizes on both sides, and a step is everything between two batches: forward, backward, optimizer,
moving averages. The sides take turns; what is compared is CPU time, or on a GPU the time until it has finished.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence

import torch
from lightly import loss as losses
from lightly.models import modules, utils
from timing import table, take_turns
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from sslbook import methods, results
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import ResNet, VisionTransformer
from sslbook.schedules import Clock

HIDDEN, DIM, QUEUE, PROTOTYPES = 512, 128, 4096, 1024
DECODER = (128, 4, 4)  # width, depth and heads of MAE's


# -- lightly's side, each as its documentation writes it ---------------------------------------------------------------


class Peer(nn.Module):
    """A backbone with a head; `forward` returns the loss of a batch of views."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def embed(self, views: Sequence[Tensor]) -> list[Tensor]:
        return [self.head(self.backbone(x)) for x in views]

    def after_step(self) -> None:
        pass


class TwoViews(Peer):
    """SimCLR, Barlow Twins, VICReg: a loss of two embeddings."""

    def __init__(self, backbone: nn.Module, head: nn.Module, criterion: nn.Module) -> None:
        super().__init__(backbone, head)
        self.criterion = criterion

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        return self.criterion(*self.embed(views))


class Predicts(Peer):
    """SimSiam, NNCLR, and with a target network BYOL."""

    def __init__(
        self, backbone: nn.Module, head: nn.Module, predictor: nn.Module, ema: bool = False, bank: int = 0
    ) -> None:
        super().__init__(backbone, head)
        self.predictor, self.criterion = predictor, losses.NegativeCosineSimilarity()
        self.target = copy.deepcopy(nn.Sequential(backbone, head)).requires_grad_(False) if ema else None
        self.bank = modules.NNMemoryBankModule(size=(bank, DIM)) if bank else None
        if bank:
            self.criterion = losses.NTXentLoss(temperature=0.1)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        z = self.embed(views)
        p = [self.predictor(one) for one in z]
        targets = z if self.target is None else [self.target(x) for x in views]
        targets = [one.detach() for one in targets]
        if self.bank is not None:
            targets = [self.bank(targets[0], update=False), self.bank(targets[1], update=True)]
        return (self.criterion(targets[1], p[0]) + self.criterion(targets[0], p[1])) / 2

    def after_step(self) -> None:
        if self.target is not None:
            utils.update_momentum(nn.Sequential(self.backbone, self.head), self.target, m=0.996)


class MoCo(Peer):
    """Version 2 in one group of batch norm."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__(backbone, head)
        self.keys = copy.deepcopy(nn.Sequential(backbone, head)).requires_grad_(False)
        self.criterion = losses.NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        query = self.embed(views[:1])[0]
        shuffled, order = utils.batch_shuffle(views[1])
        key = utils.batch_unshuffle(self.keys(shuffled), order)
        return self.criterion(query, key)

    def after_step(self) -> None:
        utils.update_momentum(nn.Sequential(self.backbone, self.head), self.keys, m=0.999)


class SwAV(Peer):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__(backbone, head)
        self.prototypes = modules.SwaVPrototypes(DIM, PROTOTYPES)
        self.criterion = losses.SwaVLoss()

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        self.prototypes.normalize()
        scores = [self.prototypes(nn.functional.normalize(z, dim=1)) for z in self.embed(views)]
        return self.criterion(scores[:2], scores[2:])


class DINO(Peer):
    def __init__(self, backbone: nn.Module, head: nn.Module, teacher: nn.Module) -> None:
        super().__init__(backbone, head)
        self.teacher = nn.Sequential(copy.deepcopy(backbone), teacher).requires_grad_(False)
        self.criterion = losses.DINOLoss(output_dim=PROTOTYPES, warmup_teacher_temp_epochs=5)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        return self.criterion([self.teacher(x) for x in views[:2]], self.embed(views), epoch=0)

    def after_step(self) -> None:
        utils.update_momentum(nn.Sequential(self.backbone, self.head), self.teacher, m=0.996)


class MAE(nn.Module):
    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        vit = TimmVisionTransformer(size, patch, num_classes=0, embed_dim=dim, depth=depth, num_heads=heads)
        self.patch = patch
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
        self.length = self.backbone.sequence_length
        self.decoder = modules.MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=patch,
            embed_dim=dim,
            decoder_embed_dim=DECODER[0],
            decoder_depth=DECODER[1],
            decoder_num_heads=DECODER[2],
        )

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        (images,) = views
        n = len(images)
        keep, mask = utils.random_token_mask((n, self.length), mask_ratio=0.75, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (n, self.length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), mask))
        target = utils.get_at_index(utils.patchify(images, self.patch), mask - 1)
        return nn.functional.mse_loss(predicted, target)

    def after_step(self) -> None:
        pass


# -- pairs -------------------------------------------------------------------------------------------------------------


def pairs(size: int, width: int) -> dict[str, tuple[Callable[[], Method], Callable[[], nn.Module], tuple[View, ...]]]:
    """Of each method: ours, lightly's, and the views of a step."""
    view, small = View(size=size), View(size=size // 2)
    two, many = (view, view), (view, view, *[small] * 4)
    dim = 8 * width

    def net() -> ResNet:
        return ResNet(18, width, "small")

    def heads(kind: str, *sizes: int, **options: int) -> Callable[[], nn.Module]:
        return lambda: getattr(modules, kind)(*sizes, **options)

    simclr = heads("SimCLRProjectionHead", dim, dim, DIM, num_layers=3)
    wide = heads("BarlowTwinsProjectionHead", dim, HIDDEN, HIDDEN)
    byol, byol_predictor = heads("BYOLProjectionHead", dim, HIDDEN, DIM), heads("BYOLPredictionHead", DIM, HIDDEN, DIM)
    siamese = heads("SimSiamProjectionHead", dim, HIDDEN, HIDDEN)
    siamese_predictor = heads("SimSiamPredictionHead", HIDDEN, DIM, HIDDEN)
    neighbors, of_neighbors = (
        heads("NNCLRProjectionHead", dim, HIDDEN, DIM),
        heads("NNCLRPredictionHead", DIM, HIDDEN, DIM),
    )
    moco, swav = heads("MoCoProjectionHead", dim, dim, DIM), heads("SwaVProjectionHead", dim, HIDDEN, DIM)
    dino = heads("DINOProjectionHead", dim, HIDDEN, DIM, PROTOTYPES)
    vit = {"size": size, "patch": 4, "dim": 192, "depth": 6, "heads": 3}
    common = {"projector_dim": HIDDEN, "hidden_dim": HIDDEN}
    return {
        "SimCLR": (
            lambda: methods.SimCLR(net(), view),
            lambda: TwoViews(net(), simclr(), losses.NTXentLoss(temperature=0.1)),
            two,
        ),
        "Barlow Twins": (
            lambda: methods.BarlowTwins(net(), view, view, **common),
            lambda: TwoViews(net(), wide(), losses.BarlowTwinsLoss()),
            two,
        ),
        "VICReg": (
            lambda: methods.VICReg(net(), view, view, **common),
            lambda: TwoViews(net(), wide(), losses.VICRegLoss()),
            two,
        ),
        "BYOL": (
            lambda: methods.BYOL(net(), view, view, HIDDEN, DIM),
            lambda: Predicts(net(), byol(), byol_predictor(), ema=True),
            two,
        ),
        "SimSiam": (
            lambda: methods.SimSiam(net(), view, HIDDEN, HIDDEN, predictor_dim=DIM),
            lambda: Predicts(net(), siamese(), siamese_predictor()),
            two,
        ),
        "NNCLR": (
            lambda: methods.NNCLR(net(), view, view, HIDDEN, DIM, HIDDEN, queue_size=QUEUE),
            lambda: Predicts(net(), neighbors(), of_neighbors(), bank=QUEUE),
            two,
        ),
        "MoCo v2": (
            lambda: methods.MoCo(net(), view, projector_dim=DIM, queue_size=QUEUE, batch_norm_groups=1),
            lambda: MoCo(net(), moco()),
            two,
        ),
        "SwAV": (
            lambda: methods.SwAV(net(), view, small, 4, HIDDEN, DIM, PROTOTYPES),
            lambda: SwAV(net(), swav()),
            many,
        ),
        "DINO": (
            lambda: methods.DINO(net(), view, view, small, 4, HIDDEN, DIM, PROTOTYPES),
            lambda: DINO(net(), dino(), dino()),
            many,
        ),
        "MAE": (
            lambda: methods.MAE(VisionTransformer(*vit.values()), view, 0.75, False, *DECODER),
            lambda: MAE(**vit),
            (view,),
        ),
    }


def our_step(method: Method, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    step = iter(range(10**9))

    def run() -> None:
        clock = Clock(next(step), 10**6, 100)
        optimizer.zero_grad(set_to_none=True)
        method(batch, clock)["loss"].backward()
        method.before_optimizer_step(clock)
        optimizer.step()
        method.after_step(clock)

    return run


def their_step(peer: nn.Module, views: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        peer(views).backward()
        optimizer.step()
        peer.after_step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--width", type=int, default=32, help="of the ResNet-18")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", default=[], help="some of them, by the names in the table")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = {}
    index = torch.arange(options.batch, device=options.device)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for name, (ours, theirs, views) in pairs(options.size, options.width).items():
        if options.methods and name not in options.methods:
            continue
        torch.manual_seed(0)
        method, peer = ours().to(options.device).train(), theirs().to(options.device).train()
        x = tuple(torch.randn(options.batch, 3, view.size, view.size, device=options.device) for view in views)
        trained = [[p for p in side.parameters() if p.requires_grad] for side in (method, peer)]
        sizes = [sum(p.numel() for p in side) for side in trained]
        optimizers = [torch.optim.AdamW(side, lr=1e-4) for side in trained]
        sides = {
            "sslbook": our_step(method, Batch(x, index, index), optimizers[0]),
            "lightly": their_step(peer, x, optimizers[1]),
        }
        print(f"{name}: {sizes[0]:,} and {sizes[1]:,} parameters, batch {options.batch}, {options.device}", flush=True)
        seconds = take_turns(sides, options.repetitions, options.device, clock)
        for side, row in table(seconds, options.batch, "images").items():
            rows[f"{name}, {side}"] = row
    if options.save:
        print(results.save("benchmark_steps", rows, settings=vars(options)))


if __name__ == "__main__":
    main()
