import pytest
import torch
from einops import rearrange

from sslbook.book.chapters.mae import exercises as check
from sslbook.methods import mae
from sslbook.notebook.exercises import CheckFailed


def cut(pattern):
    return lambda x, P: rearrange(x, f"n c (h p) (w q) -> n {pattern}", p=P, q=P)


def mask(visible, restore=lambda order: order.argsort(1)):
    return lambda u, keep: (visible(u, u.argsort(1), keep), restore(u.argsort(1)))


def loss(target=mae.normalize_patches, weight=lambda m: m, over=None, values=torch.mean):
    def answer(drawn, patches, mask):
        w = weight(mask)
        each = values((drawn - target(patches)).square(), 2)
        return (each * w).sum() / (w.sum() if over is None else over(mask))

    return answer


def centered(x, correction, power):
    variance, mean = torch.var_mean(x, dim=2, correction=correction, keepdim=True)
    return (x - mean) / (variance + 1e-6) ** power


def block(invert=False, swap=False, more=0, turn=False):
    def answer(top, left, height, width, grid):
        if turn:
            height, width = width, height
        place = torch.arange(grid)
        rows = (place >= top[:, None]) & (place < top[:, None] + height + more)
        columns = (place >= left[:, None]) & (place < left[:, None] + width + more)
        inside = (columns[:, :, None] & rows[:, None]) if swap else (rows[:, :, None] & columns[:, None])
        return (inside ^ invert).flatten(1).float()

    return answer


RIGHT = {
    "patchify": cut("(h w) (p q c)"),
    "mask": mask(lambda u, order, keep: order[:, :keep]),
    "loss": loss(),
    "block": block(),
}
WRONG = [
    ("patchify", lambda x, P: x.reshape(len(x), -1, P * P * 3), "reshape alone"),
    ("patchify", cut("(h w) (c p q)"), "colors come first"),
    ("patchify", cut("(w h) (p q c)"), "column by column"),
    ("patchify", cut("(h w) (q p c)"), "transposed"),
    ("mask", mask(lambda u, order, keep: order.argsort(1)[:, :keep]), "ranks, not indices"),
    ("mask", mask(lambda u, order, keep: order[:, -keep:]), "largest numbers"),
    ("mask", mask(lambda u, order, keep: u.argsort(1, descending=True)[:, :keep]), "largest first"),
    ("mask", mask(lambda u, order, keep: order[:, :keep], lambda order: order), "sorting order itself"),
    ("mask", lambda u, keep: u.argsort(1)[:, :keep], "return two tensors"),
    ("loss", loss(over=torch.numel), "divided by all patches"),
    ("loss", loss(weight=torch.ones_like), "multiply by the mask"),
    ("loss", loss(weight=lambda m: 1 - m), "1 means masked"),
    ("loss", loss(target=lambda x: x), "not normalized"),
    ("loss", loss(target=lambda x: (x - x.mean()) / x.std()), "over the whole batch"),
    ("loss", loss(target=lambda x: centered(x, 0, 0.5)), "biased variance"),
    ("loss", loss(target=lambda x: centered(x, 1, 1.0)), "take its root"),
    ("loss", loss(values=torch.sum), "take their mean"),
    ("block", block(invert=True), "not what is around"),
    ("block", block(swap=True), "rows and columns are swapped"),
    ("block", block(more=1), "too many"),
    ("block", block(turn=True), "height and width are swapped"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_correct_solution_passes(name, capsys) -> None:
    getattr(check, name)(RIGHT[name])
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "answer", "message"), WRONG)
def test_every_mistake_is_named(name, answer, message) -> None:
    with pytest.raises(CheckFailed, match=message):
        getattr(check, name)(answer)


@pytest.mark.parametrize("name", RIGHT)
def test_a_stub_is_no_mistake(name, capsys) -> None:
    getattr(check, name)(lambda *_: ...)
    assert "not written yet" in capsys.readouterr().out
