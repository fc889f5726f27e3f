"""What the loop promises to methods and hooks, stated by a method that records how it is called.

Runs are compared with formulas here and not with other runs: a mistake that both make would stay invisible.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslbook import Data, distributed
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.engine.hooks import Hook
from sslbook.engine.loop import pretrain
from sslbook.engine.run import Run
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA
from sslbook.optim import ParamRule
from sslbook.schedules import Clock, Cosine, Linear, Schedule, Warmup

SGD = partial(torch.optim.SGD, lr=0.5)
IMAGES, BATCH = 12, 4  # three steps make an epoch


def data() -> Data:
    images = torch.randint(256, (IMAGES, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Data.from_images(images, torch.arange(IMAGES) % 2)


class Recorder(Method):
    """Its loss is `scale` times the sum of its weights, so that the gradient is `scale`.

    With `by_index` it is also multiplied by the mean position of the images, which differs from process to process.
    """

    queue: Tensor

    def __init__(self, scale: float = 1.0, rank_in_buffer: bool = False, by_index: bool = False) -> None:
        super().__init__()
        self.scale, self.by_index = scale, by_index
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 3, 2))
        self.extra = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Dropout(0.5))
        self.teacher = EMA(self.extra)
        self.register_buffer("queue", torch.full((2,), float(distributed.rank())) if rank_in_buffer else torch.zeros(2))
        self.events: list[tuple[Any, ...]] = []
        self.seen: list[tuple[list[int], Tensor, float]] = []

    @property
    def modes(self) -> str:
        return {(True,): "train", (False,): "eval"}.get(tuple({part.training for part in self.modules()}), "mixed")

    def views(self) -> tuple[View, ...]:
        return (View(size=8, color_jitter=(0.4, 0.4, 0.4, 0.1)), View(size=8))

    def before_epoch(self, data: Data, clock: Clock) -> None:
        self.events.append(("before_epoch", clock.step, clock.epoch, self.modes))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.events.append(("forward", clock.step, clock.epoch, self.modes))
        self.seen.append((batch.index.tolist(), torch.stack(batch.views), float(torch.rand(()))))
        scale = self.scale * (batch.index.float().mean() if self.by_index else 1.0)
        return {"loss": scale * sum(p.sum() for p in self.backbone.parameters())}

    def before_optimizer_step(self, clock: Clock) -> None:
        self.gradient = float(self.backbone[1].weight.grad.mean())
        self.weight = float(self.backbone[1].weight[0, 0].detach())
        self.events.append(("before_optimizer_step", clock.step, clock.epoch, self.modes))

    def after_step(self, clock: Clock) -> None:
        moved = float(self.backbone[1].weight[0, 0].detach()) - self.weight
        self.events.append(("after_step", clock.step, clock.epoch, "train"))
        self.moves = [*getattr(self, "moves", []), moved]


class Watcher(Hook):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []

    def step(self, run: Run) -> None:
        run.method.events.append(("hook.step", run.clock.step, run.clock.epoch, run.method.modes))
        self.rates.append(run.metrics["lr"])
        self.norms.append(run.metrics.get("gradient_norm", 0.0))

    def epoch(self, run: Run) -> None:
        run.method.events.append(("hook.epoch", run.clock.step, run.clock.epoch, run.method.modes))


def run(out: Path, steps: int = 7, method: Recorder | None = None, **options: Any) -> tuple[Recorder, Watcher]:
    torch.manual_seed(0)
    method, watcher = method or Recorder(), Watcher()
    common = {"batch_size": BATCH, "steps": steps, "progress": False, "device": "cpu", "out_dir": out, "seed": 3}
    pretrain(method, data(), **{"optimizer": SGD, "hooks": [watcher], **common, **options})
    return method, watcher


def expected(first: int, last: int, parts: int) -> list[tuple[Any, ...]]:
    """The events of the steps from `first` to `last`, with three steps an epoch, in a run that ends there."""
    events: list[tuple[Any, ...]] = []
    for step in range(first, last):
        if step % 3 == 0:
            events.append(("before_epoch", step, step // 3, "train"))
        events += [("forward", step, step // 3, "train")] * parts
        events.append(("before_optimizer_step", step, step // 3, "train"))
        events.append(("after_step", step + 1, (step + 1) // 3, "train"))
        events.append(("hook.step", step + 1, (step + 1) // 3, "train"))
        if (step + 1) % 3 == 0 or step + 1 == last:
            events.append(("hook.epoch", step + 1, (step + 1) // 3, "eval"))
    return events


@pytest.mark.parametrize("parts", [1, 2])
def test_the_loop_calls_in_order_in_the_right_mode_with_the_right_clock(parts: int, tmp_path: Path) -> None:
    method, _ = run(tmp_path / "run", method=Recorder().eval(), grad_accum_steps=parts)  # in whatever mode it comes
    assert method.events == expected(0, 7, parts)
    assert method.modes == "eval"  # when training is over


def test_a_resumed_run_is_called_as_the_whole_one_was(tmp_path: Path) -> None:
    """The same calls, images, views and random numbers of torch, from the step where its checkpoint stands."""
    whole, _ = run(tmp_path / "whole", grad_accum_steps=2)
    run(tmp_path / "cut", grad_accum_steps=2, checkpoint_every="4 steps", keep_last=0)
    for name in ("checkpoint-00000007.pt", "backbone.safetensors"):
        (tmp_path / "cut" / name).unlink()
    method, _ = run(tmp_path / "cut", grad_accum_steps=2, resume=tmp_path / "cut")
    assert method.events == expected(4, 7, 2)
    assert len(whole.seen) == 14
    for one, other in zip(whole.seen[8:], method.seen, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert one[2] == other[2], "torch's random state was not restored"
    draws = [number for _, _, number in whole.seen]
    assert len(set(draws)) == len(draws)


def test_every_epoch_has_its_own_order_and_views(tmp_path: Path) -> None:
    method, _ = run(tmp_path / "run", steps=6)
    epochs = [method.seen[:3], method.seen[3:]]
    orders = [[i for index, _, _ in epoch for i in index] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(IMAGES))] * 2
    assert orders[0] != orders[1]
    views = [{i: x[:, k] for index, x, _ in epoch for k, i in enumerate(index)} for epoch in epochs]
    for i in range(IMAGES):
        assert not torch.allclose(views[0][i], views[1][i]), f"image {i} has the views of the epoch before"
        assert not torch.allclose(views[0][i][0], views[0][i][1]), "the two views of an image are one"


def test_order_and_views_depend_on_the_seed(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(i), steps=3, seed=seed)[0].seen for i, seed in enumerate((3, 4, 3))]
    orders = [[i for index, _, _ in seen for i in index] for seen in runs]
    assert orders[0] == orders[2] != orders[1]
    views = [{i: x[:, k] for index, x, _ in seen for k, i in enumerate(index)} for seen in runs]
    assert all(torch.equal(views[0][i], views[2][i]) for i in range(IMAGES))
    assert not any(torch.allclose(views[0][i], views[1][i]) for i in range(IMAGES))


SCHEDULES: list[Schedule] = [Cosine(stop=0.1), Warmup("3 steps", then=Linear()), Warmup(1, then=Cosine())]


def rates(schedule: Schedule, steps: int, factor: float = 1.0) -> list[float]:
    return [0.5 * factor * schedule(Clock(step, steps, IMAGES // BATCH)) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_step_is_taken_with_the_rate_of_its_schedule(schedule: Schedule, parts: int, tmp_path: Path) -> None:
    """Of the step about to be taken, scaled by the whole batch; what is logged is what the weights moved by."""
    options = {"schedule": schedule, "grad_accum_steps": parts, "base_batch_size": 8}
    method, watcher = run(tmp_path / "run", **options)
    wanted = rates(schedule, 7, factor=BATCH / 8)
    assert watcher.rates == pytest.approx(wanted)
    assert [-move for move in method.moves] == pytest.approx(wanted, abs=1e-6)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["lr"] == pytest.approx(wanted[-1])


def test_the_rate_goes_on_after_a_resume(tmp_path: Path) -> None:
    schedule = SCHEDULES[1]
    run(tmp_path / "cut", schedule=schedule, checkpoint_every="4 steps", keep_last=0)
    for name in ("checkpoint-00000007.pt", "backbone.safetensors"):
        (tmp_path / "cut" / name).unlink()
    method, watcher = run(tmp_path / "cut", schedule=schedule, resume=tmp_path / "cut")
    assert watcher.rates == pytest.approx(rates(schedule, 7)[4:])
    assert [-move for move in method.moves] == pytest.approx(watcher.rates, abs=1e-6)


def test_weight_decay_follows_its_schedule_with_the_rate(tmp_path: Path) -> None:
    """Without gradient the weights shrink by rate x decay; vectors do not."""
    method = Recorder(scale=0.0)
    before = [p.detach().clone() for p in method.backbone.parameters()]
    optimizer = partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    run(tmp_path / "run", method=method, optimizer=optimizer, weight_decay_schedule=Linear(1.0, 3.0))
    kept = 1.0
    for step in range(7):
        kept *= 1 - 0.5 * 0.1 * (1 + 2 * step / 7)
    torch.testing.assert_close(method.backbone[1].weight.detach(), kept * before[0])
    torch.testing.assert_close(method.backbone[1].bias.detach(), before[1])


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_gradients_are_clipped_without_the_scale_of_mixed_precision(precision: str, tmp_path: Path) -> None:
    method, watcher = run(tmp_path / "run", method=Recorder(10.0), precision=precision, clip_grad_norm=1.0, steps=2)
    norm = 10 * (8 * 8 * 3 * 2 + 2) ** 0.5
    assert method.gradient == pytest.approx(10.0)  # unscaled, and not yet clipped
    assert watcher.norms == pytest.approx([norm, norm])
    assert method.moves == pytest.approx([-0.5 * 10 / norm] * 2, rel=1e-4)


@pytest.mark.slow
def test_the_scale_of_mixed_precision_is_kept_over_a_resume(tmp_path: Path) -> None:
    """The first scale makes the gradient infinite, so that a step is skipped and the scale halved."""
    options = {"precision": "fp16", "optimizer": partial(torch.optim.SGD, lr=1e-34)}
    method, _ = run(tmp_path / "run", steps=3, method=Recorder(1e34), **options)
    assert method.moves == pytest.approx([0.0, -1.0, -1.0])
    method, _ = run(tmp_path / "run", steps=5, method=Recorder(1e34), resume=tmp_path / "run", **options)
    assert method.moves == pytest.approx([-1.0, -1.0])


def test_the_gradient_of_an_accumulated_batch_is_its_mean(tmp_path: Path) -> None:
    method, _ = run(tmp_path / "run", method=Recorder(2.0), grad_accum_steps=4)
    assert method.gradient == pytest.approx(2.0)
    assert method.moves == pytest.approx([-1.0] * 7)


class Counts(Recorder):
    """Logs the step."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return {**super().forward(batch, clock), "number": torch.tensor(float(clock.step))}


class Scores(Hook):
    measures = ("score",)

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def epoch(self, run: Run) -> None:
        run.evaluations["score"] = next(self.scores)


def test_the_best_value_is_kept_over_a_resume(tmp_path: Path) -> None:
    options = {"monitor": "score", "keep_last": 0}
    run(tmp_path / "run", steps=3, hooks=[Watcher(), Scores([30.0])], **options)
    run(tmp_path / "run", steps=6, hooks=[Watcher(), Scores([20.0])], resume=tmp_path / "run", **options)
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 3
    run(tmp_path / "run", steps=9, hooks=[Watcher(), Scores([40.0])], resume=tmp_path / "run", **options)
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 9


def test_seconds_add_up_over_a_resume(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    file = tmp_path / "checkpoint-00000003.pt"
    torch.save({**torch.load(file, weights_only=True), "seconds": 1000.0}, file)
    run(tmp_path, steps=6, resume=tmp_path)
    assert torch.load(tmp_path / "checkpoint-00000006.pt", weights_only=True)["seconds"] > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "written with seed 3, this run has 4"),
        ({"batch_size": 2}, "written with batch_size 4, this run has 2"),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.5)}, "written with optimizer SGD, this run has AdamW"),
        ({"method": Counts()}, "written with method Recorder, this run has Counts"),
    ],
)
def test_a_run_goes_on_as_what_it_was(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    with pytest.raises(UserError, match=message):
        run(tmp_path, steps=6, resume=tmp_path, **options)


def test_lines_beyond_the_checkpoint_are_not_kept(tmp_path: Path) -> None:
    run(tmp_path, log_every=1, checkpoint_every="4 steps", keep_last=0)
    (tmp_path / "checkpoint-00000007.pt").unlink()
    run(tmp_path, log_every=1, resume=tmp_path)
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5, 6, 7]


def test_rules_reach_their_parameters(tmp_path: Path) -> None:
    method = Recorder()
    before = method.backbone[1].bias.detach().clone()
    run(tmp_path / "run", method=method, rules=[ParamRule("bias", lr_scale=3.0)], schedule=Linear())
    expected = before - 3 * sum(rates(Linear(), 7))
    torch.testing.assert_close(method.backbone[1].bias.detach(), expected)


def test_a_rule_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    method = Recorder()
    before = method.backbone[1].bias.detach().clone()
    run(tmp_path / "run", method=method, rules=[ParamRule("bias", schedule=Linear(0.0, 1.0))], schedule=Linear())
    torch.testing.assert_close(method.backbone[1].bias.detach(), before - sum(rates(Linear(0.0, 1.0), 7)))


class Ordered(Recorder):
    """Shows the last image only, in every epoch as often as there are images."""

    def sample_order(self, data: Data, clock: Clock) -> Tensor:
        return torch.full((IMAGES,), IMAGES - 1)


def test_a_method_may_choose_the_images(tmp_path: Path) -> None:
    method, _ = run(tmp_path / "run", method=Ordered(), steps=4)
    assert [index for index, _, _ in method.seen] == [[IMAGES - 1] * BATCH] * 4


def test_a_line_of_metrics_holds_the_mean_over_its_steps(tmp_path: Path) -> None:
    run(tmp_path / "run", method=Counts(), log_every=3)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["number"]) for line in logged] == [(3, 1.0), (6, 4.0), (7, 6.0)]


def _in_processes(out: str, parts: int) -> dict[str, Any]:
    recorder = Recorder(2.0, rank_in_buffer=True, by_index=True)
    method, watcher = run(Path(out), method=recorder, grad_accum_steps=parts, base_batch_size=8)
    seen = [(index, draw) for index, _, draw in method.seen]
    return {"rates": watcher.rates, "moves": method.moves, "queue": method.queue.tolist(), "seen": seen}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_in_two_processes_rate_step_and_buffers_are_those_of_one(parts: int, pool, tmp_path: Path) -> None:
    one, two = pool.run(_in_processes, str(tmp_path / "run"), parts)
    for got in (one, two):
        assert got["rates"] == pytest.approx([0.25] * 7)
        assert got["queue"] == [0.0, 0.0], "buffers are those of process 0"
    shown = [a + b for (a, _), (b, _) in zip(one["seen"], two["seen"])]
    assert sorted(i for index in shown[: 3 * parts] for i in index) == list(range(IMAGES))
    batches = [[i for index in shown[step * parts : (step + 1) * parts] for i in index] for step in range(7)]
    wanted = [-0.25 * 2.0 * sum(batch) / BATCH for batch in batches]  # rate times the gradient of the global batch
    for got in (one, two):
        assert got["moves"] == pytest.approx(wanted, rel=1e-4)
    assert one["seen"][0][1] != two["seen"][0][1], "torch's random numbers (drop path) differ between processes"


def test_the_clock_says_where_the_run_stands() -> None:
    clock = Clock(step=5, total_steps=20, steps_per_epoch=3)
    assert (clock.epoch, clock.progress) == (1, 0.25)
    assert replace(clock, step=6).epoch == 2
