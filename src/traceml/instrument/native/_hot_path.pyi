"""The extension module that hatch_build.py compiles from the C files beside this one."""

from collections.abc import Callable
from typing import Any, Self

LAYOUT: str

def use_time(source: Callable[[], int] | None) -> None: ...
def metric_writer(
    entries: dict[str, list[int]],
    ring: Any,
    acquire: Callable[[bool], bool],
    release: Callable[[], None],
    open_slots: Any,
    memory: tuple[Any, int, int, Any, int],
    experiment: int,
    /,
) -> Callable[[str, Any, int | None], bool]: ...
def passing_on(own: tuple[Callable[..., None], int], /) -> Callable[..., None]: ...
def of_types(objects: list[Any], types: tuple[type[Any], ...], /) -> list[Any]: ...

class HotFields:
    thread: int
    current: int
    input_ns: int
    forward_ns: int
    backward_ns: int
    optimizer_ns: int
    rows: int
    before: int
    part_start: int
    step_call: int
    backwards: int
    batches: int
    last_optimizer: int
    loss_mask: int
    slow_row: int
    failure: int
    failed_in: int
    input_samples: int
    input_elements: int
    samples: int
    elements: int
    needs_slow_commit: bool
    has_user_phases: bool
    needs_slow_backward: bool
    inspects: bool
    open_slots: Any
    closing_trigger: Any
    batch: Any
    first_loader: Any
    usual_trigger: Any
    usual_loader: Any
    input_shape: Any
    rare_times: list[int]
    sequence: Any
    commit: Callable[[int], None]

    def connect(
        self,
        open_slots: Any,
        ring: tuple[Any, int, int, Any, int],
        masks: tuple[int, int, int, int, int],
        sentinels: tuple[object, object, object],
        in_context: Callable[[], Any],
    ) -> None: ...
    def enter(self, phase: int) -> tuple[int, int] | None: ...
    def leave(self, phase: int, began: tuple[int, int]) -> None: ...
    def cancel(self, phase: int, began: tuple[int, int]) -> None: ...
    def account_user_phases(self, t: int) -> None: ...
    def end_user_phases(self, t: int) -> None: ...

class UserPhase:
    bucket: int
    name_id: int

    def __new__(cls, hot: HotFields, bucket: int, name_id: int, /) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

class Hook:
    phase: int
    original: Callable[..., Any] | None
    module: Any

    def __new__(
        cls,
        hot: HotFields,
        phase: int,
        original: Callable[..., Any] | None,
        slow: Callable[..., Any],
        helper: Callable[..., Any] | None = None,
        module: Any = None,
        of_torch: tuple[type[Any], Callable[[], int], Callable[[], bool], int] = ...,
    ) -> Self: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
