"""`python -m miles.env`: the block to paste into a bug report."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform

import torch

import miles

BACKENDS = {
    "transformers": "hf",
    "msgspec": "hf",
    "triton": "kernels",
    "deep_gemm": "kernels",
    "megatron.core": "megatron",
    "httpx": "sglang",
    "reasoning_gym": "envs",
    "math_verify": "math",
}
"""Optional modules and the extra that brings each."""


def report() -> str:
    """Versions, devices, and which optional backends are usable or why not."""
    lines = [
        f"miles {miles.__version__}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'}), "
        f"{torch.get_num_threads()} CPU threads",
        *_devices(),
        *(f"{module}: {_backend(module, extra)}" for module, extra in BACKENDS.items()),
    ]
    return "\n".join(lines)


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that torch can use"]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"GPU {i}: {device.name}, SM {device.major}{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB"
        for i, device in enumerate(found)
    ]


def _backend(module: str, extra: str) -> str:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"not installed (pip install 'miles[{extra}]')"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install is exactly what this has to show
        return f"installed, but its import fails: {type(error).__name__}: {error}"
    names = importlib.metadata.packages_distributions().get(package, [])
    return f"{importlib.metadata.version(names[0])}" if names else "usable"


if __name__ == "__main__":
    print(report())
