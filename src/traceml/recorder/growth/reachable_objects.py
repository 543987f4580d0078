"""Containers that the script's variables reach, with their sizes: read briefly by another thread.

Only variables of the training thread's frames in the user's code, globals of these files and of the user's modules that
they use, and attributes a few levels below are visited, and pyplot's figures, for some milliseconds at most. Nothing is
kept but counts.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

from traceml.clock import own_time as time
from traceml.inspection.thread_frames import stack_frames
from traceml.inspection.user_files import is_user_file
from traceml.instrument.facts.instance_attributes import attribute_values, named_attributes
from traceml.privacy import secrets_only
from traceml.recorder.growth.library_holders import (
    FIGURES,
    PARAMETER_GROUPS,
    group_bytes,
    holders_of,
    is_tensor,
    pixel_bytes,
    pyplot_figures,
    tensors_of,
)

__all__ = ["ReachableObjects", "read_containers"]

BUDGET_NS = 8_000_000
"""CPU time after which a reading ends."""
_MAX_VISITED = 4000
_ALWAYS_VISITED = 256  # variables that are visited also when a collection takes all of the time
_MAX_DEPTH = 4
_MAX_FIELDS = 64
_MAX_OF_MODULES = 256  # variables of modules of which no code runs
_MAX_FRAMES, _MAX_STACK = 20, 220  # of the user's code, and of all: pyplot saves a figure 30 calls deep
MAX_CHAIN = 8000
"""Operations of a graph that are followed."""
_MAX_PATH = 80
_MAX_LISTED = 50_000  # results of a cached function that are listed to find the newest
_LEAST = 8  # smaller containers are not counted, unless their elements are large
_LARGE_BYTES = 1 << 20
_POINTER_BYTES = 8  # what an element takes that is in a list twice
_MIN_COPIED_BYTES = 4 << 20  # nor smaller arrays, of which a script has many
_CO_OPTIMIZED = 0x1  # inspect.CO_OPTIMIZED: the code of a function
_HAS_LOCALS_DICT = sys.version_info < (3, 13)  # `f_locals` updates one dict per frame, which `locals()` returns, too
_OWN_REFERENCES = 3  # to that dict: the frame's, ours, and the argument of `getrefcount`
_LISTS = (list, deque, tuple)
_NOT_ENTERED = (str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, FrameType)


class ReachableObjects(NamedTuple):
    """A container, or a tensor with its graph, that a variable reaches.

    Attributes:
        path: expression that reaches it: `losses`, `self.history`, `metrics['loss']`.
        file, function: the code whose variable the path begins with.
        kind: its type; `graph` for a tensor, `lru_cache` for a cached function, or a kind of `library_holders`.
        size: its elements, or the operations in the graph.
        item: type of its newest element.
        item_bytes: size of that, as far as it is known without walking far.
        holds_graph: whether the element is a tensor that holds the graph of its computation.
        of_dataset: whether a data set holds it.
        is_copied: whether it can only grow by a copy: an array, a table, a text.
        max_size: elements that it holds at most: `maxlen` of a deque, `maxsize` of a cached function; 0 for no bound.
    """

    path: str
    file: str
    function: str
    kind: str
    size: int
    item: str
    item_bytes: int
    holds_graph: bool
    of_dataset: bool
    is_copied: bool = False
    max_size: int = 0


class _Place(NamedTuple):
    value: Any
    path: str
    depth: int
    frame: FrameType
    of_dataset: bool
    kind: str = ""
    function: str = ""  # whose variable it is, if not that of the frame's code
    file: str = ""  # the same
    owner: Any = None  # the optimizer whose parameter groups it is


def read_containers(
    frame: FrameType | None, is_user: Callable[[FrameType], bool]
) -> dict[tuple[str, int], ReachableObjects]:
    """Return the containers that the user's frames reach: by identity, a tensor with its graph by path."""
    until = time.thread_time_ns() + BUDGET_NS
    found: dict[tuple[str, int], ReachableObjects] = {}
    places = deque(_roots(frame, is_user))
    seen: set[int] = set()
    while places and len(seen) < _MAX_VISITED and (len(seen) < _ALWAYS_VISITED or time.thread_time_ns() < until):
        place = places.popleft()
        if id(place.value) in seen:
            continue

        seen.add(id(place.value))
        try:
            held = _reachable(place)
            if held is not None:
                # A sum of losses is another tensor in each step. The path to a container depends on the open frames.
                is_other = held.kind == "graph" or held.is_copied
                found[(place.path, 0) if is_other else ("", id(place.value))] = held

            if place.depth < _MAX_DEPTH:
                places.extend(_inside(place))
        except Exception:  # noqa: BLE001, S112 - code of the user's classes, or a container that changes meanwhile
            continue

    return found


def _roots(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> Iterator[_Place]:
    files: set[str] = set()
    names: set[str] = set()
    figures = pyplot_figures()
    for user in islice(filter(is_user, stack_frames(frame, _MAX_STACK)), _MAX_FRAMES):
        if figures is not None and not files:
            yield _Place(figures.value, figures.path, _MAX_DEPTH, user, of_dataset=False, kind=figures.kind)

        for name, value in _variables(user).items():
            names.add(_module_name(value))
            yield _Place(value, name, 0, user, of_dataset=False)

        if user.f_code.co_filename not in files:
            files.add(user.f_code.co_filename)
            for name, value in list(user.f_globals.items()):
                if not name.startswith("__"):
                    names.add(_module_name(value))
                    yield _Place(value, name, 0, user, of_dataset=False, function="<module>")

            yield from _of_classes(user.f_globals, _Place(None, "", 0, user, of_dataset=False, function="<module>"))

    if frame is not None:
        yield from islice(_of_modules(names, files, frame), _MAX_OF_MODULES)


def _of_modules(names: Collection[str], files: set[str], frame: FrameType) -> Iterator[_Place]:
    """Yield the globals of the user's modules of which variables come, and of those that these use.

    Args:
        names: of modules.
        files: those whose globals are known.
    """
    pending, seen = deque(sorted(names)), set(names)
    while pending:
        module = sys.modules.get(pending.popleft())
        file = vars(module).get("__file__") if _is_of(module, ModuleType) else None
        if not isinstance(file, str) or file in files or not is_user_file(file):
            continue

        files.add(file)
        place = _Place(None, "", 0, frame, of_dataset=False, function="<module>", file=file)
        for name, value in list(vars(module).items()):
            if (used := _module_name(value)) not in seen:
                seen.add(used)
                pending.append(used)

            if not _is_of(value, _NOT_ENTERED) and not name.startswith("__"):
                yield place._replace(value=value, path=name)

        yield from _of_classes(vars(module), place)


def _of_classes(variables: Mapping[str, Any], place: _Place) -> Iterator[_Place]:
    """Yield the containers that classes of a module hold, for all of their objects."""
    for name, cls in list(variables.items()):
        if _is_of(cls, type) and vars(cls).get("__module__") == variables.get("__name__"):
            for attribute, value in list(vars(cls).items()):
                if _is_of(value, (dict, set, *_LISTS)) and not attribute.startswith("__"):
                    yield place._replace(value=value, path=f"{name}.{attribute}")


def _module_name(value: Any) -> str:
    """Return the name of the module that a variable is, or that has its function or class."""
    if _is_of(value, ModuleType):
        return str(vars(value).get("__name__"))

    name = getattr(value if _is_of(value, (FunctionType, type)) else type(value), "__module__", None)
    return name if isinstance(name, str) else ""


def _is_of(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether an object is of a type, without code of the object: it may be a proxy of another."""
    return issubclass(type(value), kinds)


def _variables(frame: FrameType) -> dict[str, Any]:
    """Return the local variables, and leave no reference to them behind."""
    code = frame.f_code
    if not code.co_flags & _CO_OPTIMIZED:
        return {}  # a module's are its globals

    if frame.f_trace is not None:  # a debugger may write its copy back
        return {}

    if _HAS_LOCALS_DICT and _calls_locals(code):  # later variables would appear in the dict that it may keep
        return {}

    values = frame.f_locals
    found = dict(values)
    if _HAS_LOCALS_DICT and sys.getrefcount(values) <= _OWN_REFERENCES:  # else another function has it
        values.clear()  # the frame would keep it to its end

    return found


def _calls_locals(code: CodeType) -> bool:
    return "locals" in code.co_names and any(
        each.opname == "LOAD_GLOBAL" and each.argval == "locals" for each in dis.get_instructions(code)
    )


def _reachable(place: _Place) -> ReachableObjects | None:
    value, kind = place.value, type(place.value).__name__
    if is_tensor(value):
        length = _chain(value)
        return _entry(place, "graph", length, value) if length >= _LEAST else _copied(place)

    if isinstance(value, (dict, set, *_LISTS)):
        count = len(value)
        if not count or type(value) is tuple:
            return None

        newest = _newest(value)
        if count < _LEAST and not (count > 1 and _is_large(newest)):
            return None

        is_there_twice = isinstance(value, _LISTS) and value[-2] is newest
        entry = _entry(place, kind, count, newest)
        return entry._replace(item_bytes=_POINTER_BYTES) if is_there_twice else entry

    info = getattr(value, "cache_info", None) if callable(value) and hasattr(type(value), "cache_info") else None
    return _copied(place) if info is None else _cached(place, info())


def _cached(place: _Place, info: Any) -> ReachableObjects:
    """Return the results that a cached function keeps."""
    entry = _entry(place, "lru_cache", int(info.currsize), _newest_cached(place.value))
    return entry._replace(max_size=int(info.maxsize or 0))


def _copied(place: _Place) -> ReachableObjects | None:
    """Return a large array, table or text, whose elements have one size; None of anything else."""
    count, total_bytes = _extent(place.value)
    if count < _LEAST or total_bytes < _MIN_COPIED_BYTES:
        return None

    entry = _entry(place, type(place.value).__name__, count, None)
    return entry._replace(item_bytes=max(total_bytes // count, 1), is_copied=True)


def _extent(value: Any) -> tuple[int, int]:
    """Return the elements of an array or text, or the rows of a table, and all their bytes; 0 of anything else."""
    if isinstance(value, (str, bytes, bytearray)):
        return len(value), sys.getsizeof(value)

    if is_tensor(value):
        return int(value.numel()), int(value.numel() * value.element_size())

    library = type(value).__module__.partition(".")[0]
    if library == "numpy" and hasattr(value, "nbytes"):
        return int(value.size), int(value.nbytes)

    if library == "pandas" and hasattr(value, "memory_usage"):
        used = value.memory_usage(index=False)
        return len(value), int(used.sum() if hasattr(used, "sum") else used)

    return 0, 0


def _entry(place: _Place, kind: str, count: int, item: Any) -> ReachableObjects:
    code = place.frame.f_code
    path = secrets_only().mask_text(place.path[:_MAX_PATH])
    kind = place.kind or kind
    return ReachableObjects(
        path,
        place.file or code.co_filename,
        place.function or code.co_name,
        kind,
        count,
        type(item).__name__,
        _item_bytes(place, item),
        _holds_graph(item),
        place.of_dataset,
        max_size=(place.value.maxlen or 0) if isinstance(place.value, deque) else 0,
    )


def _item_bytes(place: _Place, item: Any) -> int:
    if place.kind == PARAMETER_GROUPS:
        return group_bytes(place.owner)

    return pixel_bytes(item) if place.kind == FIGURES else _size(item)


def _newest(value: Any) -> Any:
    if isinstance(value, dict):
        return next(reversed(value.values()), None)

    return next(iter(value), None) if isinstance(value, set) else value[-1]


def _newest_cached(function: Any) -> Any:
    """Return the newest result of a cached function; None if unknown."""
    info = function.cache_info()
    if info.currsize > _MAX_LISTED:
        return None

    referents = gc.get_referents(function)
    at, results = next(
        ((at, each) for at, each in enumerate(referents) if type(each) is dict and len(each) == info.currsize),
        (0, {}),
    )
    if info.maxsize is None:
        return _newest(results)

    # With a bound it refers to the key, the result and the type of each link, the oldest first, then to the links.
    return next((each for each in reversed(referents[:at]) if type(each) is not type), None)


def _inside(place: _Place) -> Iterator[_Place]:
    value = place.value
    if not _is_entered(value) or is_tensor(value):
        return

    if isinstance(value, dict):
        for key, each in list(islice(value.items(), _MAX_FIELDS)):
            if isinstance(key, str):
                yield place._replace(value=each, path=f"{place.path}[{key!r}]", depth=place.depth + 1)
    elif isinstance(value, _LISTS):
        for number, each in enumerate(list(islice(value, 4))):
            yield place._replace(value=each, path=f"{place.path}[{number}]", depth=place.depth + 1)
    else:
        for holder in holders_of(value, place.path):
            yield place._replace(
                value=holder.value, path=holder.path, depth=_MAX_DEPTH, kind=holder.kind, owner=holder.owner
            )

        yield from _attributes(place)


def _attributes(place: _Place) -> Iterator[_Place]:
    """Yield the attributes of an object; of one of a library only its data set."""
    value, depth = place.value, place.depth + 1
    if type(value).__module__.partition(".")[0] in ("torch", "numpy", "traceml"):
        dataset = getattr(value, "dataset", None)
        if dataset is not None:
            yield place._replace(value=dataset, path=f"{place.path}.dataset", depth=depth, of_dataset=False)

        return

    for name, each in list(vars(type(value)).items()):
        if hasattr(type(each), "cache_info"):  # a cached method, which belongs to the class
            yield place._replace(value=each, path=f"{place.path}.{name}", depth=depth)

    inner = place.of_dataset or hasattr(type(value), "__getitem__") or "Dataset" in type(value).__name__
    for name, each in named_attributes(value, _is_entered):
        yield place._replace(value=each, path=f"{place.path}.{name}", depth=depth, of_dataset=inner)


def _is_entered(value: Any) -> bool:
    return not isinstance(value, _NOT_ENTERED)


def _holds_graph(item: Any) -> bool:
    """Return whether an element is a tensor with a graph, or a small tuple, list or dict that has one."""
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, _LISTS) else (item,)
    return any(is_tensor(part) and part.grad_fn is not None for part in islice(parts, 8))


def _chain(tensor: Any) -> int:
    """Return the operations of the graph, followed by the first input of each."""
    node, length = tensor.grad_fn, 0
    while node is not None and length < MAX_CHAIN:
        length += 1
        node = next((each for each, _ in node.next_functions if each is not None), None)

    return length


def _is_large(item: Any) -> bool:
    """Return whether an element is large by itself: a tensor, a state dict, a model, an optimizer."""
    return _is_entered(item) and _size(item, depth=1) >= _LARGE_BYTES


def _size(item: Any, depth: int = 2) -> int:
    size = sys.getsizeof(item)
    if is_tensor(item):
        return size + int(item.untyped_storage().nbytes())

    if type(item).__module__ == "numpy":  # a view, also of a tensor, has the memory of another object
        return max(size, int(getattr(item, "nbytes", 0)))

    if own := sum(int(each.untyped_storage().nbytes()) for each in tensors_of(item)):
        return size + own

    parts = _parts(item) if depth else ()
    counted = list(islice(parts, _MAX_FIELDS))
    below = depth - 1 if isinstance(item, (dict, *_LISTS)) else 0  # objects refer to others, which they may share
    return size + sum(_size(part, below) for part in counted) * max(len(parts), 1) // max(len(counted), 1)


def _parts(item: Any) -> Collection[Any]:
    """Return what an element consists of: that of a list or dict, what a function or error keeps, or the fields."""
    if isinstance(item, dict):
        return item.values()

    if isinstance(item, _LISTS):
        return item

    if isinstance(item, FunctionType):
        return [*_captured_values(item), *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]

    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]

    if isinstance(item, BaseException):
        return [*item.args, *_variables_at(item)]

    has_fields = type(item).__dictoffset__ != 0  # asking the object itself for its `__dict__` would make one
    return attribute_values(item) if has_fields and _is_entered(item) else ()


def _variables_at(error: BaseException) -> list[Any]:
    """Return the variables of the functions that an exception has ended, which it keeps, without its handler's."""
    found: list[Any] = []
    entry = error.__traceback__ and error.__traceback__.tb_next
    while entry is not None and len(found) < _MAX_FIELDS:
        found += _variables(entry.tb_frame).values()
        entry = entry.tb_next

    return found


def _captured_values(function: FunctionType) -> list[Any]:
    """Return the variables of other functions that a function uses."""
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not bound yet
            contents.append(cell.cell_contents)

    return contents
