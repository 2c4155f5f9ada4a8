"""What changed in a tensor, in few bytes, and back again bit for bit.

A step of reinforcement learning leaves most bf16 weights as they were, and changes the last bits of
the rest. So a delta is the places that changed and, for each, the XOR of the old and the new bits,
which is mostly zeros; all of it goes through zstd. Bits are compared, not numbers: 0.0 and -0.0
differ, a NaN equals itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._checksum import checksum
from miles.sync._zstd import compress, decompress

__all__ = ["Delta", "DeltaReport", "apply_delta", "encode_delta", "measure_delta"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_GAPS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The difference of two tensors of one shape and dtype."""

    shape: tuple[int, ...]
    """Of both."""
    dtype: torch.dtype
    """Of both."""
    encoding: str
    """How places are told: "bitmap", "index1", "index2", "index4" or "index8" (gaps between them,
    of so many bytes), "dense" (none left out), or "same" (nothing changed)."""
    num_changed: int
    """Elements that differ (halves of them for complex128)."""
    base: int
    """Checksum of the old tensor."""
    result: int
    """Checksum of the new one."""
    payload: bytes
    """Places, then XORed bits in planes of bytes, the lowest first; one zstd frame."""

    @property
    def nbytes(self) -> int:
        """Size of the payload."""
        return len(self.payload)

    def header(self) -> dict[str, Any]:
        """Everything but the payload, for JSON."""
        return {
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "encoding": self.encoding,
            "num_changed": self.num_changed,
            "base": self.base,
            "result": self.result,
        }

    @classmethod
    def read(cls, header: Mapping[str, Any], payload: bytes) -> Delta:
        """What `header` and `payload` were taken from.

        Raises:
            SyncError: the header makes no sense.
        """
        try:
            dtype = getattr(torch, str(header["dtype"]).removeprefix("torch."))
            fields = {key: header[key] for key in ("encoding", "num_changed", "base", "result")}
            numbers = (fields[key] for key in ("num_changed", "base", "result"))
            if not isinstance(fields["encoding"], str) or any(type(n) is not int for n in numbers):
                raise TypeError("a field of another type")
            return cls(shape=tuple(header["shape"]), dtype=dtype, payload=payload, **fields)
        except (KeyError, AttributeError, TypeError) as error:
            raise SyncError(f"the header of a delta is damaged: {error!r}") from error


@dataclass(frozen=True, kw_only=True)
class DeltaReport:
    """How much of a model changed."""

    num_elements: int
    """All of them."""
    num_changed: int
    """Those whose bits differ."""
    full_bytes: int
    """The model's size."""
    delta_bytes: int
    """What the deltas take."""

    @property
    def changed_share(self) -> float:
        """Of the elements; 0 to 1."""
        return self.num_changed / max(self.num_elements, 1)

    @property
    def ratio(self) -> float:
        """Size of the model over that of the deltas."""
        return self.full_bytes / max(self.delta_bytes, 1)

    @classmethod
    def of(cls, deltas: Iterable[Delta]) -> DeltaReport:
        """Of all tensors of a model."""
        sums = [0, 0, 0, 0]
        for delta in deltas:
            count = torch.Size(delta.shape).numel()
            parts = (count, delta.num_changed, count * delta.dtype.itemsize, delta.nbytes)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
        return cls(
            num_elements=sums[0], num_changed=sums[1], full_bytes=sums[2], delta_bytes=sums[3]
        )


def encode_delta(old: Tensor, new: Tensor, *, level: int = 3) -> Delta:
    """What turns `old` into `new`.

    Args:
        old: any dtype, on any device.
        new: of the same shape and dtype.
        level: of zstd; 1 is fast, 19 small.

    Raises:
        SyncError: shapes or dtypes differ.
        MissingExtraError: zstandard is absent.

    Example:
        >>> import torch
        >>> from miles.sync.delta import apply_delta, encode_delta
        >>> old = torch.zeros(1000, dtype=torch.bfloat16)
        >>> new = old.clone()
        >>> new[7] = -0.0
        >>> delta = encode_delta(old, new)
        >>> delta.encoding, delta.num_changed, apply_delta(old, delta)[7].item()
        ('index1', 1, -0.0)

    References:
        Sparsity of updates: PULSE, arXiv 2602.03839.
    """
    if old.shape != new.shape or old.dtype != new.dtype:
        raise SyncError(
            f"the new tensor is {tuple(new.shape)} {new.dtype}, the old one {tuple(old.shape)} "
            f"{old.dtype}; expected the same"
        )
    new_N = _bits(new)
    xor_N = _bits(old) ^ new_N
    places_K = xor_N.nonzero().flatten()
    num_changed = places_K.numel()
    encoding, places = _places(places_K.numpy(), xor_N)
    values_K = xor_N if encoding == "dense" else xor_N[places_K]
    body = places + _planes(values_K)
    return Delta(
        shape=tuple(new.shape),
        dtype=new.dtype,
        encoding=encoding,
        num_changed=num_changed,
        base=checksum(old),
        result=checksum(new),
        payload=compress(body, level) if body else b"",
    )


def apply_delta(old: Tensor, delta: Delta) -> Tensor:
    """The new tensor, bit for bit, on the device of `old`.

    Args:
        old: what the delta was taken from.
        delta: from `encode_delta`.

    Raises:
        SyncError: `old` is another tensor, or the delta is damaged.
        MissingExtraError: zstandard is absent.
    """
    if tuple(old.shape) != delta.shape or old.dtype != delta.dtype:
        raise SyncError(
            f"the delta is of {delta.shape} {delta.dtype}; the tensor is {tuple(old.shape)} "
            f"{old.dtype}"
        )
    if checksum(old) != delta.base:
        raise SyncError("the tensor is not the one that the delta was taken from")
    if delta.encoding == "same":
        new = old
    else:
        bits_N = _bits(old).clone()
        places_K, values_K = _read(delta, bits_N)
        if places_K is None:
            bits_N ^= values_K
        else:
            bits_N[places_K] ^= values_K
        new = bits_N.view(delta.dtype).view(delta.shape).to(old.device)
    if checksum(new) != delta.result:
        raise SyncError("the delta gives another tensor than it was made for; it is damaged")
    return new


def measure_delta(
    old: Mapping[str, Tensor], new: Iterable[tuple[str, Tensor]], *, level: int = 3
) -> DeltaReport:
    """How sparse an update is.

    Args:
        old: tensors by name.
        new: the same tensors, later.
        level: of zstd.

    Raises:
        SyncError: a tensor is missing from `old`, or of another shape or dtype there.
    """

    def deltas() -> Iterable[Delta]:
        for name, tensor in new:
            if name not in old:
                raise SyncError(f"{name} is not among the old tensors")
            yield encode_delta(old[name], tensor, level=level)

    return DeltaReport.of(deltas())


def _bits(tensor: Tensor) -> Tensor:
    """`[N]` integers on the CPU; may be the tensor's own memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).view(_WORDS[tensor.dtype.itemsize])


def _places(places_K: np.ndarray[Any, Any], xor_N: Tensor) -> tuple[str, bytes]:
    """The shortest way to tell where changes are."""
    count, size = len(places_K), xor_N.element_size()
    if not count:
        return "same", b""
    gaps_K = np.diff(places_K, prepend=0)
    width = next(w for w, kind in _GAPS.items() if gaps_K.max() <= np.iinfo(kind).max)
    costs = {
        f"index{width}": count * width,
        "bitmap": -(-xor_N.numel() // 8),
        "dense": (xor_N.numel() - count) * size,  # bits of what did not change, in vain
    }
    encoding = min(costs, key=lambda name: costs[name])
    if encoding == "bitmap":
        return encoding, np.packbits((xor_N != 0).numpy()).tobytes()
    return encoding, b"" if encoding == "dense" else gaps_K.astype(_GAPS[width]).tobytes()


def _planes(values_K: Tensor) -> bytes:
    """The first bytes of all, then the second: alike bytes stand together and compress."""
    size = values_K.element_size()
    return values_K.contiguous().view(torch.uint8).view(-1, size).T.contiguous().numpy().tobytes()


def _read(delta: Delta, bits_N: Tensor) -> tuple[Tensor | None, Tensor]:
    """Places (None: all) and values."""
    total, size = bits_N.numel(), bits_N.element_size()
    dense = delta.encoding == "dense"
    count = total if dense else delta.num_changed
    width = {f"index{width}": width for width in _GAPS}.get(delta.encoding, 0)
    if not 1 <= delta.num_changed <= total or not (dense or width or delta.encoding == "bitmap"):
        raise SyncError(
            f"the delta is damaged: {delta.encoding} with {delta.num_changed} of {total} elements"
        )
    head = 0 if dense else count * width or -(-total // 8)
    data = np.frombuffer(decompress(delta.payload, head + count * size), dtype=np.uint8)
    planes = torch.from_numpy(data[head:].reshape(size, count).T.copy())
    values_K = planes.reshape(-1).view(bits_N.dtype)
    if dense:
        return None, values_K
    if width:
        gaps_K = data[:head].view(_GAPS[width])
        if gaps_K.max() >= total or not gaps_K[1:].all():
            raise SyncError("the delta is damaged: gaps between places that cannot be")
        places = np.cumsum(gaps_K, dtype=np.int64)
    else:
        places = np.unpackbits(data[:head], count=total).nonzero()[0]
    if len(places) != count or places.min() < 0 or places.max() >= total:
        raise SyncError("the delta is damaged: places outside the tensor")
    return torch.from_numpy(places), values_K
