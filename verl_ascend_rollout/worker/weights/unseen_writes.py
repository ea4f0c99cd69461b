"""What a model's `load_weights` writes into parameters by itself, and not through their loaders.

vLLM's layerwise reload knows of loaders only: what gpt-oss copies (0.24 to 0.33, models/gpt_oss.py) is lost there on
the meta device, and its layers keep the old policy without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from verl_ascend_rollout.worker.weights.region import Region, storage_of


class UnseenWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers, within a `with`, what is written into parameters on the meta device and vLLM does not see."""

    def __init__(self) -> None:
        """Begin; nothing is expected yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._bases: dict[int, int] = {}
        self._writes: dict[int, list[tuple[Any, Region, tuple[Any, ...]]]] = {}
        self._left = 0

    def expect(self, parameter: torch.Tensor) -> None:
        """Watch a parameter on the meta device."""
        self._bases[storage_of(parameter)] = int(parameter.storage_offset())

    def left_to_vllm(self, counted: Callable[..., Any]) -> Callable[..., Any]:
        """Return vLLM's function that calls a loader on the meta device, and calls it again by itself."""

        @functools.wraps(counted)
        def left(*args: Any, **kwargs: Any) -> Any:
            self._left += 1
            try:
                return counted(*args, **kwargs)
            finally:
                self._left -= 1

        return left

    def repeat(self, parameter: torch.Tensor, loaded: torch.Tensor) -> None:
        """Write into a parameter with memory what was written into one without."""
        for func, region, rest in self._writes.pop(storage_of(parameter), ()):
            func(region.in_tensor(loaded.data), *rest)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `Recorder`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Carry out one operator, and remember what it wrote."""
        if not self._left and func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            base = self._bases.get(storage_of(args[0]))
            if base is not None:
                region = Region.of(args[0], base)
                self._writes.setdefault(storage_of(args[0]), []).append((func, region, args[1:]))
        return func(*args, **(kwargs or {}))
