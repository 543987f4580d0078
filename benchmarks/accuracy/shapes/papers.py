"""Trainings with the structure of code that comes with papers: WGAN-GP, MoCo, detection, NeRF, SAC, PINN, DP-SGD, …"""

import copy
import sys

import numpy as np
import torch
import torch.nn.functional as F
from small_net import net, rows
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

torch.manual_seed(0)


# Several networks, and several optimizers.


def wgan_gp(critic_steps=5):
    """The critic is trained on each batch, with a penalty on its gradients; the generator on every fifth."""
    generator, critic = net(32, 512, 64), net(64, 512, 1)
    optimizer_g, optimizer_d = (torch.optim.Adam(model.parameters(), 1e-4, (0.0, 0.9)) for model in (generator, critic))

    def penalty(real, fake):
        mix = torch.rand(len(real), 1)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return ((gradient.norm(2, dim=1) - 1) ** 2).mean()

    for i, (real, _) in enumerate(DataLoader(rows(6400), 32, shuffle=True)):
        fake = generator(torch.randn(len(real), 32)).detach()
        optimizer_d.zero_grad()
        loss_d = critic(fake).mean() - critic(real).mean() + 10 * penalty(real, fake)
        loss_d.backward()
        optimizer_d.step()
        if i % critic_steps == 0:
            optimizer_g.zero_grad()
            (-critic(generator(torch.randn(len(real), 32))).mean()).backward()
            optimizer_g.step()


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = net(24, 256, 1), net(24, 256, 1)

    def forward(self, state, action):
        x = torch.cat([state, action], 1)
        return self.first(x), self.second(x)


def soft_actor_critic():
    """Three optimizers, twin critics, targets that follow slowly; one update per step of a game of numpy arrays."""
    actor, critic, log_alpha = net(16, 256, 16), Critic(), torch.zeros(1, requires_grad=True)
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizers = [torch.optim.Adam(each, 3e-4) for each in (actor.parameters(), critic.parameters(), [log_alpha])]
    states, actions = np.zeros((5000, 16), "f4"), np.zeros((5000, 8), "f4")
    rewards, follows = np.zeros((5000, 1), "f4"), np.zeros((5000, 16), "f4")
    random, state = np.random.default_rng(0), np.zeros(16, "f4")

    def act(state):
        mean, log_std = actor(state).chunk(2, 1)
        noise = torch.randn_like(mean)
        raw = mean + noise * log_std.clamp(-5, 2).exp()
        return raw.tanh(), (-0.5 * noise**2 - log_std).sum(1, keepdim=True)

    for step in range(700):
        with torch.no_grad():
            action = act(torch.from_numpy(state)[None])[0][0].numpy() if step > 100 else random.random(8, "f4")
        after = (0.9 * state + 0.1 * random.standard_normal(16)).astype("f4")
        states[step], actions[step], rewards[step], follows[step] = state, action, after.sum(), after
        state = after
        if step < 100:
            continue

        batch = random.integers(0, step, 128)
        s, a, r, n = (torch.from_numpy(table[batch]) for table in (states, actions, rewards, follows))
        with torch.no_grad():
            next_action, next_log = act(n)
            value = torch.min(*target(n, next_action)) - log_alpha.exp() * next_log
            goal = r + 0.99 * value
        one, two = critic(s, a)
        losses = [None, F.mse_loss(one, goal) + F.mse_loss(two, goal), None]
        optimizers[1].zero_grad()
        losses[1].backward()
        optimizers[1].step()

        new, log = act(s)
        losses[0] = (log_alpha.exp().detach() * log - torch.min(*critic(s, new))).mean()
        optimizers[0].zero_grad()
        losses[0].backward()
        optimizers[0].step()

        losses[2] = -(log_alpha * (log - 8).detach()).mean()
        optimizers[2].zero_grad()
        losses[2].backward()
        optimizers[2].step()
        for kept, now in zip(target.parameters(), critic.parameters(), strict=True):
            kept.data.mul_(0.995).add_(0.005 * now.data)


# Representations.


class Views(Dataset):
    """Two random crops of each picture, made by numpy on the CPU."""

    def __init__(self, count=2400, size=24):
        self.pictures = np.random.default_rng(0).random((count, 3, size + 8, size + 8), "f4")
        self.size = size

    def __len__(self):
        return len(self.pictures)

    def crop(self, picture):
        y, x = np.random.randint(0, 8, 2)
        view = picture[:, y : y + self.size, x : x + self.size]
        return torch.from_numpy((view[:, :, ::-1] if np.random.rand() < 0.5 else view).copy())

    def __getitem__(self, index):
        return self.crop(self.pictures[index]), self.crop(self.pictures[index])


def encoder(width=24):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 64),
    )  # fmt: skip


def momentum_contrast(workers=0):
    """MoCo: a second encoder that follows the first, and a queue of its outputs."""
    query, queue = encoder(), F.normalize(torch.randn(64, 1024), dim=0)
    key = copy.deepcopy(query).requires_grad_(False)
    optimizer = torch.optim.SGD(query.parameters(), 0.03, 0.9)
    at = 0
    for one, two in DataLoader(Views(), 32, shuffle=True, drop_last=True, num_workers=workers):
        q = F.normalize(query(one), dim=1)
        with torch.no_grad():
            for kept, now in zip(key.parameters(), query.parameters(), strict=True):
                kept.data = kept.data * 0.999 + now.data * 0.001
            k = F.normalize(key(two), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone()], 1) / 0.07
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, at : at + len(k)] = k.T
        at = (at + len(k)) % 1024


def memory_bank(steps=300):
    """Compares each batch with all earlier ones: the loss, and its backward, take longer and longer."""
    model, bank = net(64, 512, 128), torch.empty(0, 128)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        x = torch.randn(64, 64)
        query, key = model(x), F.normalize(x @ torch.randn(64, 128), dim=1)
        loss = compare(query, key, bank)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bank = torch.cat([bank, key])


def compare(query, key, bank):
    query = F.normalize(query, dim=1)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ bank.T], dim=1)
    return F.cross_entropy(scores / 0.1, torch.zeros(len(query), dtype=torch.long))


def sparse_table(steps=400):
    """A sparse optimizer updates the rows of a large table, and Adam the layers above it."""
    table = nn.EmbeddingBag(200_000, 32, sparse=True, mode="sum")
    model = net(64, 256, 1)
    sparse, dense = torch.optim.SparseAdam(table.parameters()), torch.optim.Adam(model.parameters())
    for _ in range(steps):
        users, items = torch.randint(0, 200_000, (2, 256, 20))
        loss = model(torch.cat([table(users), table(items)], dim=1)).pow(2).mean()
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()


def two_tower():
    """CLIP: texts and pictures, each with its encoder, and all pairs of a batch as the loss."""
    text, picture, scale = nn.EmbeddingBag(8000, 64), net(64, 512, 64), nn.Parameter(torch.tensor(2.6))
    optimizer = torch.optim.AdamW([*text.parameters(), *picture.parameters(), scale], 1e-3)
    data = TensorDataset(torch.randint(0, 8000, (12800, 12)), torch.randn(12800, 64))
    for words, features in DataLoader(data, 64, shuffle=True):
        one, two = F.normalize(text(words), dim=1), F.normalize(picture(features), dim=1)
        logits = scale.exp() * one @ two.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(0, 4.6)


# Inputs of all sizes.


class Scenes(Dataset):
    """Pictures of different sizes with different numbers of boxes."""

    def __len__(self):
        return 240

    def __getitem__(self, index):
        height, width = 48 + 16 * (index % 5), 48 + 16 * (index // 5 % 5)
        return torch.rand(3, height, width), {
            "boxes": torch.rand(1 + index % 7, 4),
            "labels": torch.ones(1 + index % 7),
        }


class Detector(nn.Module):
    """Pads the pictures of a batch, and returns losses by name while it is trained, as torchvision's do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 2, 1)),
            nn.Conv2d(24, 5, 1),
        )

    def forward(self, pictures, targets=None):
        height, width = (max(each.shape[side] for each in pictures) for side in (1, 2))
        batch = torch.stack([F.pad(each, (0, width - each.shape[2], 0, height - each.shape[1])) for each in pictures])
        found = self.head(F.relu(self.body(batch))).flatten(2)
        if targets is None:
            return found.amax(2)

        boxes = torch.stack([target["boxes"].mean(0) for target in targets])
        return {"objectness": found[:, 4].sigmoid().mean(), "boxes": F.l1_loss(found[:, :4].mean(2), boxes)}


def detection(epochs=3):
    """torchvision's references: warm-up of the learning rate, a sum of losses, evaluation after each epoch."""
    model = Detector()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.005, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=50)

    def collate(samples):
        return tuple(zip(*samples, strict=True))

    training = DataLoader(Scenes(), 4, shuffle=True, collate_fn=collate)
    for _ in range(epochs):
        model.train()
        for pictures, targets in training:
            losses = model(pictures, targets)
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                sys.exit("loss is not finite")

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        model.eval()
        with torch.inference_mode():
            for pictures, _ in DataLoader(Subset(Scenes(), range(40)), 1, collate_fn=collate):
                model(pictures)


def growing_batches():
    """The batch is twice as large in each phase of the training, with a loader of its own."""
    model = net(64, 512)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True)
    for size in (32, 64, 128, 256):
        for x, y in DataLoader(rows(100 * size), size, shuffle=True):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# Gradients by other means.


def private_gradients():
    """DP-SGD: gradients of each sample by torch.func, clipped, summed, and noise."""
    model = net(64, 256)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def loss_of(values, x, y):
        return F.cross_entropy(torch.func.functional_call(model, values, (x[None],)), y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))
    for x, y in DataLoader(rows(), 16, shuffle=True):
        grads = per_sample({name: value.detach() for name, value in model.named_parameters()}, x, y)
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factor = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for name, value in model.named_parameters():
            summed = torch.einsum("b,b...->...", factor, grads[name])
            value.grad = (summed + torch.randn_like(value)) / len(x)
        optimizer.step()
        optimizer.zero_grad()


def informed_by_physics():
    """PINN: derivatives by the inputs in the loss; Adam first, then L-BFGS, on the same points."""
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    points = torch.rand(1024, 2, requires_grad=True)

    def residual():
        u = model(points)
        (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
        return (first[:, 1] - 0.1 * second[:, 0] + u[:, 0] * first[:, 0]).square().mean()

    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(300):
        adam.zero_grad()
        loss = residual()
        loss.backward()
        adam.step()

    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = residual()
        loss.backward()
        return loss

    for _ in range(15):
        lbfgs.step(closure)


class Checkpointed(nn.Module):
    def __init__(self, width=256, depth=8):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(depth)]
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean(1))


def checkpoints_activations():
    """Each block is computed again in backward; gradients are clipped, the learning rate warms up."""
    model = Checkpointed()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=60)
    for _ in range(60):
        x, y = torch.randn(8, 32, 256), torch.randint(0, 10, (8,))
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
