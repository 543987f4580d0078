"""Contents of logged files before they are copied: bytes, pixels that are not encoded yet, open files.

A rank that is killed leaves them next to its flight file. The aggregator then finishes what the rank began, by the
functions of this module, too.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from traceml.fork_gate import fork_gate
from traceml.run_folder import ARTIFACTS

__all__ = ["Content", "LaterBytes", "OpenFile", "Pixels", "RefusedFileError", "copy_content", "encode_array", "size_of"]

_COPY_BYTES = 4 << 20
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}")
_RAW_FACTOR = 64  # an image of more than this times the limit, uncompressed, is refused without encoding
_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by number of channels


class RefusedFileError(Exception):
    """A file or an image that is not accepted; the text says why."""


class Pixels(NamedTuple):
    """Pixels of an image that is not encoded yet.

    Attributes:
        data: the array's bytes, in C order.
        dtype: its type, as numpy writes it.
        channels_first: whether the first axis has the channels where either end may have them.
    """

    data: bytes
    dtype: str
    shape: tuple[int, ...]
    channels_first: bool = False

    def encoded(self, limit_bytes: int) -> bytes:
        """Return a PNG file.

        Raises:
            RefusedFileError: they are no image, or far more than `limit_bytes`.
        """
        import numpy as np

        array = np.frombuffer(self.data, np.dtype(self.dtype)).reshape(self.shape)
        return encode_array(array, limit_bytes, channels_first=self.channels_first)


class OpenFile(NamedTuple):
    """A file of the user, opened when it was logged: it may be removed or replaced before it is copied.

    Attributes:
        descriptor: None where it is opened again to be copied, if it has not changed.
        path: its absolute path.
        identity: its mode, size, time of change and inode.
    """

    descriptor: int | None
    path: str
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> OpenFile:
        """Open a file.

        Raises:
            OSError: it cannot be opened.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
        return cls(descriptor, os.path.abspath(path), _identity(os.fstat(descriptor)))  # noqa: PTH100 - links stay

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file, and no folder or pipe."""
        return stat.S_ISREG(self.identity[0])

    @property
    def size(self) -> int:
        """Its size when it was logged, in bytes."""
        return self.identity[1]

    @property
    def is_unchanged(self) -> bool:
        """Whether its path still leads to it, as it was."""
        try:
            return _identity(Path(self.path).stat()) == self.identity
        except OSError:
            return False

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor is not None:
            os.close(self.descriptor)

    def chunks(self) -> Iterator[bytes]:
        """Yield what it contains.

        Raises:
            RefusedFileError: it was to be opened again, and has changed.
            OSError: it cannot be read.
        """
        opened = self if self.descriptor is not None else OpenFile.open(Path(self.path))
        try:
            if opened.identity != self.identity:
                raise RefusedFileError(f"{self.path} was changed before it was copied")

            assert opened.descriptor is not None
            at = 0  # a descriptor has one position for all
            while data := os.pread(opened.descriptor, _COPY_BYTES, at):
                at += len(data)
                yield data
        finally:
            if opened is not self:
                opened.close()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


class LaterBytes(NamedTuple):
    """Contents that a function returns later, on another thread, as of a tensor that is being copied from a device."""

    make: Callable[[], bytes]
    size_bytes: int  # of what it holds


Content = bytes | Pixels | OpenFile | LaterBytes
"""Contents of a logged file."""


def size_of(content: Content) -> int:
    """Return the bytes that contents take in memory."""
    if isinstance(content, Pixels):
        return len(content.data)
    if isinstance(content, LaterBytes):
        return content.size_bytes

    return len(content) if isinstance(content, bytes) else 0


def copy_content(
    content: Content,
    part: Path,
    *,
    kind: str,
    suffix: str,
    limit_bytes: int,
    on_copied: Callable[[int], None] = lambda _bytes: None,
) -> dict[str, Any]:
    """Copy contents to `part`; return the facts of the file's row: its path below the run's folder, size and SHA-256.

    Args:
        kind: `artifact` or `image`.
        suffix: end of the file's name, which is made of its contents; left out if it is an unusual one.
        on_copied: called with the number of bytes of each chunk.

    Raises:
        RefusedFileError: it has more than `limit_bytes`, or is no image.
        OSError: it cannot be read or written.
    """
    with fork_gate:
        digest, size = hashlib.sha256(), 0

    with part.open("wb") as file:
        for data in _chunks_of(content, limit_bytes):
            size += len(data)
            if size > limit_bytes:
                raise RefusedFileError(f"it has more than {limit_bytes} bytes (max_{kind}_bytes)")

            digest.update(data)
            file.write(data)
            on_copied(len(data))

    sha256 = digest.hexdigest()
    name = f"{sha256}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
    return {"path": f"{ARTIFACTS}/{name}", "size": size, "sha256": sha256}


def _chunks_of(content: Content, limit_bytes: int) -> Iterator[bytes]:
    if isinstance(content, OpenFile):
        yield from content.chunks()
    elif isinstance(content, Pixels):
        yield content.encoded(limit_bytes)
    else:
        yield content if isinstance(content, bytes) else content.make()


def encode_array(array: Any, limit_bytes: int, *, channels_first: bool = False) -> bytes:
    """Encode pixels as PNG: bytes, or floats in 0..1; `channels_first` decides where either end may be channels.

    Raises:
        RefusedFileError: they are no image, or far more than `limit_bytes`.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise RefusedFileError(f"an image must have 2 or 3 dimensions, not the shape {tuple(array.shape)}")

    if array.shape[0] in _COLOR_TYPES and (channels_first or array.shape[2] not in _COLOR_TYPES):
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in _COLOR_TYPES or not array.size:
        raise RefusedFileError(
            f"an image must have 1 to 4 channels, first or last; this one has the shape {tuple(array.shape)}"
        )
    if array.size > _RAW_FACTOR * limit_bytes:
        raise RefusedFileError(f"it has {array.size} values, far above max_image_bytes={limit_bytes}")

    kind = array.dtype.kind
    if kind == "f":
        array = array.clip(0.0, 1.0)
        array[array != array] = 0.0  # NaN becomes black
        array = (array * 255.0 + 0.5).astype("uint8")
    elif kind == "b":
        array = array.astype("uint8") * 255
    else:
        array = array.clip(0, 255).astype("uint8")

    height, width, channels = array.shape
    return _png(array.tobytes(), width, height, channels)


def _png(pixels: bytes, width: int, height: int, channels: int) -> bytes:
    """Return a PNG file.

    Args:
        pixels: rows from the top, 8 bits per channel.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.
    """
    row = width * channels
    lines = b"".join(b"\x00" + pixels[y * row : (y + 1) * row] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
