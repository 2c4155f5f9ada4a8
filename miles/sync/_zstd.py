"""zstd, of Python 3.14 or of the package `zstandard`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from miles.errors import MissingExtraError, SyncError

__all__ = ["compress", "decompress"]


def compress(data: bytes, level: int) -> bytes:
    """One zstd frame.

    Raises:
        MissingExtraError: zstandard is absent.
    """
    zstd = _zstd()
    packed: Any
    if sys.version_info >= (3, 14):
        packed = zstd.compress(data, level)
    else:
        packed = zstd.ZstdCompressor(level=level).compress(data)
    return bytes(packed)


def decompress(data: bytes, size: int) -> bytes:
    """What was compressed, of exactly `size` bytes.

    Raises:
        MissingExtraError: zstandard is absent.
        SyncError: it is damaged, or of another size.
    """
    zstd = _zstd()
    found: Any
    try:
        if sys.version_info >= (3, 14):
            found = zstd.ZstdDecompressor().decompress(data, size + 1)
        else:  # streamed, since the frame may claim any size
            with zstd.ZstdDecompressor().stream_reader(data) as stream:
                found = stream.read(size + 1)
    except zstd.ZstdError as error:
        raise SyncError(f"its compressed bytes are damaged: {error}") from error
    if len(found) != size:
        raise SyncError(f"it holds {len(found)} bytes or more; expected {size}")
    return bytes(found)


def _zstd() -> Any:
    try:
        return importlib.import_module(
            "compression.zstd" if sys.version_info >= (3, 14) else "zstandard"
        )
    except ImportError as error:
        raise MissingExtraError("zstandard", "delta") from error
