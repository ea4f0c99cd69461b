"""The manifest of a weight sync: every name that should come, did come, and only once.

Every mismatch is collected, and one error lists them all: a job that dies of a bad sync should die with the whole
reason.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch

from verl_ascend_rollout.worker.weights.account import Findings

LISTED = 40
"""How many names of each kind an error lists before it counts the rest."""


class WeightSyncError(RuntimeError):
    """A weight sync did not bring the model that this engine serves; the engine must not generate until one does."""


@dataclass
class Manifest:
    """What one sync should bring and what it has brought."""

    finite: bool = True  # whether values that are NaN or Inf are an error in this sync (reads every byte once)
    # Whether what was written is read back, through the view that it was written through, and compared with what came
    # (reads every byte twice more).
    compare: bool = False
    sync: int = 1  # the number of the sync, for messages
    names: dict[str, int] = field(default_factory=dict)  # received, each with the bytes of its tensor
    _duplicates: list[str] = field(default_factory=list)
    _not_finite: list[str] = field(default_factory=list)
    _overflowing: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # names of tensors that the model does not take, with why
    copies: int = 0  # how many brought them into place
    _not_as_sent: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes received."""
        return sum(self.names.values())

    def receive(self, name: str, tensor: torch.Tensor) -> bool:
        """Note a tensor that came; say whether to load it (what came before, or has no elements, is noted and not)."""
        if name in self.names:
            self._duplicates.append(name)
            return False
        self.names[name] = tensor.nbytes
        if not tensor.numel():
            self.refuse(name, f"has no elements, shape {tuple(tensor.shape)}: is it a shard that was not gathered?")
            return False
        if self.finite:
            self.look(name, tensor)
        return True

    def look(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor that has a NaN or an Inf."""
        if name not in self._not_finite and tensor.is_floating_point() and _has_nan_or_inf(tensor):
            self._not_finite.append(name)

    def refuse(self, name: str, reason: str) -> None:
        """Note a tensor that the model does not take: a name that it does not have, a wrong shape, a wrong dtype."""
        self.refused.setdefault(name, reason)

    def look_after_cast(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        """Note a tensor whose values are finite and too large for the dtype of its parameter."""
        if not (tensor.is_floating_point() and dtype.is_floating_point) or name in self._not_finite:
            return
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and _has_nan_or_inf(tensor.to(dtype)):
            self._overflowing[name] = f"{tensor.dtype} cast to {dtype}"

    def not_as_sent(self, name: str) -> None:
        """Note a tensor that is not in the model as it came."""
        # A NaN differs from itself, and is reported as what it is.
        if name not in self._not_finite and name not in self._overflowing and name not in self._not_as_sent:
            self._not_as_sent.append(name)

    def check_findings(self, found: Findings) -> None:
        """Raise if the sync was not the whole model: see `check`."""
        for name, reason in found.short.items():
            self.refuse(name, reason)
        self.check(sorted(set(found.missing)), found.twice, found.displaced)

    def check(
        self, missing: Sequence[str] = (), duplicates: Sequence[str] = (), displaced: Container[str] = ()
    ) -> None:
        """Raise if the sync was not the whole model.

        Args:
            missing: names of tensors that should have come and did not.
            duplicates: names of tensors whose place another one had been written into.
            displaced: names of those others, of which it is no wonder that they are not in the model as they came.

        Raises:
            WeightSyncError: listing missing, duplicate, refused and not-finite tensors, and those that are not in the
                model as they came, all at once.
        """
        findings = [
            _list_names("missing from the stream", missing),
            _list_names("sent more than once", [*self._duplicates, *duplicates]),
            _list_names("refused by the model", [f"{name} ({reason})" for name, reason in self.refused.items()]),
            _list_names("holding NaN or Inf", self._not_finite),
            _list_names("Inf after the cast", [f"{name} ({cast})" for name, cast in self._overflowing.items()]),
            _list_names("not in the model as they came", [name for name in self._not_as_sent if name not in displaced]),
        ]
        found = [finding for finding in findings if finding]
        if found:
            raise WeightSyncError(
                f"Weight sync {self.sync} ({len(self.names)} tensors, {self.bytes} bytes) is not the whole model: "
                + "; ".join(found)
                + ". The engine generates nothing until a full sync has passed"
            )


def few(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


_EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00)}
"""For floats of two bytes: an integer of the same size, and the bits of the exponent, all of which NaN and Inf have."""

_IN_CACHE = 2**19
"""Elements that are looked at together."""


def differs(written: torch.Tensor, sent: torch.Tensor) -> bool:
    """Return whether a part of the model is not what was sent, cast to the model's dtype."""
    sent = sent.to(device=written.device, dtype=written.dtype)
    if written.numel() == 1:
        return not torch.equal(written.reshape(()), sent.reshape(()))  # of any stride
    if written.is_contiguous() and written.device.type == "cpu":
        sent = sent.contiguous()
        # torch.equal on bf16 does 1.4 GB/s, on integers of eight bytes 7.7 (one core of a cloud machine).
        wide = torch.int64 if written.nbytes % 8 == 0 and _aligned(written) and _aligned(sent) else torch.uint8
        return not torch.equal(written.view(-1).view(wide), sent.view(-1).view(wide))
    return not torch.equal(written, sent)


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.storage_offset() * tensor.element_size() % 8 == 0 and tensor.dim() > 0


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    # vLLM adds all the names that there are (0.28, models/utils.py, AutoWeightsLoader).
    text = str(error).partition(" The available parameters belonging to ")[0].strip()
    return text.splitlines()[0] if text else type(error).__name__


def _has_nan_or_inf(tensor: torch.Tensor) -> bool:
    if tensor.dtype in _EXPONENTS and tensor.device.type == "cpu" and tensor.numel():
        # 8 GB/s, where isfinite does 0.5, and a whole tensor at once 2 (bf16, one core of a cloud machine).
        integer, exponent = _EXPONENTS[tensor.dtype]
        pieces = torch.split(tensor.reshape(-1).view(integer), _IN_CACHE)
        scratch = torch.empty_like(pieces[0])
        worst = [torch.bitwise_and(piece, 0x7FFF, out=scratch[: len(piece)]).amax() for piece in pieces]
        return int(torch.stack(worst).amax()) >= exponent
    # A NaN or Inf anywhere makes the sum one; a sum that overflows by itself is worth the closer look.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return False
    # torch 2.13 has no isfinite for float8_e4m3fn.
    exact = tensor.float() if tensor.element_size() == 1 else tensor
    return not bool(torch.isfinite(exact).all())


def _list_names(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} parameters {what}: {', '.join(names[:LISTED])}{more}"
