"""A method inside Lightning, which is no dependency: pip install pytorch-lightning."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

import sslbook
from sslbook.methods import MoCo
from sslbook.methods.base import Method
from sslbook.nn import ConvNet


class Epochs(IterableDataset):
    """Our batches, epoch after epoch."""

    def __init__(self, data: sslbook.Data, method: Method, batch_size: int) -> None:
        self.data, self.method = data, method
        self.batch_size, self.epoch = batch_size, 0

    def __iter__(self):
        views, seed, epoch = self.method.views(), 0, self.epoch
        self.epoch += 1
        yield from self.data.batches(views, self.batch_size, seed=seed, epoch=epoch)


class SelfSupervised(pl.LightningModule):
    """Calls a method's events where Lightning has its own."""

    def __init__(self, method: Method, data: sslbook.Data, batch_size: int, epochs=2):
        super().__init__()
        self.method, self.data = method, data
        self.steps = data.steps_per_epoch(batch_size)
        self.total, self.taken = epochs * self.steps, 0
        method.setup(data)

    def clock(self) -> sslbook.Clock:
        return sslbook.Clock(self.global_step, self.total, self.steps)

    def on_train_epoch_start(self) -> None:
        self.method.before_epoch(self.data, self.clock())

    def training_step(self, batch, number):
        out = self.method(batch, self.clock())
        self.log_dict({name: value.detach() for name, value in out.items()})
        return out["loss"]

    def on_before_optimizer_step(self, optimizer) -> None:
        self.method.before_optimizer_step(self.clock())

    def on_train_batch_end(self, outputs, batch, number) -> None:
        if self.global_step > self.taken:  # not after each part of a batch
            self.taken = self.global_step
            self.method.after_step(self.clock())

    def configure_optimizers(self):
        trained = [p for p in self.method.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


data = sslbook.Data(shapes=sslbook.Shapes(num_train=64, num_test=32))
view = sslbook.View(size=16, crop=(0.3, 1.0))
method = MoCo(ConvNet(8), view, projector_dim=16, queue_size=64, batch_norm_groups=1)
module = SelfSupervised(method, data, batch_size=16)
loader = DataLoader(Epochs(data, method, batch_size=16), batch_size=None)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", log_every_n_steps=1, **quiet)
trainer.fit(module, loader)
print("steps", module.taken, "loss", float(trainer.callback_metrics["loss"]))
