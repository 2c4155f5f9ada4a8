"""A bar for pushes that take longer than a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from miles.errors import MissingExtraError

__all__ = ["bar"]


@contextlib.contextmanager
def bar(show: bool, num_bytes: int | None, version: int) -> Iterator[Callable[[int], object]]:
    """A function to call with bytes as they move.

    Args:
        show: False does nothing.
        num_bytes: how many there will be, if that is known.
        version: what is on its way.

    Raises:
        MissingExtraError: tqdm is absent.
    """
    if not show:
        yield lambda moved: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "examples") from error
    with tqdm(
        total=num_bytes, desc=f"weights {version}", unit="B", unit_scale=True, delay=1.0
    ) as shown:
        yield shown.update
