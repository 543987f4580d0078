"""Facts about the loaders, models and optimizers of the script."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

from traceml.inspection.thread_frames import stack_frames
from traceml.inspection.user_files import is_user_file
from traceml.instrument.facts.instance_attributes import attribute_values, instance_attribute, named_attributes

__all__ = [
    "batch_size_facts",
    "first_parameter",
    "input_facts",
    "loader_facts",
    "model_facts",
    "optimizer_facts",
    "param_groups",
]

_WRAPPERS = {"DistributedDataParallel": "ddp", "DataParallel": "dp", "FullyShardedDataParallel": "fsdp"}
_GROUP_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
_TOKEN_TYPES = ("torch.int64", "torch.int32")
_SEQUENCES = (2, 3)  # dimensions of a batch of sequences, of numbers and of vectors
_HUGGING_FACE = ("transformers.", "sentence_transformers.", "trl.")  # trainers that take TrainingArguments
_FASTAI = "fastai.data.load"
_OF_SAMPLERS = ("torch", "builtins", "abc", "collections", "typing")  # modules of torch's samplers and of base classes
_WORKER_INFO = "get_worker_info"
_RESHARDING = ("FULL_SHARD", "HYBRID_SHARD")  # strategies of FullyShardedDataParallel
_MAX_RANKS = 256
_MANY_OBJECTS = 10_000
_CONTAINERS = (list, tuple, dict, set)
_MAX_CONTAINERS = 4
_MAX_PARTS = 16
_MAX_CORES = 256
_MAX_VALUES = 1024  # of a batch


def loader_facts(loader: Any) -> dict[str, Any]:
    """Describe a DataLoader, or an iterable given to `trace_data`."""
    own = loader.d if type(loader).__module__ == _FASTAI else loader  # of theirs, the inner one is its own data set
    dataset = getattr(own, "dataset", None)
    is_iterable = any(cls.__name__ == "IterableDataset" for cls in type(dataset).__mro__)
    return {
        "loader": type(own).__name__,
        "dataset": None if dataset is None else type(_whole(dataset)).__name__,
        "length": _length(dataset),
        "in_memory": _in_memory(dataset),
        "num_workers": getattr(loader, "num_workers", None),
        "batch_size": getattr(own, "batch_size", getattr(own, "bs", None)),
        "drop_last": getattr(own, "drop_last", None),
        "pin_memory": getattr(loader, "pin_memory", None),
        "persistent_workers": getattr(loader, "persistent_workers", None),
        "prefetch_factor": getattr(loader, "prefetch_factor", None),
        "in_order": getattr(loader, "in_order", None),
        "start_method": start_method(loader),
        "objects": held_objects(dataset),
        "samplers": _sampler_classes(own),
        "is_iterable": is_iterable,
        "is_undivided": is_iterable and _is_undivided(own, dataset),
        "trainer": _trainer_above(sys._getframe(1)) if own is loader else "fastai",
    }


def _is_undivided(loader: Any, dataset: Any) -> bool:
    """Return whether the script's code does not ask which worker runs an iterable data set.

    That is the code of its class, functions that this calls, and `worker_init_fn`, in which a script may divide it.
    """
    functions = [getattr(each, "__func__", each) for cls in type(dataset).__mro__ for each in vars(cls).values()]
    own = [each for each in functions if (code := getattr(each, "__code__", None)) and is_user_file(code.co_filename)]
    if not any(each.__code__.co_name == "__iter__" for each in own):
        return False

    return not any(map(_asks_for_worker, own)) and not _may_divide(getattr(loader, "worker_init_fn", None))


def _asks_for_worker(function: Any) -> bool:
    """Return whether a function, or one that it calls by a global name, calls `get_worker_info`."""
    names = _names_in(function.__code__)
    called = [each for name in names if callable(each := function.__globals__.get(name))]
    return (
        _WORKER_INFO in names
        or any(getattr(each, "__name__", "") == _WORKER_INFO for each in called)
        or any(_WORKER_INFO in _names_in(each.__code__) for each in called if isinstance(each, FunctionType))
    )


def _names_in(code: CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _may_divide(function: Any) -> bool:
    """Return whether a `worker_init_fn` may divide the data: one of a library that only sets seeds does not."""
    function = getattr(function, "func", function)  # of a partial
    if not isinstance(function, FunctionType):
        return function is not None

    return is_user_file(function.__code__.co_filename) or _asks_for_worker(function)


def _sampler_classes(loader: Any) -> list[str]:
    """Return the classes that choose samples and are not torch's, as qualified names of their functions have them."""
    outer = [instance_attribute(loader, name) for name in ("batch_sampler", "sampler")]
    inner = [instance_attribute(each, "sampler") for each in outer]
    classes = {cls for each in (*outer, *inner) for cls in type(each).__mro__}
    return sorted(cls.__qualname__ for cls in classes if cls.__module__.partition(".")[0] not in _OF_SAMPLERS)


def batch_size_facts(batch: Any) -> dict[str, int]:
    """Count the tensors of a batch and their bytes, and arrays like them, in nested containers."""
    tensors = size = 0
    todo = [batch]
    for _ in range(_MAX_VALUES):
        if not todo:
            break

        value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value[:_MAX_VALUES]
        elif isinstance(nbytes := getattr(value, "nbytes", None), int):
            tensors, size = tensors + 1, size + nbytes

    return {"tensors": tensors, "bytes": size}


def _trainer_above(frame: Any) -> str | None:
    """Return the framework whose trainer runs and makes loaders from its own arguments; None without one.

    A subclass of a script that makes them itself takes the arguments of DataLoader.

    Args:
        frame: the innermost frame, in which a loader begins.
    """
    for each in stack_frames(frame):
        if each.f_globals.get("__name__") == "transformers.trainer":
            makes = getattr(type(each.f_locals.get("self")), "get_train_dataloader", None)
            if makes is not None:
                return "transformers" if makes.__module__.startswith(_HUGGING_FACE) else None

    return None


def model_facts(module: Any) -> dict[str, Any]:
    """Describe a timed model."""
    inner = module
    wrapped = None
    while True:  # OptimizedModule(DistributedDataParallel(model)) and the like, in any order
        name = type(inner).__name__
        wrapped = wrapped or _WRAPPERS.get(name)
        below = dict(vars(inner).get("_modules", {}).items())  # a scripted module's is no dict
        child = below.get("_orig_mod") or (below.get("module") if name in _WRAPPERS else None)
        if child is None:
            break

        inner = child

    if wrapped is None and type(inner).__name__.startswith("FSDP"):
        wrapped = "fsdp2"

    torch: Any = sys.modules["torch"]
    parameters = [each for each in module.parameters() if not torch.nn.parameter.is_lazy(each)]
    return {
        "model": inner.original_name if isinstance(inner, torch.jit.ScriptModule) else type(inner).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "dense_embeddings": _dense_embeddings(module),
        "device": str(parameters[0].device) if parameters else None,
        "dtype": str(parameters[0].dtype) if parameters else None,
        "torch_threads": torch.get_num_threads(),
        "bound_cores": _bound_cores(),
        "compiled": any(_is_compiled(each) for each in module.modules()),
        "parallel": wrapped or next(("dtensor" for each in parameters if type(each.data).__name__ == "DTensor"), None),
        "reshards": _reshards(module),
        **_gradient_group(module),
    }


def _is_compiled(module: Any) -> bool:
    """Return whether a module is compiled: by `torch.compile` of it or of its `forward`, or by its own `compile()`."""
    slot = vars(module).get("_compiled_call_impl")
    in_place = slot.timed.inner if hasattr(slot, "timed") else slot
    forward = getattr(module, "forward", None)
    is_left_out = getattr(forward, "_torchdynamo_disable", False)  # torch.compiler.disable leaves the same mark
    return in_place is not None or (hasattr(forward, "_torchdynamo_orig_callable") and not is_left_out)


def _bound_cores() -> list[int] | None:
    """Return the cores on which the thread that trains may run; None where it may run on all, or on many."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed if len(allowed) < min(os.cpu_count() or 1, _MAX_CORES) else None


def _dense_embeddings(module: Any) -> int:
    """Return the number of trained parameters in embeddings with dense gradients that could have sparse ones.

    A table that is an output layer's weight, too, as many language models have it, gets gradients for all rows; where
    a function uses it as such, the modules do not show it.
    """
    torch: Any = sys.modules["torch"]
    tables: dict[int, int] = {}
    users: Counter[int] = Counter()
    for each in module.modules():
        weights = dict(each._parameters.items())
        for weight in weights.values():
            users[id(weight)] += 1

        weight = weights.get("weight")
        is_table = isinstance(each, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and not each.sparse
        has_sparse_form = is_table and not each.scale_grad_by_freq and getattr(each, "mode", "") != "max"
        if has_sparse_form and weight is not None and weight.requires_grad:
            tables[id(weight)] = weight.numel()

    return sum(count for weight, count in tables.items() if users[weight] == 1)


def _gradient_group(module: Any) -> dict[str, Any]:
    """Describe the ranks that average their gradients: how many they are, which, if they are not all, and the hook."""
    distributed = sys.modules.get("torch.distributed")
    wrapper = next((each for each in module.modules() if type(each).__name__ in _GROUP_WRAPPERS), None)
    group = getattr(wrapper, "process_group", None)
    ranks = _sharding_ranks(module) if group is None or not distributed else distributed.get_process_group_ranks(group)
    if not ranks or distributed is None:
        return {}

    some = len(ranks) < distributed.get_world_size() and len(ranks) <= _MAX_RANKS
    hook, _ = next(iter(getattr(wrapper, "_comm_hooks", ())), (None, None))
    return {
        "gradient_size": len(ranks),
        "gradient_ranks": sorted(ranks) if some else None,
        "comm_hook": None if hook is None else getattr(hook, "__qualname__", type(hook).__qualname__),
    }


def _sharding_ranks(module: Any) -> list[int]:
    """Return the ranks of the largest mesh over which `fully_shard` averages gradients; empty without it."""
    return max((mesh for each in _sharding_states(module) for mesh in _meshes(each)), key=len, default=[])


def _sharding_states(module: Any) -> list[Any]:
    """Return what `fully_shard` keeps of a model and its modules, the outermost first."""
    return [each._get_fsdp_state() for each in module.modules() if hasattr(type(each), "_get_fsdp_state")]


def _parameter_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of one module: torch 2.13 has several, earlier ones one."""
    return getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]


def _meshes(state: Any) -> list[list[int]]:
    """Return the ranks of the meshes of one module."""
    meshes = (getattr(getattr(group, "mesh_info", None), "mesh", None) for group in _parameter_groups(state))
    return [mesh.mesh.flatten().tolist() for mesh in meshes if mesh is not None]


def _reshards(module: Any) -> bool | None:
    """Return whether parts of a sharded model give their parameters up after forward; None if it is not sharded."""
    of_wrappers = [
        getattr(each.sharding_strategy, "name", None) in _RESHARDING
        for each in module.modules()
        if type(each).__name__ == "FullyShardedDataParallel"
    ]
    states = _sharding_states(module)
    # By default the outermost module keeps them, which torch decides in the first call.
    kept = states[:1] if states and getattr(states[0], "_auto_reshard_after_forward", False) else []
    of_states = [
        getattr(group, "post_forward_mesh_info", None) is not None
        for state in states[len(kept) :]
        for group in _parameter_groups(state)
    ]
    return any(of_wrappers + of_states) if of_wrappers or states else None


def input_facts(
    tensor: Any, model: Any = None, batch_size: int | None = None, *, is_listed: bool = False
) -> dict[str, Any]:
    """Describe the input of the model.

    Args:
        model: the called model, None if unknown.
        batch_size: of the loader, None without one.
        is_listed: whether the tensor is one of a list, of samples or of batches.
    """
    may_be_other = is_listed or _may_be_sequence_first(tensor, model)
    return {
        "dtype": str(tensor.dtype),
        "dimensions": tensor.dim(),
        "requires_grad": tensor.requires_grad,
        "tokens": _are_tokens(tensor, model),
        "batch_first": not may_be_other or batch_size == int(tensor.shape[0]),
        "autocast": _is_under_autocast(tensor.device.type),
        "tf32": _uses_tf32(model),
    }


def _is_under_autocast(device_type: str) -> bool:
    torch: Any = sys.modules["torch"]
    try:
        return bool(torch.is_autocast_enabled(device_type))
    except RuntimeError:  # a type without autocast
        return False


def _uses_tf32(model: Any | None) -> bool:
    """Return whether CUDA may compute with values of 32 bits in TF32, as convolutions do unless that is turned off."""
    torch: Any = sys.modules["torch"]
    convolution = torch.nn.modules.conv._ConvNd
    convolves = model is not None and any(isinstance(module, convolution) for module in model.modules())
    part = getattr(torch.backends.cudnn, "conv", None) if convolves else torch.backends.cuda.matmul
    if (precision := getattr(part, "fp32_precision", None)) is not None:  # since torch 2.9, which may reject the others
        return bool(precision == "tf32")

    return bool(torch.backends.cudnn.allow_tf32 if convolves else torch.backends.cuda.matmul.allow_tf32)


def _may_be_sequence_first(tensor: Any, model: Any) -> bool:
    """Return whether a tensor's first dimension may count positions: torch's RNNs and transformers take these first."""
    if tensor.dim() not in _SEQUENCES or model is None:
        return False

    return any(getattr(module, "batch_first", None) is False for module in model.modules())


def _are_tokens(tensor: Any, model: Any) -> bool:
    """Return whether a tensor has integers by sample and position, which the model looks up in an embedding.

    Columns of a table are integers too. A model for tables has no embedding, or about one for each column.
    """
    if tensor.dim() != 2 or str(tensor.dtype) not in _TOKEN_TYPES or tensor.shape[1] < 2 or model is None:
        return False

    leaves = (module for module in model.modules() if not any(True for _ in module.children()))
    embeddings = sum(type(leaf).__name__.endswith("Embedding") for leaf in leaves)
    return 0 < embeddings < int(tensor.shape[1])


def optimizer_facts(optimizer: Any) -> dict[str, Any]:
    """Describe an optimizer that has stepped."""
    groups = param_groups(optimizer)
    first = groups[0] if groups else {}
    return {
        "optimizer": type(optimizer).__name__,
        "groups": len(groups),
        "tensors": sum(len(group["params"]) for group in groups),
        "lr": first.get("lr") if isinstance(first.get("lr"), float) else None,
        "fused": bool(first["fused"]) if "fused" in first else None,  # None: it has no fused form
        "foreach": first.get("foreach"),
        "history_bytes": _history_bytes(groups) or None,
    }


def _history_bytes(groups: list[dict[str, Any]]) -> int:
    """Return the most bytes that an optimizer keeps of past steps: L-BFGS two tensors for each of `history_size`."""
    return sum(
        2 * group["history_size"] * parameter.numel() * parameter.element_size()
        for group in groups
        if isinstance(group.get("history_size"), int)
        for parameter in group["params"]
    )


def first_parameter(optimizer: Any) -> Any:
    """Return a parameter of an optimizer; None if it is not torch's, or has none."""
    return next((each for group in param_groups(optimizer) for each in group["params"]), None)


def param_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the optimizer's groups of parameters; empty if it is not torch's and has others."""
    groups = getattr(optimizer, "param_groups", None)
    known = isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)
    return groups if known else []  # type: ignore[return-value]


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except Exception:  # noqa: BLE001 - the dataset's own code: it has no length
        return None


def start_method(loader: Any) -> str | None:
    """Return how the loader starts its workers (fork, spawn, forkserver); None without any."""
    if not getattr(loader, "num_workers", 0):
        return None

    context = getattr(loader, "multiprocessing_context", None)
    if context is not None:
        return str(context.get_start_method())

    from multiprocessing import get_all_start_methods, get_start_method

    return get_start_method(allow_none=True) or get_all_start_methods()[0]  # else asking for it would set it


def held_objects(dataset: Any) -> list[dict[str, Any]]:
    """Return the data set's containers of many Python objects: attribute, type, number, and type of one object.

    A forked worker that only reads such an object writes its reference count, which copies its page.
    """
    found: list[dict[str, Any]] = []
    for part in _parts_of(dataset):
        for name, value in named_attributes(part, _is_large):
            one = next(iter(value.values() if isinstance(value, dict) else value))
            path, container = f"{type(part).__name__}.{name}", type(value).__name__
            found.append({"path": path, "type": container, "count": len(value), "of": type(one).__name__})

    return sorted(found, key=lambda each: -each["count"])[:_MAX_CONTAINERS]


def _is_large(value: Any) -> bool:
    return type(value) in _CONTAINERS and len(value) >= _MANY_OBJECTS


def _parts_of(dataset: Any) -> list[Any]:
    """Return a data set and those that it wraps (Subset, ConcatDataset)."""
    parts = [dataset]
    for part in parts:
        inner, wrapped = instance_attribute(part, "datasets"), instance_attribute(part, "dataset")
        parts += [wrapped] if wrapped is not None else []
        parts += list(inner)[:_MAX_PARTS] if isinstance(inner, list | tuple) else []
        if len(parts) >= _MAX_PARTS:
            break

    return parts[:_MAX_PARTS]


def _whole(dataset: Any) -> Any:
    """Return the data set that a part was taken from, as those of `random_split` are."""
    while type(dataset).__name__ in ("Subset", "Dataset") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset

    return dataset


def _in_memory(dataset: Any) -> bool | None:
    """Whether samples are slices of arrays in memory, so that more workers would not help; None if unknown."""
    if dataset is None:
        return None

    torch: Any = sys.modules.get("torch")
    numpy: Any = sys.modules.get("numpy")
    arrays = tuple(cls for cls in (getattr(torch, "Tensor", None), getattr(numpy, "ndarray", None)) if cls)
    dataset = _whole(dataset)
    if type(dataset).__name__ == "TensorDataset":
        return True

    held = any(
        isinstance(value, arrays) and len(getattr(value, "shape", ())) > 0 for value in attribute_values(dataset)
    )
    return True if held else None
