"""Language model like nanoGPT: random batches without a DataLoader, accumulation, evaluation now and then."""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="none")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--compile", action="store_true")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--evaluate-every", type=int, default=50)
parser.add_argument("--evaluate-batches", type=int, default=4)
options = parser.parse_args()
torch.manual_seed(0)

data = torch.randint(0, 96, (100_000,))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width=64, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(96, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, 96)

    def forward(self, tokens, targets):
        logits = self.head(self.blocks(self.embedding(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tokenize(text):
    return [hash(word) % 96 for word in text * 8]


def get_batch():
    if options.fault == "tokenize":
        tokenize([str(i) for i in range(9000)])

    starts = torch.randint(len(data) - 65, (8,))
    inputs = torch.stack([data[i : i + 64] for i in starts])
    return inputs, torch.stack([data[i + 1 : i + 65] for i in starts])


model = torch.compile(GPT(), backend="aot_eager") if options.compile else GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


@torch.no_grad()
def estimate_loss():
    model.eval()
    losses = [model(*get_batch()).item() for _ in range(options.evaluate_batches)]
    model.train()
    return sum(losses) / len(losses)


for step in range(options.steps):
    if step % options.evaluate_every == 0:
        estimate_loss()

    for _ in range(options.accumulate):
        loss = model(*get_batch()) / options.accumulate
        loss.backward()

    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if options.fault == "sync":
        time.sleep(0.01)
