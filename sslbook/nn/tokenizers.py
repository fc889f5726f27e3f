"""Networks that say an image in words: one of a fixed number of codes for every patch.

`DiscreteEncoder` with `DiscreteDecoder` is the discrete variational autoencoder of DALL-E (Ramesh et al., 2021,
arXiv:2102.12092, section 2.1 and appendix A), of smaller networks; `VQTokenizer` is a transformer with a codebook (BEiT
v2, arXiv:2208.06366); `Tokenizer` is a trained one, frozen, as BEiT, BEiT v2 and CAE use it.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn.vit import VisionTransformer
from sslbook.weights.backbone import load_backbone

STREAM = rng.METHOD + 900  # the row of random numbers that the noise of the codes is drawn from


class Residual(nn.Module):
    """Two convolutions added to what came in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return x + self.layers(x)


class DiscreteEncoder(nn.Module):
    """The half of a discrete autoencoder that reads: a score for every code at every patch.

    Args:
        patch_size: side of a patch, a power of two.
        num_codes: size of the vocabulary.
        dim: width of the network.
        depth: residual blocks behind the last halving.
    """

    def __init__(self, patch_size: int = 8, num_codes: int = 8192, dim: int = 256, depth: int = 2) -> None:
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            near = 2 ** max(1, round(math.log2(max(2, patch_size))))
            raise UserError(f"patches of {patch_size} pixels are not made by halving: use patch_size {near}")
        if num_codes < 2:
            raise UserError(f"{num_codes} code(s) say nothing: use at least 2, such as 8192")
        self.init_args = {"patch_size": patch_size, "num_codes": num_codes, "dim": dim, "depth": depth}
        self.patch_size, self.num_codes, self.dim = patch_size, num_codes, dim
        halvings = round(math.log2(patch_size))
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers += [nn.Conv2d(3 if i == 0 else dim, dim, 4, stride=2, padding=1)]
            layers += [nn.ReLU()] if i < halvings - 1 else []
        self.layers = nn.Sequential(*layers, *[Residual(dim) for _ in range(depth)], nn.ReLU())
        self.head = nn.Conv2d(dim, num_codes, 1)

    def scores(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches codes"]:
        """Logits of the codes, patch by patch, row by row."""
        return rearrange(self.head(self.layers(x)), "b k h w -> b (h w) k")

    def tokens(self, x: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch patches"]:
        """The likeliest code of every patch."""
        return self.scores(x).argmax(dim=2)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.forward_map(x).mean(dim=(2, 3))

    def forward_map(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The features of all patches."""
        return self.layers(x)


class DiscreteDecoder(nn.Module):
    """The half that draws: codes, or mixtures of them, to pixels; the encoder in reverse."""

    def __init__(self, patch_size: int, num_codes: int, dim: int, depth: int) -> None:
        super().__init__()
        self.codebook = nn.Linear(num_codes, dim, bias=False)
        nn.init.normal_(self.codebook.weight)  # a mixture of a few codes shall have the size of one
        layers: list[nn.Module] = [Residual(dim) for _ in range(depth)]
        for _ in range(round(math.log2(patch_size))):
            layers += [nn.ReLU(), nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(dim, 3, 1))

    def forward(
        self, mixtures: Float[Tensor, "batch patches codes"], rows: int
    ) -> Float[Tensor, "batch 3 height width"]:
        return self.layers(rearrange(self.codebook(mixtures), "b (h w) d -> b d h w", h=rows))


def gumbel_noise(
    index: Int[Tensor, "batch"], patches: int, num_codes: int, seed: int, epoch: int
) -> Float[Tensor, "batch {patches} {num_codes}"]:
    """Keyed noise of the Gumbel distribution: the code with the greatest score plus noise is drawn from the softmax."""
    # Chance may be 0 but never 1; to move it up by a rounding error instead would make its greatest value 1.
    u = rng.uniform(seed, epoch, index, STREAM, patches * num_codes).clamp_min(2.0**-25)
    return -(-u.log()).log().unflatten(1, (patches, num_codes))


def gumbel_softmax(
    scores: Float[Tensor, "batch patches codes"], noise: Float[Tensor, "batch patches codes"], temperature: float
) -> Float[Tensor, "batch patches codes"]:
    """A mixture of codes that becomes a draw of one as the temperature falls (arXiv:1611.01144, equation 2)."""
    return ((scores + noise) / temperature).softmax(dim=2)


def kl_to_uniform(scores: Float[Tensor, "batch patches codes"]) -> Float[Tensor, ""]:
    """Mean over patches of the divergence of the code's distribution from the uniform one: log K - entropy."""
    log_q = scores.log_softmax(dim=2)
    return (log_q.exp() * log_q).sum(dim=2).mean() + math.log(scores.shape[2])


def falling_temperature(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def discrete_losses(
    encoder: DiscreteEncoder,
    decoder: DiscreteDecoder,
    images: Float[Tensor, "batch 3 height width"],
    noise: Float[Tensor, "batch patches codes"],
    temperature: float,
    scores: Float[Tensor, "batch patches codes"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The squared error of the drawn image per value, and the divergence of the codes per patch."""
    drawn = decoder(gumbel_softmax(scores, noise, temperature), images.shape[2] // encoder.patch_size)
    return (drawn.float() - images.float()).square().mean(), kl_to_uniform(scores)


class VQTokenizer(nn.Module):
    """A transformer whose patch tokens, mapped to a sphere of few dimensions, are named by the nearest of many codes.

    Args:
        image_size: side of the images.
        patch_size: side of a patch.
        dim: width of a token, and of the feature.
        depth: number of blocks.
        heads: number of attention heads.
        num_codes: size of the vocabulary.
        code_dim: dimensions of the sphere on which the codes lie.
    """

    codebook: Tensor

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_codes: int = 8192,
        code_dim: int = 32,
    ) -> None:
        super().__init__()
        if num_codes < 2:
            raise UserError(f"{num_codes} code(s) say nothing: use at least 2, such as 8192")
        self.init_args = {
            "image_size": image_size,
            "patch_size": patch_size,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "num_codes": num_codes,
            "code_dim": code_dim,
        }
        self.patch_size, self.num_codes, self.dim, self.code_dim = patch_size, num_codes, dim, code_dim
        self.vit = VisionTransformer(image_size, patch_size, dim, depth, num_heads, pool="mean")
        self.grid = self.vit.grid
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.register_buffer("codebook", F.normalize(torch.randn(num_codes, code_dim), dim=1))

    def places(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches code_dim"]:
        """Where on the sphere each patch lies, row by row."""
        tokens = self.vit.encode(self.vit.embed(x))[:, 1:]
        return F.normalize(self.project(tokens).float(), dim=2)

    def nearest(self, places: Float[Tensor, "batch patches code_dim"]) -> Int[Tensor, "batch patches"]:
        """The code that lies nearest to each place."""
        return (places @ self.codebook.T).argmax(dim=2)

    def tokens(self, x: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch patches"]:
        """The code of every patch."""
        return self.nearest(self.places(x))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.vit(x)

    def forward_map(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The features of all patches."""
        return self.vit.forward_map(x)


# -- frozen ------------------------------------------------------------------------------------------------------------


class Tokenizer(nn.Module):
    """A trained encoder, frozen, for images that another view has normalized.

    Images are resized so that one code falls on every patch of the student.

    Args:
        encoder: a module with `patch_size`, `codes` and `tokens(x)`.
        view: what the student's images are like.
        rows: patches of the student along a side.
        normalization: mean and deviation of the images that the encoder wants; those of the view if left out.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        view: View,
        rows: int,
        normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.num_codes = int(encoder.num_codes)  # pyrefly: ignore
        self.size = rows * int(encoder.patch_size)  # pyrefly: ignore
        mean, std = normalization or (view.mean, view.std)
        own_mean, own_std, mean_, std_ = (torch.tensor(v).view(3, 1, 1) for v in (view.mean, view.std, mean, std))
        self.register_buffer("scale", own_std / std_, persistent=False)
        self.register_buffer("shift", (own_mean - mean_) / std_, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "Tokenizer":
        """A tokenizer stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch patches"]:
        """The code of every patch, row by row; in float32, so that mixed precision changes none."""
        with torch.autocast(images.device.type, enabled=False):
            x = images.float()
            if x.shape[2:] != (self.size, self.size):
                x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
            return self.encoder.tokens(x * self.scale + self.shift)  # pyrefly: ignore[not-callable]


def load_tokenizer(path: str | Path, kind: type[nn.Module], made_by: str) -> tuple[nn.Module, tuple, int]:
    """A trained encoder, the mean and deviation of its images, and their size.

    Raises:
        UserError: nothing usable is there, or it is no tokenizer of this kind.
    """
    if not Path(path).exists():
        raise UserError(f"tokenizer {path}: no such run; train it first with python -m sslbook.train {made_by}")
    encoder, facts = load_backbone(path)
    if not isinstance(encoder, kind):
        raise UserError(
            f"tokenizer {path}: holds a {type(encoder).__name__}, which makes no codes: "
            f"train one with python -m sslbook.train {made_by}"
        )
    view = facts.get("view", {})
    plain = View()
    size = int(view.get("size", plain.size))
    return encoder, (tuple(view.get("mean", plain.mean)), tuple(view.get("std", plain.std))), size


def small_encoder(patch_size: int, num_codes: int) -> DiscreteEncoder:
    """The encoder that a method trains by itself: patches as the student's, of 8 pixels if that cannot be."""
    fits = patch_size in (2, 4, 8)
    return DiscreteEncoder(patch_size if fits else 8, num_codes, dim=64, depth=1)


def train_discrete(tokenizer: Tokenizer, data: Data, view: View, steps: int, method: str) -> None:
    """Train the tokenizer's encoder for so many steps on the images that the method will see, with 64 in each.

    The main process trains, the others get its weights. Neither torch's generator nor the run's seed play a part, so
    the same data and view give the same codes.
    """
    weights = None
    if distributed.is_main():
        print(
            f"{method}: no tokenizer given, so one is trained first, {steps} steps on the same images",
            file=sys.stderr,
        )
        device = tokenizer.scale.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = DiscreteEncoder(**tokenizer.encoder.init_args).to(device)  # pyrefly: ignore[bad-unpacking]
            decoder = DiscreteDecoder(**encoder.init_args).to(device)
        error, tokens = _fit(encoder, decoder, data, view, tokenizer.size, steps, device)
        if not math.isfinite(error):
            raise UserError(
                f"{method}: the loss of the tokenizer became {error}; train one with python -m sslbook.train dvae and "
                "give it as --method.tokenizer"
            )
        used = f"{len(tokens.unique())} of {encoder.num_codes} codes in use"
        print(f"{method}: the tokenizer is done; squared error of images {error:.3f}, {used}", file=sys.stderr)
        if len(tokens) > 1 and (tokens == tokens[0]).all():
            cure = "use more tokenizer_steps, or images that differ"
            print(f"{method}: warning: all images have the same codes, nothing to learn from; {cure}", file=sys.stderr)
        weights = {name: value.cpu() for name, value in encoder.state_dict().items()}
    tokenizer.encoder.load_state_dict(distributed.broadcast(weights) or {})


def _fit(
    encoder: DiscreteEncoder,
    decoder: DiscreteDecoder,
    data: Data,
    view: View,
    size: int,
    steps: int,
    device: torch.device,
) -> tuple[float, Int[Tensor, "batch patches"]]:
    """The squared error and the codes of the last batch."""
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    batch_size = min(64, data.num_train)
    per_epoch = data.steps_per_epoch(batch_size)
    error, tokens = math.nan, torch.zeros(0, 0, dtype=torch.int64)
    batches = iter(())
    for step in range(steps):
        if step % per_epoch == 0:
            batches = data.batches((view,), batch_size, seed=0, epoch=step // per_epoch, device=device)
        batch = next(batches)
        (images,) = batch.views
        if view.size != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        scores = encoder.scores(images)
        noise = gumbel_noise(batch.index, scores.shape[1], scores.shape[2], 0, step // per_epoch)
        temperature = falling_temperature(1.0, 1 / 16, step / steps)
        squared, divergence = discrete_losses(encoder, decoder, images, noise, temperature, scores)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / steps)
        optimizer.zero_grad()
        (squared + 0.001 * divergence).backward()
        optimizer.step()
        error, tokens = float(squared.detach()), scores.argmax(dim=2)
    return error, tokens
