"""Operators of a torch.profiler trace: own CPU time, device time, and the line of the user's code that calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OUTSIDE", "CallSamples", "OperatorTable", "OperatorTotal"]

OUTSIDE = "outside of operators"
"""Time of profiled steps in which the training thread ran no operator: Python, data, other libraries."""
_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP_MARK = "ProfilerStep#"

_Place = tuple[str, int, str]  # file, line, function
_Span = tuple[int, int, str]  # begin, end (ns), name


@dataclass(slots=True)
class OperatorTotal:
    """Times of all calls of an operator in the profiled steps, in nanoseconds."""

    calls: int = 0
    self_ns: int = 0  # CPU time without the operators that it calls
    device_ns: int = 0
    places: Counter[_Place] = field(default_factory=Counter)  # samples by line of the user's code that called it

    @property
    def place(self) -> _Place | None:
        """The line of the user's code in which it was seen most often; None if it was never seen."""
        return self.places.most_common(1)[0][0] if self.places else None


@dataclass(frozen=True, slots=True)
class CallSamples:
    """Sampled lines of the training thread."""

    places: Sequence[_Place] = ()  # file, line, function
    samples: Sequence[tuple[int, int]] = ()  # epoch nanoseconds and the number of the place, in order

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> CallSamples:
        """Return the samples that a rank sent."""
        places = [(str(file), int(line), str(function)) for file, line, function in row.get("places", [])]
        return cls(places, [(int(t_ns), int(number)) for t_ns, number in row.get("samples", [])])

    def between(self, begin_ns: int, end_ns: int) -> CallSamples:
        """Return the samples of a time."""
        return CallSamples(self.places, [sample for sample in self.samples if begin_ns <= sample[0] < end_ns])


class OperatorTable:
    """Operators of all profiled ranks, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, OperatorTotal] = {}
        self.steps = 0
        """Profiled steps, of all ranks together."""
        self.step_ns = 0
        """Their duration, by the marks in the trace."""

    @property
    def has_device(self) -> bool:
        """Whether any operator ran on a device."""
        return any(total.device_ns for total in self.by_name.values())

    def ordered(self) -> list[tuple[str, OperatorTotal]]:
        """Return the operators, the longest first: by device time where there is a device."""
        if self.has_device:
            return sorted(self.by_name.items(), key=lambda item: (-item[1].device_ns, -item[1].self_ns))

        return sorted(self.by_name.items(), key=lambda item: -item[1].self_ns)

    def add(self, events: Iterable[dict[str, Any]], base_ns: int, calls: CallSamples) -> None:
        """Add the trace of a rank.

        Args:
            base_ns: epoch nanoseconds of the trace's time 0.
        """
        threads: dict[Any, list[_Span]] = {}
        names: dict[Any, str] = {}
        kernels: list[tuple[Any, int]] = []
        steps: list[tuple[Any, int, int]] = []
        for event in events:
            if event.get("ph") != "X":
                continue

            begin_ns = base_ns + round(event["ts"] * 1000)
            end_ns = begin_ns + round(event.get("dur", 0) * 1000)
            category, thread = event.get("cat"), (event["pid"], event["tid"])
            number = event.get("args", {}).get("External id")
            if category == "cpu_op":
                threads.setdefault(thread, []).append((begin_ns, end_ns, str(event["name"])))
                names[number] = str(event["name"])
            elif category in _DEVICE_CATEGORIES:
                kernels.append((number, end_ns - begin_ns))
            elif category == "user_annotation" and str(event["name"]).startswith(_STEP_MARK):
                steps.append((thread, begin_ns, end_ns))

        for number, ns in kernels:
            self._of(names.get(number, "unknown")).device_ns += ns

        training = None
        if steps:
            training, first, last = steps[0][0], min(begin for _, begin, _ in steps), max(end for *_, end in steps)
            calls = calls.between(first, last)  # the sampler is there from the profiler's set-up on
            self._add_steps(steps, threads.get(training, []), first, last)

        for thread, spans in threads.items():
            self._add_thread(spans, calls if thread == training else CallSamples())

    def _of(self, name: str) -> OperatorTotal:
        return self.by_name.setdefault(name, OperatorTotal())

    def _add_steps(self, steps: list[tuple[Any, int, int]], spans: list[_Span], first: int, last: int) -> None:
        self.steps += len(steps)
        whole = sum(end - begin for _, begin, end in steps)
        self.step_ns += whole
        inside = _covered((max(begin, first), min(end, last)) for begin, end, _ in spans)
        self._of(OUTSIDE).self_ns += max(whole - inside, 0)

    def _add_thread(self, spans: list[_Span], calls: CallSamples) -> None:
        """Add the operators of a thread; each sample counts for the innermost one that was open."""
        spans.sort(key=lambda span: (span[0], -span[1]))
        open_spans: list[_Span] = []
        samples = iter(calls.samples)
        sample = next(samples, None)
        for span in [*spans, (1 << 63, 1 << 63, "")]:
            while sample is not None and sample[0] < span[0]:
                self._vote(open_spans, sample[0], calls.places[sample[1]])
                sample = next(samples, None)

            while open_spans and open_spans[-1][1] <= span[0]:
                open_spans.pop()

            if span[2]:
                total = self._of(span[2])
                total.calls += 1
                total.self_ns += span[1] - span[0]
                if open_spans:
                    self._of(open_spans[-1][2]).self_ns -= min(span[1], open_spans[-1][1]) - span[0]

                open_spans.append(span)

    def _vote(self, open_spans: list[_Span], t_ns: int, place: _Place) -> None:
        around = [name for _, end, name in open_spans if end > t_ns]
        self._of(around[-1] if around else OUTSIDE).places[place] += 1


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Return the length of the union of spans."""
    covered, until = 0, 0
    for begin, end in sorted(spans):
        if end > until:
            covered += end - max(begin, until)
            until = end

    return covered
