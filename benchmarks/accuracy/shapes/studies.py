"""Trainings with the structure of notebooks and course work: LoRA, NeRF, translation, early stopping, word2vec, …"""

import copy
import math
import random
import sys

import torch
import torch.nn.functional as F
from small_net import net, rows
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

torch.manual_seed(0)
random.seed(0)


class LowRank(nn.Module):
    """A frozen linear layer, and what is learned beside it."""

    def __init__(self, base, rank=8):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def low_rank(steps=120, every=40):
    """LoRA by hand: the layers of a model are replaced in place; only the adapters are trained, and saved."""
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(768, 768), nn.GELU())], nn.Linear(768, 10))
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear) and layer.out_features == 768:
            setattr(model, name, LowRank(layer))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(1, steps + 1):
        x, y = torch.randn(64, 768), torch.randint(0, 10, (64,))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            torch.save({k: v for k, v in model.state_dict().items() if "down" in k or "up" in k}, "adapter.pt")
            print(f"step {step} loss {loss.item():.3f}")


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.density, self.color = net(63, 128, 128), nn.Linear(128, 1), nn.Linear(128, 3)

    def forward(self, points):
        waves = [points] + [f(2**k * points) for k in range(10) for f in (torch.sin, torch.cos)]
        x = F.relu(self.body(torch.cat(waves, -1)))
        return F.relu(self.density(x)), self.color(x).sigmoid()


def render(field, origins, directions, samples=32):
    depths = torch.linspace(2, 6, samples)
    density, color = field(origins[:, None] + directions[:, None] * depths[:, None])
    alpha = 1 - torch.exp(-density[..., 0] * (4 / samples))
    seen = torch.cumprod(torch.cat([torch.ones(len(alpha), 1), 1 - alpha + 1e-10], 1), 1)[:, :-1]
    return ((alpha * seen)[..., None] * color).sum(1)


def radiance_field(steps=150):
    """NeRF: random rays of one picture, volume rendering; a whole picture is rendered every 50th step."""
    field, pixels = Field(), torch.rand(900, 3)
    origins, directions = torch.zeros(900, 3), F.normalize(torch.randn(900, 3), dim=1)
    optimizer = torch.optim.Adam(field.parameters(), 5e-4)
    for step in range(steps):
        chosen = torch.randperm(900)[:128]
        loss = F.mse_loss(render(field, origins[chosen], directions[chosen]), pixels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                picture = torch.cat(
                    [render(field, origins[i : i + 128], directions[i : i + 128]) for i in range(0, 900, 128)]
                )
                print(step, "psnr", -10 * math.log10(F.mse_loss(picture, pixels).item()))


class Translator(nn.Module):
    def __init__(self, words=400, width=96):
        super().__init__()
        self.embed, self.encode = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.decode, self.head = nn.GRUCell(width, width), nn.Linear(width, words)

    def forward(self, source, target, forcing=0.5):
        hidden = self.encode(self.embed(source))[1][0]
        word, outputs = target[:, 0], []
        for at in range(1, target.shape[1]):
            hidden = self.decode(self.embed(word), hidden)
            outputs.append(self.head(hidden))
            word = target[:, at] if random.random() < forcing else outputs[-1].argmax(1)
        return torch.stack(outputs, 1)


def translation(epochs=3):
    """The seq2seq tutorial: teacher forcing by chance, a GRU cell in a Python loop; translates after each epoch."""
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    data = TensorDataset(torch.randint(0, 400, (960, 14)), torch.randint(0, 400, (960, 14)))
    best = math.inf
    for _ in range(epochs):
        total = 0.0
        for source, target in DataLoader(data, 32, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(source, target).flatten(0, 1), target[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()

        model.eval()
        with torch.no_grad():
            for source, target in DataLoader(Subset(data, range(64)), 1):
                model(source, target, forcing=0.0)
        model.train()
        if total < best:
            best = total
            torch.save(model.state_dict(), "translator.pt")


def early_stopping(patience=3):
    """Stops when the validation does not improve, and restores the best weights; a smaller rate on plateaus."""
    training, held_back = random_split(rows(2000), [1600, 400])
    model = nn.Sequential(nn.Linear(64, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10))
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    best, kept, bad = math.inf, None, 0
    for epoch in range(30):
        model.train()
        for x, y in DataLoader(training, 32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        model.eval()
        with torch.no_grad():
            loss = sum(F.cross_entropy(model(x), y).item() for x, y in DataLoader(held_back, 128))
        schedule.step(loss)
        if loss < best:
            best, kept, bad = loss, copy.deepcopy(model.state_dict()), 0
        else:
            bad += 1
        if bad >= patience:
            print(f"stopped after epoch {epoch}")
            break

    model.load_state_dict(kept)


def active_learning(rounds=4):
    """Trains on what is labeled, scores the rest, labels the most uncertain, and begins anew."""
    data = rows(6400)
    labeled, pool = list(range(640)), list(range(640, 6400))
    for _ in range(rounds):
        model = net(64, 512)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(3):
            for x, y in DataLoader(Subset(data, labeled), 32, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

        model.eval()
        with torch.no_grad():
            scores = torch.cat([model(x).softmax(1).amax(1) for x, _ in DataLoader(Subset(data, pool), 256)])
        chosen = set(scores.argsort()[:640].tolist())
        labeled += [index for at, index in enumerate(pool) if at in chosen]
        pool = [index for at, index in enumerate(pool) if at not in chosen]


class SkipGram(nn.Module):
    def __init__(self, words=20_000, width=64):
        super().__init__()
        self.inner, self.outer = (nn.Embedding(words, width, sparse=True) for _ in range(2))

    def forward(self, center, context, negative):
        v = self.inner(center)
        near = F.logsigmoid((v * self.outer(context)).sum(1))
        far = F.logsigmoid(-(self.outer(negative) @ v[..., None])[..., 0]).sum(1)
        return -(near + far).mean()


def skip_gram(steps=400):
    """word2vec: sparse embeddings, negatives drawn in the loop; sparse Adam."""
    model, weights = SkipGram(), torch.rand(20_000) ** 0.75
    optimizer = torch.optim.SparseAdam(model.parameters(), 1e-3)
    for _ in range(steps):
        center, context = torch.randint(0, 20_000, (2, 256))
        negative = torch.multinomial(weights, 256 * 5, replacement=True).view(256, 5)
        optimizer.zero_grad()
        model(center, context, negative).backward()
        optimizer.step()


class Flow(nn.Module):
    """A neural ODE: the same layers at each of the steps of a Runge-Kutta solver."""

    def __init__(self):
        super().__init__()
        self.field, self.head = nn.Sequential(nn.Linear(65, 256), nn.Tanh(), nn.Linear(256, 64)), nn.Linear(64, 10)

    def slope(self, t, x):
        return self.field(torch.cat([x, torch.full((len(x), 1), t)], 1))

    def forward(self, x, steps=10):
        h = 1 / steps
        for i in range(steps):
            a = self.slope(i * h, x)
            b = self.slope((i + 0.5) * h, x + 0.5 * h * a)
            c = self.slope((i + 0.5) * h, x + 0.5 * h * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.slope((i + 1) * h, x + h * c))
        return self.head(x)


def neural_ode():
    """Accumulates gradients over batches; the last step of an epoch has fewer of them."""
    model, every = Flow(), 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        loader = DataLoader(rows(2500), 32, shuffle=True)
        for i, (x, y) in enumerate(loader):
            (F.cross_entropy(model(x), y) / every).backward()
            if (i + 1) % every == 0 or i + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
