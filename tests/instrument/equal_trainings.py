"""Trainings that must be the same with tracing and without: each returns everything that tracing could change.

A training takes a seed from its name, trains a few steps and returns losses, a hash of the weights, and what its own
hooks saw. What it leaves in `kept` is looked at after `shutdown`.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

STEPS = 6
kept: list[Any] = []


class Net(nn.Module):
    """Two layers, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.first(x).relu()))


class Branches(Net):
    """One of its layers takes part in every other step only."""

    def __init__(self) -> None:
        super().__init__()
        self.rare, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        found = super().forward(x)
        return self.rare(found) if self.calls % 2 else found


class Checkpointed(Net):
    """Computes its first layer again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda y: self.drop(self.first(y).relu()), x.requires_grad_(), use_reentrant=self.reentrant)
        return self.second(hidden)


def batches(shape: tuple[int, ...] = (8,)) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4 * STEPS, *shape)), batch_size=4, shuffle=True)


def hash_of(*values: torch.Tensor) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(getattr(value, "full_tensor", lambda value=value: value)().detach().float().numpy().tobytes())

    return found.hexdigest()


def train(
    model: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    of: nn.Module | None = None,
    shape: tuple[int, ...] = (8,),
) -> list[Any]:
    """Train as most scripts do; return losses and weights."""
    module = of if of is not None else model
    kept.extend((module, optimizer))
    found: list[Any] = []
    for (x,) in batches(shape):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())

    return [*found, *state(module)]


def state(module: Any) -> list[str]:
    return [hash_of(*module.parameters(), *module.buffers()), hash_of(torch.get_rng_state())]


def with_optimizer(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[], list[Any]]:
    def training() -> list[Any]:
        model = Net()
        return train(model, make(model.parameters(), lr=0.01, **options))

    return training


def lbfgs() -> list[Any]:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    kept.extend((model, optimizer))
    found: list[Any] = []
    for (x,) in batches():

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            found.append(loss.item())
            return loss

        found.append(optimizer.step(closure).item())

    return found + state(model)


def amp() -> list[Any]:
    model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
    optimizer = torch.optim.AdamW(model.parameters())
    kept.extend((model, optimizer, scaler))
    found: list[Any] = []
    for (x,) in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()

        scaler.scale(loss.float() * 1e30).backward()  # overflows at first: the scaler leaves steps out
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        found += [loss.item(), scaler.get_scale()]

    return found + state(model)


def checkpointed(*, reentrant: bool) -> Callable[[], list[Any]]:
    def training() -> list[Any]:
        model = Checkpointed(reentrant=reentrant)
        return train(model, torch.optim.SGD(model.parameters(), lr=0.1))

    return training


def channels_last() -> list[Any]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    model.to(memory_format=torch.channels_last)
    found = train(
        lambda x: model(x.to(memory_format=torch.channels_last)),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), of=model, shape=(3, 8, 8),
    )  # fmt: skip
    return [*found, model[0].weight.is_contiguous(memory_format=torch.channels_last)]


def compiled(form: str) -> Callable[[], list[Any]]:
    def training() -> list[Any]:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if form == "module":
            call = torch.compile(model, backend="aot_eager")
        elif form == "in place":
            model.compile(backend="aot_eager")
            call = model
        else:
            call = torch.compile(lambda x: model(x).square(), backend="aot_eager")

        return train(call, optimizer, of=model)

    return training


def users_hooks() -> list[Any]:
    model, seen = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def note(name: str) -> Callable[..., None]:
        return lambda *values, **_: seen.append((name, len(values)))

    model.register_forward_pre_hook(note("forward_pre"), with_kwargs=True)
    model.register_forward_hook(note("forward"), always_call=True)
    model.register_forward_hook(lambda _module, _inputs, output: output * 1.5, prepend=True)
    model.first.register_full_backward_pre_hook(note("backward_pre"))
    model.first.register_full_backward_hook(note("backward"))
    model.second.weight.register_hook(lambda gradient: gradient * 0.5)
    model.second.bias.register_post_accumulate_grad_hook(note("accumulated"))
    model.register_state_dict_pre_hook(note("state_dict_pre"))
    optimizer.register_step_pre_hook(note("step_pre"))
    optimizer.register_step_post_hook(note("step_post"))
    found = train(model, optimizer)
    return [*found, *model.state_dict(), *seen]


def copied_and_pickled() -> list[Any]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = train(model, optimizer)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    found += [(sorted(vars(each)), type(each) is Net) for each in copies]  # now: training them finds all of them
    for each in copies:
        found += train(each, torch.optim.SGD(each.parameters(), lr=0.1))

    again = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return found + train(model, again)


def evaluates() -> list[Any]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    found = []
    for _ in range(2):
        found += train(model, optimizer)
        averaged.update_parameters(model)
        model.eval()
        with torch.no_grad():
            found += [model(x).sum().item() for (x,) in batches()]

        model.train()

    return found + state(averaged)


def raises_in_backward() -> list[Any]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[Any] = []
    for index, (x,) in enumerate(batches()):
        output = model(x)
        if index == 2:
            output.register_hook(_raise)

        try:
            output.square().mean().backward()
            optimizer.step()
        except RuntimeError as error:
            found.append(str(error))

    return found + state(model)


def _raise(_gradient: torch.Tensor) -> None:
    raise RuntimeError("of the user")


def ddp(model: Callable[[], nn.Module] = Net, *, micro: int = 1, **options: Any) -> Callable[[], list[Any]]:
    def training() -> list[Any]:
        parallel = nn.parallel.DistributedDataParallel(model(), **options)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        if micro == 1:
            return train(parallel, optimizer)

        kept.extend((parallel, optimizer))
        found: list[Any] = []
        for (x,) in batches():
            with parallel.no_sync():
                parallel(x).square().mean().backward()

            loss = parallel(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())

        return found + state(parallel)

    return training


def zero() -> list[Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    parallel = nn.parallel.DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), optimizer_class=torch.optim.AdamW, lr=0.01)
    return train(parallel, optimizer)


def fsdp2() -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    for layer in (model.first, model.second, model):
        fully_shard(layer)

    found = train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    return [*found, type(model).__name__]


ON_ONE_RANK: dict[str, Callable[[], list[Any]]] = {
    "sgd_foreach": with_optimizer(torch.optim.SGD, momentum=0.9, foreach=True),
    "sgd_fused": with_optimizer(torch.optim.SGD, momentum=0.9, fused=True),
    "adamw_foreach": with_optimizer(torch.optim.AdamW, foreach=True),
    "adamw_fused": with_optimizer(torch.optim.AdamW, fused=True),
    "lbfgs": lbfgs,
    "amp": amp,
    "checkpoint_reentrant": checkpointed(reentrant=True),
    "checkpoint": checkpointed(reentrant=False),
    "channels_last": channels_last,
    "compiled_module": compiled("module"),
    "compiled_in_place": compiled("in place"),
    "compiled_function": compiled("function"),
    "users_hooks": users_hooks,
    "copied_and_pickled": copied_and_pickled,
    "evaluates": evaluates,
    "raises_in_backward": raises_in_backward,
}
ON_TWO_RANKS: dict[str, Callable[[], list[Any]]] = {
    "ddp_static_graph": ddp(static_graph=True),
    "ddp_unused_parameters": ddp(Branches, find_unused_parameters=True),
    "ddp_accumulates": ddp(micro=2, gradient_as_bucket_view=True),
    "zero": zero,
    "fsdp2": fsdp2,
}


def results(trainings: dict[str, Callable[[], list[Any]]]) -> dict[str, list[Any]]:
    """Run trainings, each from the same state of the random numbers."""
    found = {}
    for number, (name, training) in enumerate(trainings.items()):
        torch.manual_seed(number + 100 * (dist.get_rank() if dist.is_initialized() else 0))
        found[name] = training()

    return found
