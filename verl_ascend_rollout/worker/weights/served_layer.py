"""A layer's tensors as its kernels and captured graphs know them: given back after a sync, at the same addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.manifest import WeightSyncError


@dataclass(frozen=True)
class ServedLayer:
    """A layer as it served before the sync."""

    prefix: str
    layer: Any
    parameters: Mapping[str, torch.nn.Parameter]  # its own, by name, and so its buffers
    buffers: Mapping[str, torch.Tensor]
    attributes: Mapping[str, torch.Tensor]  # other tensors that it has, by name
    passing: frozenset[str]  # the names of buffers that are in no checkpoint

    @classmethod
    def of(cls, prefix: str, layer: torch.nn.Module) -> ServedLayer:
        """Look at a layer."""
        return cls(
            prefix,
            layer,
            {name: value for name, value in layer._parameters.items() if value is not None},
            {name: value for name, value in layer._buffers.items() if value is not None},
            {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)},
            frozenset(layer._non_persistent_buffers_set),
        )

    def name(self, own: str) -> str:
        """Return the model's name of a tensor of the layer."""
        return f"{self.prefix}.{own}" if self.prefix else own

    def keep_buffers(self) -> None:
        """Buffers stay where they are: whoever loads one writes into it, and whoever does not leaves it as it is."""
        for name, buffer in self.buffers.items():
            self.layer.register_buffer(name, buffer, persistent=name not in self.passing)

    def put_back(self) -> None:
        """Give the layer its own tensors again, with whatever is in them."""
        for name, tensor in [*self.layer._parameters.items(), *self.layer._buffers.items()]:
            if tensor is not None:
                delattr(self.layer, name)
        for name, parameter in self.parameters.items():
            self.layer.register_parameter(name, parameter)
        for name, buffer in self.buffers.items():
            self.layer.register_buffer(name, buffer, persistent=name not in self.passing)
        for name, tensor in self.attributes.items():
            if name in vars(self.layer):
                setattr(self.layer, name, tensor)

    def _changed(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        now = {**vars(self.layer), **self.layer._buffers, **self.layer._parameters}
        for name, old in {**self.attributes, **self.buffers, **self.parameters}.items():
            new = now.get(name)
            if new is not None and new is not old:
                yield name, old, new

    def check_shapes(self) -> None:
        """Raise if a tensor is of another shape or dtype than before: a copy would fill it with a part of another."""
        for name, old, new in self._changed():
            if new.shape != old.shape or new.dtype != old.dtype:
                raise WeightSyncError(
                    f"{self.name(name)} is {new.dtype} of shape {tuple(new.shape)} now, and {old.dtype} of shape "
                    f"{tuple(old.shape)} for its kernel, and for captured graphs"
                )

    def restore_kernel_format(self) -> None:
        """Give the layer its own tensors again, with what is in those that processing has put in their places."""
        self.check_shapes()
        for _, old, new in self._changed():
            old.data.copy_(new.data)
        self.put_back()
