"""Merging of small frames, and summing of their rows, while the store is written.

A rank sends a frame a second, often of one row. About 60 of them are merged into one, and 60 of these again, up to
4,096 rows, so that a run of a month has few frames, which also compress better. Rows are summed when their frames are
first merged.

A merged frame has the id of its last part. A reader that has read some of the parts would read them again, and so
frames are never merged across the cursor of a delivery; a reader that lives on knows what it has read.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from traceml.database.schema import LOGGED, METRICS, PACKED, TABLES, Table
from traceml.database.store.frame_editor import SUMMED, FrameEditor
from traceml.database.store.records import Frame

__all__ = ["FANOUT", "FULL_ROWS", "Compaction"]

FANOUT = 60
"""Number of frames that are merged into one."""
FULL_ROWS = 4096
"""Most rows of a merged frame."""
_MAX_TAILS = 8192
"""With more (stream, table) pairs nothing is merged: each transaction would rewrite most pages of the last minute."""
_ROUND_FRAMES = 120_000
_LEVELS = 4
_MAX_FRAMES = 256
# Rows of a table that gets few of them are summed after this long.
_STALE_S, _STALE_OF_MANY_S = 300.0, 900.0

_Key = tuple[int, str]


class _PendingFrames(msgspec.Struct):
    """Frames of one (stream, table) that are not large yet: ids by level, in order, and their rows.

    The last `unsummed` frames of level 0 are new: not in the sums yet, the first of them since `since_s`.
    """

    ids: list[array[int]] = msgspec.field(default_factory=lambda: [array("q") for _ in range(_LEVELS)])
    rows: list[int] = msgspec.field(default_factory=lambda: [0] * _LEVELS)
    unsummed: int = 0
    unsummed_rows: int = 0
    since_s: float = 0.0

    def keep_unsummed(self) -> None:
        """Forget the frames whose rows are in the sums."""
        self.ids = [self.ids[0][len(self.ids[0]) - self.unsummed :], *(array("q") for _ in range(_LEVELS - 1))]


class Compaction:
    """Merges and sums the frames that it is given, in rounds: about once a minute, those of all ranks together.

    Args:
        on_resized: called with the change of the store's size in bytes by each merge, and the frame's id.
    """

    def __init__(self, editor: FrameEditor, on_resized: Callable[[int, int], None]) -> None:
        self._editor = editor
        self._on_resized = on_resized
        self._tails: dict[_Key, _PendingFrames] = {}
        self._due: deque[tuple[_Key, int]] = deque()
        self._next: dict[tuple[_Key, int], None] = {}
        self._after_commit: list[Callable[[], None]] = []
        self.has_due_work = False
        """Whether there is enough to do for a round."""
        self._by_age: deque[tuple[float, _Key]] = deque()
        self._damaged: set[_Key] = set()
        self._texts = array("q")
        self.is_merging_off = False
        """Whether there are too many processes: frames stay as they are from now on, and are summed alone."""

    def record(self, stream: int, table: str, frame: int, rows: int, now_s: float) -> None:
        """Take a new frame, after its commit and in the order of ids."""
        if table == LOGGED.name:
            # Trackers get values and texts in the order of the calls; a text may also end the values' experiment.
            self._texts.append(frame)

        key = (stream, table)
        if table not in (SUMMED if self.is_merging_off else _MERGED) or key in self._damaged:
            return

        tail = self._tails.get(key) or self._begin(key)
        tail.ids[0].append(frame)
        tail.rows[0] += rows
        if tail.unsummed == 0:
            tail.since_s = now_s
            self._by_age.append((now_s, key))

        tail.unsummed += 1
        tail.unsummed_rows += rows
        self._plan(key, tail)

    def resume(self, stream: int, table: str, frame: int, rows: int, *, level: int, now_s: float) -> None:
        """Take a frame that a store had when it was opened.

        Args:
            level: 0 if its rows are not in the sums, else 1 or higher.
        """
        if level == 0 or table not in _MERGED:
            self.record(stream, table, frame, rows, now_s)
        elif rows < FULL_ROWS // 2 and not self.is_merging_off:
            key = (stream, table)
            self._append(key, self._tails.get(key) or self._begin(key), level, frame, rows)

    def take_thinned(self, stream: int, table: str, frame: int, rows: int) -> None:
        """Take a frame that was thinned, in the order of ids since `forget_thinned`."""
        if self.is_merging_off:
            return

        key = (stream, table)
        self._append(key, self._tails.get(key) or self._begin(key), _LEVELS - 1, frame, rows)

    def forget_thinned(self) -> None:
        """Forget the thinned frames that were taken, before they are visited again."""
        for tail in self._tails.values():
            tail.ids[-1], tail.rows[-1] = array("q"), 0

    def begin_round(self, now_s: float) -> bool:
        """Begin a round if there is enough to do; return whether it has begun."""
        while self._by_age and now_s - self._by_age[0][0] > (_STALE_OF_MANY_S if self.is_merging_off else _STALE_S):
            since_s, key = self._by_age.popleft()
            tail = self._tails.get(key)
            if tail is not None and tail.unsummed and tail.since_s == since_s:
                self._next[key, 0] = None
                self.has_due_work = True

        if not self.has_due_work:
            return False

        # A thinned frame may be in two levels: of each (stream, table) only one takes part.
        chosen = {key: (key, level) for key, level in reversed(self._next)}
        self._due.extend(chosen.values())
        for each in self._due:
            del self._next[each]

        self.has_due_work = bool(self._next)
        return True

    def next_due(self) -> tuple[_Key, int] | None:
        """Return the next (stream, table) and level of the round, None at its end."""
        return self._due.popleft() if self._due else None

    def after_commit(self) -> None:
        """Take over what was merged, after it was written."""
        for work in self._after_commit:
            work()

        self._after_commit.clear()

    def run(self, key: _Key, level: int, up_to: int, cursors: Sequence[int] = ()) -> None:
        """Sum and merge frames of one (stream, table) at a level; `after_commit` follows when the changes are written.

        Args:
            level: from `next_due`.
            up_to: frames after this id are not merged.
            cursors: ids up to which each delivery has read.

        Raises:
            ValueError: a frame is damaged; frames of this stream and table are left as they are from now on.
        """
        tail, table = self._tails.get(key), TABLES[key[1]]
        if tail is None or not isinstance(table, Table):
            return

        ids = tail.ids[level]
        merging = [number for number in ids[:_MAX_FRAMES] if number <= up_to and not self.is_merging_off]
        summing = ids[-tail.unsummed :][:_MAX_FRAMES] if level == 0 and tail.unsummed else array("q")
        try:
            frames = self._editor.load(table, sorted({*merging, *summing}))
            new = [frame for frame in frames if summing and frame.id >= summing[0]]
            if new and key[1] in SUMMED:
                self._editor.add_sums(table, new)
        except ValueError:
            # Readers find the damage among the rows that are not summed, instead of sums without them.
            self._damaged.add(key)
            del self._tails[key]
            raise

        chosen = [frame for frame in frames if merging and frame.id <= merging[-1]]
        runs = _runs(chosen, cursors, self._texts if key[1] == METRICS.name else ())
        is_rest = len(runs) > 0 and len(runs[-1]) == 1 and runs[-1][0].n < FULL_ROWS // 2
        rest = runs.pop() if is_rest and runs[-1][0].id == merging[-1] else []
        done = sum(frame.n for run in runs for frame in run)
        small = [frame for frame in (self._merged(table, run) for run in runs) if frame.n < FULL_ROWS // 2]
        new_rows = sum(frame.n for frame in new)

        def finish() -> None:
            tail.unsummed -= len(summing)
            tail.unsummed_rows = tail.unsummed_rows - new_rows if tail.unsummed else 0
            if self.is_merging_off:
                tail.keep_unsummed()
            else:
                del ids[: len(merging) - len(rest)]

            tail.rows[level] = tail.rows[level] - done if ids else 0
            self._plan(key, tail)
            for frame in small:
                self._append(key, tail, min(level + 1, _LEVELS - 1), frame.id, frame.n)

        self._after_commit.append(finish)

    def _merged(self, table: Table, frames: Sequence[Frame]) -> Frame:
        if len(frames) == 1:
            return frames[0]

        merged = self._editor.merge(table, frames)
        self._on_resized(merged.size - sum(frame.size for frame in frames), merged.id)
        return merged

    def _begin(self, key: _Key) -> _PendingFrames:
        if len(self._tails) >= _MAX_TAILS and not self.is_merging_off:
            self._stop_merging()

        return self._tails.setdefault(key, _PendingFrames())

    def _stop_merging(self) -> None:
        """Keep only the frames that are not in the sums yet."""
        self.is_merging_off = True
        for held in (self._due, self._next):
            held.clear()

        for key, tail in list(self._tails.items()):
            tail.unsummed *= key[1] in SUMMED
            tail.keep_unsummed()
            self._plan(key, tail)

    def _append(self, key: _Key, tail: _PendingFrames, level: int, frame: int, rows: int) -> None:
        tail.ids[level].append(frame)
        tail.rows[level] += rows
        if len(tail.ids[level]) >= FANOUT or tail.rows[level] >= FULL_ROWS:
            self._next[key, level] = None
            self.has_due_work = True

    def _plan(self, key: _Key, tail: _PendingFrames) -> None:
        """Add new frames to the next round if there are many; a full one begins it, and half-full ones take part."""
        # Of many processes a shorter time is merged at once, as each transaction touches all pages of it.
        many = _ROUND_FRAMES // max(len(self._tails), 1)
        fanout = FANOUT if self.is_merging_off else min(FANOUT, max(many, FANOUT // 4))
        is_full = tail.unsummed >= fanout or tail.unsummed_rows >= FULL_ROWS
        if is_full or tail.unsummed >= fanout // 2:
            self._next[key, 0] = None
            self.has_due_work |= is_full


def _runs(frames: Sequence[Frame], cursors: Sequence[int], texts: Sequence[int]) -> list[list[Frame]]:
    """Return runs of frames that can be merged: no lost rows, cursor or text is between them, and they are few."""
    runs: list[list[Frame]] = []
    rows = 0
    for frame in frames:
        last = runs[-1][-1] if runs else frame
        is_split = any(last.id <= cursor < frame.id for cursor in cursors)
        is_split |= bisect_right(texts, frame.id) > bisect_right(texts, last.id)
        if runs and frame.seq == last.end and rows + frame.n <= FULL_ROWS and not is_split:
            runs[-1].append(frame)
            rows += frame.n
        else:
            runs.append([frame])
            rows = frame.n

    return runs


_MERGED = frozenset(table.name for table in PACKED)
