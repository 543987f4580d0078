"""Train on many hosts, then test here with the model that came back: two launches in one script.

python examples/launch_two_functions.py                                   # this host, a worker per GPU or core
python examples/launch_two_functions.py --hostnames node1 node2 --workers-per-host 2
salloc -N2 python examples/launch_two_functions.py                        # the allocation's nodes
python examples/launch_two_functions.py --help                            # all options of traceml.Launcher
"""

import os

import torch
import tyro
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import traceml

EPOCHS = 12


def digits(train):
    """Handwritten digits, 8 x 8 pixels each: four of five to train on, the rest to test with."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    is_test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(*(each[~is_test if train else is_test] for each in (images, labels)))


def train():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    dataset = digits(train=True)
    sampler = DistributedSampler(dataset)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(dataset, batch_size=32, sampler=sampler):
            loss = cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        print(f"epoch {epoch}: loss {loss.item():.3f}")

    return model.cpu()


def test(model):
    images, labels = digits(train=False).tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    launcher = tyro.cli(traceml.Launcher)
    trained_model = launcher.run(train).rank(0)
    accuracy = traceml.launch(test, (trained_model,), hostnames=["localhost"], workers_per_host=1).rank(0)
    print(f"Accuracy: {accuracy:.3f}")
