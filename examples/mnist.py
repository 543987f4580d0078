"""Train a convolutional network on images of digits, as in the PyTorch examples.

The images are made here, so nothing is downloaded: each digit is its glyph of 5 x 7 dots, enlarged, shifted and noisy.
Runs alone (`python mnist.py`) and under torchrun (`torchrun --nproc-per-node 2 mnist.py`); nothing in it knows of
traceml, and `traceml run mnist.py` needs no change.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

GLYPHS = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..
"""


def make_digits(count, seed):
    """Return `count` images of 28 x 28 with their labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = [line.split() for line in GLYPHS.split("\n") if line]
    dots = torch.tensor([[[dot == "#" for dot in row[digit]] for row in rows] for digit in range(10)]).float()
    glyphs = dots.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)  # 21 x 15

    labels = torch.randint(10, (count,), generator=generator)
    tops = torch.randint(0, 28 - 21 + 1, (count,), generator=generator)
    lefts = torch.randint(0, 28 - 15 + 1, (count,), generator=generator)
    images = torch.randn(count, 1, 28, 28, generator=generator) * 0.2
    for image, label, top, left in zip(images, labels, tops.tolist(), lefts.tolist(), strict=True):
        image[0, top : top + 21, left : left + 15] += glyphs[label]

    return TensorDataset(images, labels)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = self.dropout2(x)
        return F.log_softmax(self.fc2(x), dim=1)


def train(args, model, device, train_loader, optimizer, epoch, rank):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0 and rank == 0:
            print(
                f"Train Epoch: {epoch} [{batch_idx}/{len(train_loader)} batches]\tLoss: {loss.item():.6f}", flush=True
            )
        if args.dry_run:
            break


def test(model, device, test_loader, rank):
    model.eval()
    test_loss = 0
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction="sum").item()
            correct += output.argmax(dim=1).eq(target).sum().item()

    count = len(test_loader.dataset)
    if rank == 0:
        print(f"Test set: Average loss: {test_loss / count:.4f}, Accuracy: {correct}/{count}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="PyTorch MNIST example on digits made here")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="per rank (default: 64)")
    parser.add_argument("--test-batch-size", type=int, default=500, metavar="N", help="(default: 500)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--lr", type=float, default=1.0, metavar="LR", help="(default: 1.0)")
    parser.add_argument("--gamma", type=float, default=0.7, metavar="M", help="learning rate per epoch (default: 0.7)")
    parser.add_argument("--train-images", type=int, default=4096, metavar="N", help="(default: 4096)")
    parser.add_argument("--test-images", type=int, default=500, metavar="N", help="(default: 500)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes (default: 0)")
    parser.add_argument("--no-accel", action="store_true", help="stay on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="one step per epoch")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="(default: 1)")
    parser.add_argument("--log-interval", type=int, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--save-model", metavar="FILE", help="where to save the weights at the end")
    args = parser.parse_args()

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    use_cuda = not args.no_accel and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")

    torch.manual_seed(args.seed)
    train_set, test_set = make_digits(args.train_images, args.seed), make_digits(args.test_images, args.seed + 1)
    sampler = DistributedSampler(train_set, world_size, rank) if world_size > 1 else None
    train_loader = DataLoader(
        train_set, args.batch_size, shuffle=sampler is None, sampler=sampler, num_workers=args.num_workers
    )
    test_loader = DataLoader(test_set, args.test_batch_size)

    net = Net().to(device)
    model = DistributedDataParallel(net) if world_size > 1 else net
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        if sampler is not None:
            sampler.set_epoch(epoch)
        train(args, model, device, train_loader, optimizer, epoch, rank)
        test(net, device, test_loader, rank)
        scheduler.step()

    if args.save_model and rank == 0:
        torch.save(net.state_dict(), args.save_model)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
