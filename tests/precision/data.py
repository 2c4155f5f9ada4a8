"""Tensors on which quantisers go wrong, and roundings written again from their definitions."""

import torch

E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""The magnitudes of codes 0x00 to 0x7E: 0 to 448."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
KINDS = ["normal", "heavy", "wide", "tiny", "zeros", "maxima", "ties", "subnormal", "constant"]


def tensor(kind: str, shape, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "heavy":
        normal = normal / torch.rand(shape, generator=generator).clamp(min=1e-3)
    elif kind == "wide":
        normal *= torch.exp2(torch.randint(-40, 40, shape, generator=generator).float())
    elif kind == "tiny":
        normal *= 1e-9
    elif kind == "zeros":
        normal *= torch.rand(shape[-1], generator=generator) > 0.9
        normal[..., : shape[-1] // 2] = 0
    elif kind == "maxima":
        normal = torch.finfo(dtype).max * normal.sign()
    elif kind == "ties":  # halfway between codes, in blocks whose scale is 1
        middles = ((E4M3[1:] + E4M3[:-1]) / 2).float()
        normal = middles[torch.randint(len(middles), shape, generator=generator)] * normal.sign()
        normal[..., ::16] = 448
    elif kind == "subnormal":
        normal *= 1e-39 if dtype != torch.float16 else 1e-6
    elif kind == "constant":
        normal = torch.full(shape, 1e-6)
    largest = torch.finfo(dtype).max
    return normal.clamp(-largest, largest).to(dtype)


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index into sorted magnitudes: nearest, ties to the even index; by looking at all of them."""
    distance = (x.double().abs()[..., None] - table).abs()
    best = distance.amin(-1, keepdim=True)
    candidates = distance == best
    even = candidates & (torch.arange(len(table)) % 2 == 0)
    pick = torch.where(even.any(-1, keepdim=True), even, candidates)
    return pick.int().argmax(-1)


def broken(shape, dtype, value: str) -> torch.Tensor:
    """Normal numbers, and one at [1, 5] that is none."""
    x = tensor("normal", shape, dtype)
    x[1, 5] = float(value)
    return x


def same_bits(got, expected) -> bool:
    """Whether pairs of tensors agree in shape, dtype and every bit, save those of NaN."""
    return all(_same_bits(a, b) for a, b in zip(got, expected, strict=True))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    same = a.view(bits) == b.view(bits)
    return bool((same | (a.float().isnan() & b.float().isnan())).all())
