"""Files decoded by PIL in a Dataset that keeps its labels in an array, as most data sets of images are written."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--persistent", action="store_true")
parser.add_argument("--epochs", type=int, default=1)
options = parser.parse_args()

FOLDER = Path("photos")


def make_photos():
    FOLDER.mkdir(exist_ok=True)
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (320, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(FOLDER / f"{number}.jpg")


class Photos(Dataset):
    def __init__(self):
        self.paths = [FOLDER / f"{i % 30}.jpg" for i in range(480)]
        self.labels = np.arange(480) % 4

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        photo = Image.open(self.paths[index]).resize((32, 32))
        return torch.from_numpy(np.asarray(photo)).float().flatten() / 255, int(self.labels[index])


if __name__ == "__main__":
    make_photos()
    model = nn.Sequential(nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 4))
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(Photos(), batch_size=8, num_workers=options.workers, persistent_workers=options.persistent)
    for _ in range(options.epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
