"""Your own loop: a method is a module whose forward is the loss, with five events."""

import torch

import sslbook
from sslbook.methods import DINO
from sslbook.nn import ConvNet

data = sslbook.Data(shapes=sslbook.Shapes(num_train=64, num_test=32))
large = sslbook.View(size=16, crop=(0.4, 1.0))
small = sslbook.View(size=8, crop=(0.1, 0.4))
method = DINO(ConvNet(8), large, large, small, num_local=2, num_outputs=32)
method.setup(data)  # memory banks learn how many images there are
optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)

batch_size, epochs = 16, 2
steps = data.steps_per_epoch(batch_size)
clock = sslbook.Clock(0, total_steps=epochs * steps, steps_per_epoch=steps, seed=0)
method.train()
for epoch in range(epochs):
    method.before_epoch(data, clock)  # clusterings
    order = method.sample_order(data, clock)
    views = method.views()
    for batch in data.batches(views, batch_size, seed=0, epoch=epoch, order=order):
        out = method(batch, clock)
        out["loss"].backward()
        method.before_optimizer_step(clock)  # DINO freezes its last layer at first
        optimizer.step()
        optimizer.zero_grad()
        clock = sslbook.Clock(clock.step + 1, clock.total_steps, steps, clock.seed)
        method.after_step(clock)  # the teacher follows, the center moves
    print(epoch, {name: round(float(value), 3) for name, value in out.items()})
torch.save(method.backbone.state_dict(), "backbone.pt")
