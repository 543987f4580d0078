"""Habits of training scripts, each a function: what people put into a loop, around a loader or before a training."""

import copy
import io
import json
import multiprocessing
import queue
import sys
import threading
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, get_worker_info

torch.manual_seed(0)


def net(inputs=64, hidden=512, outputs=10, depth=1):
    inner = [layer for _ in range(depth) for layer in (nn.Linear(hidden, hidden), nn.ReLU())]
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), *inner, nn.Linear(hidden, outputs))


def rows(count=3200):
    return TensorDataset(torch.randn(count, 64), torch.arange(count) % 10)


def fit(model, optimizer, loader, after=lambda step, loss: None):
    model.train()
    for step, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        after(step, loss)


# Loaders.


class Rows(Dataset):
    """A million rows, made when they are asked for."""

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        return torch.full((64,), index / 1e6), index % 10


def iterator_in_each_step():
    """`next(iter(loader))` shuffles all indices of the data set for a single batch."""
    model, loader = net(64, 1024), DataLoader(Rows(), 16, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(100):
        x, y = next(iter(loader))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class Balanced(Sampler):
    """Draws each batch by weights that it computes anew."""

    def __init__(self, count, batches, size):
        self.weights, self.batches, self.size = torch.rand(count), batches, size

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            yield self.draw()

    def draw(self):
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass
        return torch.multinomial(self.weights, self.size).tolist()


def slow_sampler(workers=1):
    """The sampler runs in the training process, whatever the number of workers."""
    sampler = Balanced(3200, 200, 16)
    model = net(64, 1024)
    loader = DataLoader(rows(), batch_sampler=sampler, num_workers=workers)
    fit(model, torch.optim.SGD(model.parameters(), 0.01), loader)


def slow_sampler_without_workers():
    slow_sampler(0)


class Shards(IterableDataset):
    """Two files, whose samples come from a slow disk."""

    def __iter__(self):
        worker = get_worker_info()
        for _ in range(worker.id, 2, worker.num_workers):
            for sample in range(800):
                time.sleep(0.004)
                yield torch.full((64,), sample / 800), sample % 10


def few_shards():
    """Two of the four workers have no data at all."""
    model = net(64, 256)
    loader = DataLoader(Shards(), 8, num_workers=4)
    for _ in range(3):
        fit(model, torch.optim.SGD(model.parameters(), 0.01), loader)


class Locked(Dataset):
    """A file that all workers read, behind one lock."""

    def __init__(self):
        self.lock = multiprocessing.Lock()

    def __len__(self):
        return 4800

    def __getitem__(self, index):
        with self.lock:
            time.sleep(0.002)
        return torch.full((64,), index / 4800), index % 10


def shared_lock():
    """Four workers read one at a time: more of them gain nothing."""
    loader = DataLoader(Locked(), 16, num_workers=4)
    model = net()
    fit(model, torch.optim.SGD(model.parameters(), 0.01), loader)


class Numbers(Dataset):
    """Samples that are lists of numbers, as a CSV file has them."""

    def __len__(self):
        return 9600

    def __getitem__(self, index):
        return [float(position) for position in range(800)], index % 10


def lists_of_numbers():
    """The loader makes a tensor for each position of the lists, and the loop stacks them."""
    model = net(800)
    optimizer = torch.optim.SGD(model.parameters(), 1e-7)
    for values, labels in DataLoader(Numbers(), 32):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.stack(values, 1).float()), labels).backward()
        optimizer.step()


def mixup_in_collate():
    """Mixes the samples of a batch, one by one, where they are collated."""

    def collate(samples):
        x = torch.stack([sample for sample, _ in samples])
        mixed = torch.stack([blend(row, x[at - 1]) for at, row in enumerate(x)])
        return mixed, torch.tensor([label for _, label in samples])

    model = net(64, 1024)
    data = rows()
    fit(model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(data, 16, collate_fn=collate))


def blend(row, other):
    until = time.perf_counter() + 0.001
    while time.perf_counter() < until:
        pass
    return 0.8 * row + 0.2 * other


def prefetch_thread(make_s=0.03):
    """An own thread makes the batches, and is slower than the training."""
    batches = queue.Queue(maxsize=8)

    def produce():
        for _ in range(150):
            time.sleep(make_s)
            batches.put((torch.randn(16, 64), torch.randint(0, 10, (16,))))
        batches.put(None)

    threading.Thread(target=produce, daemon=True).start()
    model = net(64, 1024)
    optimizer = torch.optim.Adam(model.parameters())
    while (batch := batches.get()) is not None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def prefetch_thread_that_keeps_up():
    prefetch_thread(0.0001)


class Served(IterableDataset):
    """Streams shards from an HTTP server."""

    def __init__(self, url):
        self.url = url

    def __iter__(self):
        for number in range(120):
            x, y = self.download(number)
            yield from zip(x, y, strict=True)

    def download(self, number):
        import urllib.request

        with urllib.request.urlopen(f"{self.url}/{number}", timeout=30) as answer:
            return torch.load(io.BytesIO(answer.read()))


class Recordings(Rows):
    """Comes from a server, sample by sample."""

    def __getitem__(self, index):
        return self.download(index)

    def download(self, index):
        time.sleep(0.005)
        return torch.full((64,), index / 1e6)


def two_loaders(steps=200):
    """A step takes a batch of texts and one of recordings, each made by a worker of its own."""
    model = net(128, 1024)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    texts, recordings = (DataLoader(data, 8, num_workers=1) for data in (Rows(), Recordings()))
    for _, (x, y), sound in zip(range(steps), texts, recordings, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.cat([x, sound], dim=1)), y).backward()
        optimizer.step()


def http_stream():
    """A server that takes 30 ms for each shard of one batch."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(0.03)
            body = io.BytesIO()
            torch.save((torch.randn(16, 64), torch.arange(16) % 10), body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.getvalue())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model = net(64, 1024)
    loader = DataLoader(Served(f"http://127.0.0.1:{server.server_port}"), 16)
    fit(model, torch.optim.Adam(model.parameters()), loader)
    server.shutdown()


# Loops.


def prints_each_step():
    model = net(64, 1024)
    fit(model, torch.optim.Adam(model.parameters()), DataLoader(rows(), 16),
        lambda step, loss: print(f"step {step} loss {loss.item():.4f}", flush=True))  # fmt: skip


def progress_bar():
    from tqdm import tqdm

    model = net(64, 1024)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        with tqdm(DataLoader(rows(), 16), unit="batch") as bar:
            for x, y in bar:
                optimizer.zero_grad()
                output = model(x)
                loss = F.cross_entropy(output, y)
                loss.backward()
                optimizer.step()
                accuracy = (output.argmax(1) == y).float().mean().item()
                bar.set_postfix(loss=loss.item(), accuracy=100.0 * accuracy)


def plots_each_step():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    losses = []

    def plot(_, loss):
        losses.append(loss.item())
        plt.figure()
        plt.plot(losses)
        plt.savefig("losses.png")
        plt.close()

    model = net(64, 1024)
    fit(model, torch.optim.Adam(model.parameters()), DataLoader(rows(960), 16), plot)


def prepares_a_table():
    """Features of each batch by pandas, in the loop."""
    import pandas as pd

    table = pd.DataFrame({f"c{i}": torch.randn(4000).numpy() for i in range(64)})
    table["key"], table["label"] = [i % 50 for i in range(4000)], [i % 10 for i in range(4000)]

    def features(start):
        part = table.iloc[start : start + 64].copy()
        means = table.groupby("key").transform("mean")
        part = part.join(means, rsuffix="_mean").drop(columns=["key", "label_mean"])
        labels = torch.tensor(part.pop("label").to_numpy())
        return torch.tensor(part.to_numpy()[:, :64], dtype=torch.float32), labels

    model = net(64, 1024)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(150):
        x, y = features(step * 16)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def saves_each_10th_step():
    """The last state and the best one, both with the optimizer's."""
    model = net(64, 2048)
    optimizer = torch.optim.Adam(model.parameters())

    def save(step, _):
        if step % 10 == 0:
            for name in ("last.pt", "best.pt"):
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name)

    fit(model, optimizer, DataLoader(rows(), 16), save)


def rewrites_its_log():
    """Reads all rows in each 10th step, and writes them with the new ones."""
    model, log = net(64, 1024, depth=2), io.StringIO("[]")

    def rewrite(step, loss):
        if step % 10 == 9:
            kept = json.loads(log.getvalue())
            kept += [{"step": step, "loss": loss.item()}] * 500
            log.seek(0)
            json.dump(kept, log)

    fit(model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(rows(9600), 16), rewrite)


def registers_a_hook_in_each_step():
    """Each hook stays, and is called in all later steps."""
    model, seen = net(), {}

    def watch(module, inputs, output):
        seen["std"] = output.detach().std()

    def register(step, loss):
        model[0].register_forward_hook(watch)

    fit(model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(rows(24000), 16), register)


class Masked(nn.Module):
    """Makes the same mask in each forward."""

    def __init__(self):
        super().__init__()
        self.net = net(64, 256)

    def mask(self):
        return torch.ones(1200, 1200, dtype=torch.float64).tril().float()

    def forward(self, x):
        return self.net(x) * self.mask()[-1, :10]


def makes_a_mask_in_each_forward():
    model = Masked()
    fit(model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(rows(), 16))


def evaluates_a_loader_each_50_steps():
    model = net(64, 1024)
    held_out = DataLoader(rows(3200), 32)

    def evaluate(step, _):
        if step % 50 == 49:
            model.eval()
            with torch.no_grad():
                sum(F.cross_entropy(model(x), y).item() for x, y in held_out)
            model.train()

    fit(model, torch.optim.Adam(model.parameters()), DataLoader(rows(), 16), evaluate)


def validates_with_gradients():
    """In training mode and without `torch.no_grad()`, on a loader and on the training data."""
    model, loader, held_out = net(64, 1024), DataLoader(rows(1600), 16), DataLoader(rows(6400), 32)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        fit(model, optimizer, loader)
        for data in (loader, held_out):
            sum(F.cross_entropy(model(x), y).item() for x, y in data)


def calls_for_each_sample():
    model = net(64, 512)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x, y in DataLoader(rows(), 16):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(one[None]), label[None]) for one, label in zip(x, y, strict=True)).backward()
        optimizer.step()


def keeps_the_best():
    """Stops early, and copies the best state; the loop is left by `break`."""
    model, best, waits = net(64, 1024), None, 0
    optimizer = torch.optim.Adam(model.parameters())
    training, held_out = DataLoader(rows(), 16, shuffle=True), DataLoader(rows(320), 32)
    for epoch in range(10):
        fit(model, optimizer, training)
        model.eval()
        with torch.no_grad():
            loss = sum(F.cross_entropy(model(x), y).item() for x, y in held_out)
        if best is None or loss < best[0]:
            best, waits = (loss, copy.deepcopy(model.state_dict())), 0
        else:
            waits += 1
        if waits >= 1 or epoch == 2:
            break
    model.load_state_dict(best[1])


def multi_task():
    """Alternates between two tasks with heads of their own; one optimizer steps for each."""
    body, heads = net(64, 1024, 64), nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 1)])
    optimizer = torch.optim.Adam([*body.parameters(), *heads.parameters()])
    for (xa, ya), (xb, _) in zip(DataLoader(rows(1600), 16), DataLoader(rows(1600), 16), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(heads[0](body(xa)), ya).backward()
        optimizer.step()
        optimizer.zero_grad()
        heads[1](body(xb)).square().mean().backward()
        optimizer.step()


# Trainings.


def sweep():
    """Three widths, one after another: steps take longer because the model is larger."""
    for hidden, depth in ((256, 1), (1024, 1), (2048, 2)):
        model = net(64, hidden, depth=depth)
        fit(model, torch.optim.Adam(model.parameters()), DataLoader(rows(6400), 16))


def unfreezes():
    """Trains the head first, then all of the model."""
    model = net(64, 1024, depth=4)
    for layer in model[:-1]:
        layer.requires_grad_(False)
    optimizer = torch.optim.SGD(model[-1].parameters(), 0.01)
    for epoch in range(4):
        if epoch == 2:
            model.requires_grad_(True)
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
        fit(model, optimizer, DataLoader(rows(1600), 16))


def longer_sequences():
    """A curriculum: sequences of 32, 64, then 128."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2)
    optimizer = torch.optim.Adam(model.parameters())
    for length in (32, 64, 128):
        for _ in range(150):
            optimizer.zero_grad()
            model(torch.randn(8, length, 64)).square().mean().backward()
            optimizer.step()


def anomaly_detection():
    """Left on after a search for a NaN."""
    with torch.autograd.set_detect_anomaly(True):
        model = net(64, 512, depth=4)
        fit(model, torch.optim.Adam(model.parameters()), DataLoader(rows(), 16))


def averages_weights():
    """Stochastic weight averaging, with batch normalization updated at the end."""
    model = nn.Sequential(nn.Linear(64, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 10))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    schedule = torch.optim.swa_utils.SWALR(optimizer, 0.005)
    loader = DataLoader(rows(), 16)
    for _ in range(3):
        fit(model, optimizer, loader)
        averaged.update_parameters(model)
        schedule.step()
    torch.optim.swa_utils.update_bn(loader, averaged)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
