"""One training step of SimCLR and of MAE: ours against the same step written with lightly, on the same backbone."""

import argparse
import copy

import torch
from lightly.loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM, SimCLRProjectionHead
from timing import table, take_turns
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from sslbook import results
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.methods.mae import MAE
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ResNet, VisionTransformer
from sslbook.schedules import Clock


class LightlySimCLR(nn.Module):
    """As in lightly's documentation of SimCLR, with a projector of three layers like ours."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = SimCLRProjectionHead(backbone.dim, backbone.dim, 128, num_layers=3)
        self.criterion = NTXentLoss(temperature=0.1)

    def forward(self, views: tuple[Tensor, Tensor]) -> Tensor:
        z_1, z_2 = (self.head(self.backbone(x)) for x in views)
        return self.criterion(z_1, z_2)


class LightlyMAE(nn.Module):
    """As in lightly's documentation of MAE."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int, decoder: tuple[int, int, int]) -> None:
        super().__init__()
        vit = TimmVisionTransformer(size, patch, num_classes=0, embed_dim=dim, depth=depth, num_heads=heads)
        self.patch = patch
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.length = self.backbone.sequence_length
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=patch,
            embed_dim=dim,
            decoder_embed_dim=decoder[0],
            decoder_depth=decoder[1],
            decoder_num_heads=decoder[2],
        )

    def forward(self, images: Tensor) -> Tensor:
        n = len(images)
        keep, mask = utils.random_token_mask((n, self.length), mask_ratio=0.75, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (n, self.length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), mask))
        target = utils.get_at_index(utils.patchify(images, self.patch), mask - 1)
        return nn.functional.mse_loss(predicted, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--width", type=int, default=32, help="of the ResNet-18")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    device = options.device
    torch.manual_seed(0)
    x = torch.randn(2, options.batch, 3, options.size, options.size, device=device)
    index = torch.arange(options.batch, device=device)
    view = View(size=options.size)

    net = ResNet(18, options.width, "small")
    ours, theirs = SimCLR(net, view).to(device), LightlySimCLR(copy.deepcopy(net)).to(device)
    two = Batch((x[0], x[1]), index, index)

    patch, dim, depth, heads, decoder = 4, 192, 6, 3, (128, 4, 4)
    vit = VisionTransformer(options.size, patch, dim, depth, heads)
    our_mae = MAE(vit, view, 0.75, False, *decoder).to(device)
    their_mae = LightlyMAE(options.size, patch, dim, depth, heads, decoder).to(device)
    one = Batch((x[0],), index, index)

    def step(module: nn.Module, loss) -> object:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        return run

    rows = {}
    for name, sides in {
        "SimCLR": {
            "sslbook": step(ours, lambda: ours(two, Clock())["loss"]),
            "lightly": step(theirs, lambda: theirs(two.views)),
        },
        "MAE": {
            "sslbook": step(our_mae, lambda: our_mae(one, Clock())["loss"]),
            "lightly": step(their_mae, lambda: their_mae(x[0])),
        },
    }.items():
        modules = (ours, theirs) if name == "SimCLR" else (our_mae, their_mae)
        sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in modules]
        print(f"{name}: {sizes[0]:,} and {sizes[1]:,} parameters, batch {options.batch}, {device}")
        for side, row in table(take_turns(sides, options.repetitions, device), options.batch, "images").items():
            rows[f"{name}, {side}"] = row
    if options.save:
        settings = {**vars(options), "threads": torch.get_num_threads()}
        print(results.save("benchmark_steps", rows, settings=settings))


if __name__ == "__main__":
    main()
