"""Loops of other shapes, each a function: GAN, folds, distillation, reinforcement learning, own optimizers, …"""

import sys
import time

import torch
import torch.nn.functional as F
from small_net import net, rows
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

torch.manual_seed(0)


def gan():
    generator, critic = net(16, 512, 64), net(64, 512, 1)
    opt_g, opt_c = (torch.optim.Adam(model.parameters()) for model in (generator, critic))
    for x, _ in DataLoader(rows(), 16):
        fake = generator(torch.randn(len(x), 16))
        loss = F.softplus(-critic(x)).mean() + F.softplus(critic(fake.detach())).mean()
        opt_c.zero_grad()
        loss.backward()
        opt_c.step()
        opt_g.zero_grad()
        F.softplus(-critic(fake)).mean().backward()
        opt_g.step()


def folds():
    data = rows(960)
    for _ in range(3):
        training, held_out = DataLoader(data, 16, shuffle=True), DataLoader(data, 64)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            fit(model, optimizer, training)
            with torch.no_grad():
                for x, _ in held_out:
                    model.eval()(x)


def fit(model, optimizer, loader):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def distill():
    teacher, student = net(64, 2048).eval(), net(64, 128)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for x, _ in DataLoader(rows(), 16):
        with torch.no_grad():
            target = teacher(x)
        optimizer.zero_grad()
        (student(x) - target).square().mean().backward()
        optimizer.step()


def one_batch():
    x, y = next(iter(DataLoader(rows(), 256)))
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class Environment:
    """A game of 64 numbers; a step of it takes half a millisecond of Python."""

    def reset(self):
        return torch.randn(64)

    def step(self, action):
        until = time.perf_counter() + 0.0005
        while time.perf_counter() < until:
            pass
        return torch.randn(64), float(action == 3)


def ppo():
    policy = net(64, 256, 4)
    optimizer = torch.optim.Adam(policy.parameters())
    game = Environment()
    for _ in range(12):
        states, rewards = rollout(policy, game)
        for _ in range(4):
            for part in torch.randperm(len(states)).split(32):
                loss = -(policy(states[part]).log_softmax(1)[:, 0] * rewards[part]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@torch.no_grad()
def rollout(policy, game):
    state, states, rewards = game.reset(), [], []
    for _ in range(128):
        states.append(state)
        state, reward = game.step(policy(state).argmax())
        rewards.append(reward)
    return torch.stack(states), torch.tensor(rewards)


def lbfgs():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    for x, y in DataLoader(rows(960), 16):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def own_update():
    model = net()
    for x, y in DataLoader(rows(), 16):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None


def new_optimizer_each_step():
    model = net()
    for x, y in DataLoader(rows(), 16):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


class Momentum:
    """An optimizer as tutorials write it."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for _ in range(4):
            for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
                velocity.mul_(0.9).add_(parameter.grad)
                parameter.sub_(velocity, alpha=0.002)


def own_optimizer():
    model = net(64, 1024)
    fit(model, Momentum(model.parameters()), DataLoader(rows(), 16))


def clips():
    model = net(64, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    for x, y in DataLoader(rows(), 16):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def evaluates_in_the_loop():
    model = net(64, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, (x, y) in enumerate(DataLoader(rows(), 16)):
        if step % 10 == 0:
            estimate_loss(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def estimate_loss(model):
    model.eval()
    for _ in range(100):
        F.cross_entropy(model(torch.randn(64, 64)), torch.randint(0, 10, (64,)))
    model.train()


def autograd_grad():
    model = net()
    parameters = list(model.parameters())
    for x, y in DataLoader(rows(), 16):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= 0.01 * grad


def generator_data(slow=False):
    def batches():
        for _ in range(200):
            if slow:
                read_shard()
            yield torch.randn(16, 64), torch.randint(0, 10, (16,))

    model = net()
    fit(model, torch.optim.SGD(model.parameters(), 0.01), batches())


def slow_generator():
    generator_data(slow=True)


class Shards:
    """An iterator that is neither a DataLoader nor a generator, as those of torchdata's nodes."""

    def __init__(self, count):
        self.left = count

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        read_shard()
        return torch.randn(16, 64), torch.randint(0, 10, (16,))


def slow_iterator():
    model = net()
    fit(model, torch.optim.SGD(model.parameters(), 0.01), Shards(200))


def read_shard():
    time.sleep(0.02)


class Stream(IterableDataset):
    def __iter__(self):
        for _ in range(3200):
            yield torch.randn(64), 3


def stream():
    model = net()
    fit(model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(Stream(), 16))


def amp():
    model = net(64, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    for x, y in DataLoader(rows(), 16):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def scaler_skips():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, (x, y) in enumerate(DataLoader(rows(), 16)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if step >= 100:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def scaler_skips_gradients():
    """The loss stays finite; from step 100 on one gradient overflows, as those of float16 do."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, (x, y) in enumerate(DataLoader(rows(), 16)):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step >= 100:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()


def not_finite():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step, (x, y) in enumerate(DataLoader(rows(), 16)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if step >= 120:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()


def ema():
    model = net()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for x, y in DataLoader(rows(), 16):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()


def siamese():
    model = net(64, 512, 32)
    optimizer = torch.optim.Adam(model.parameters())
    for x, _ in DataLoader(rows(), 16):
        optimizer.zero_grad()
        F.triplet_margin_loss(model(x), model(x + 0.1), model(x.flip(0))).backward()
        optimizer.step()


def autoencoder():
    encoder, decoder = net(64, 512, 8), net(8, 512, 64)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    for x, _ in DataLoader(rows(), 16):
        optimizer.zero_grad()
        F.mse_loss(decoder(encoder(x)), x).backward()
        optimizer.step()


def recurrent():
    model, head = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()])
    for _ in range(150):
        lengths = torch.randint(5, 40, (16,))
        packed = nn.utils.rnn.pack_sequence([torch.randn(n, 32) for n in lengths.tolist()], enforce_sorted=False)
        optimizer.zero_grad()
        F.cross_entropy(head(model(packed)[1][0][0]), torch.randint(0, 10, (16,))).backward()
        optimizer.step()


def slower_with_time():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step, (x, y) in enumerate(DataLoader(rows(4800), 16)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        replay(step)


def replay(step):
    time.sleep(step * 0.0001)


def jump():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step, (x, y) in enumerate(DataLoader(rows(4800), 16)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step >= 150:
            check_gradients()


def check_gradients():
    time.sleep(0.02)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
