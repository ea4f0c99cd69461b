"""The manifest of a weight sync: every name that should come, did come, and only once.

Every mismatch is collected, and one error lists them all: a job that dies of a bad sync should die with the whole
reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

LISTED = 8
"""How many names of each kind an error lists before it counts the rest."""


class WeightSyncError(RuntimeError):
    """A weight sync did not bring the model that this engine serves; the engine must not generate until one does."""


@dataclass
class Manifest:
    """What one sync should bring and what it has brought.

    Attributes:
        complete: whether parameters that never came are an error in this sync (free: names are counted anyway).
        finite: whether values that are NaN or Inf are an error in this sync (reads every byte once).
        compare: whether what was written is read back, through the view that it was written through, and compared with
            what came (reads every byte twice more).
        sync: the number of the sync, from 1, for messages.
        names: names received, each with the bytes of its tensor.
        refused: names of tensors that the model does not take, each with the reason.
    """

    complete: bool = True
    finite: bool = True
    compare: bool = False
    sync: int = 1
    names: dict[str, int] = field(default_factory=dict)
    _duplicates: list[str] = field(default_factory=list)
    _not_finite: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    _not_as_sent: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes received."""
        return sum(self.names.values())

    def receive(self, name: str, tensor: torch.Tensor) -> bool:
        """Note a tensor that came; say whether to load it (a duplicate is noted and not loaded)."""
        if name in self.names:
            self._duplicates.append(name)
            return False
        self.names[name] = tensor.nbytes
        if self.finite and tensor.is_floating_point() and _has_nan_or_inf(tensor):
            self._not_finite.append(name)
        return True

    def refuse(self, name: str, reason: str) -> None:
        """Note a tensor that the model does not take: a name that it does not have, a wrong shape, a wrong dtype."""
        self.refused[name] = reason

    def not_as_sent(self, name: str) -> None:
        """Note a tensor that is not in the model as it came."""
        # A NaN differs from itself, and is reported as what it is.
        if name not in self._not_finite and name not in self._not_as_sent:
            self._not_as_sent.append(name)

    def check(self, missing: list[str], duplicates: Sequence[str] = ()) -> None:
        """Raise if the sync was not the whole model.

        Args:
            missing: the model's own names of parameters that nothing was loaded into.
            duplicates: parts of the model that were written more than once, by tensors of different names.

        Raises:
            WeightSyncError: listing missing, duplicate, refused and not-finite tensors, and those that are not in the
                model as they came, all at once.
        """
        if not self.complete:
            missing = []
        findings = [
            _list_names("missing from the stream", missing),
            _list_names("sent more than once", [*self._duplicates, *duplicates]),
            _list_names("refused by the model", [f"{name} ({reason})" for name, reason in self.refused.items()]),
            _list_names("holding NaN or Inf", self._not_finite),
            _list_names("not in the model as they came", self._not_as_sent),
        ]
        found = [finding for finding in findings if finding]
        if found:
            raise WeightSyncError(
                f"Weight sync {self.sync} ({len(self.names)} tensors, {self.bytes} bytes) is not the whole model: "
                + "; ".join(found)
                + ". The engine generates nothing until a full sync has passed"
            )


_EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00)}
"""For floats of two bytes: an integer of the same size, and the bits of the exponent, all of which NaN and Inf have."""


def differs(written: torch.Tensor, sent: torch.Tensor) -> bool:
    """Whether a part of the model is not what was sent, cast to the model's dtype."""
    sent = sent.to(device=written.device, dtype=written.dtype)
    if written.is_contiguous() and written.device.type == "cpu":
        sent = sent.contiguous()
        # torch.equal on bf16 does 1.4 GB/s, on integers of eight bytes 7.7 (one core of a cloud machine).
        wide = torch.int64 if written.nbytes % 8 == 0 and _aligned(written) and _aligned(sent) else torch.uint8
        return not torch.equal(written.view(-1).view(wide), sent.view(-1).view(wide))
    return not torch.equal(written, sent)


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.storage_offset() * tensor.element_size() % 8 == 0 and tensor.dim() > 0


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _has_nan_or_inf(tensor: torch.Tensor) -> bool:
    if tensor.dtype in _EXPONENTS and tensor.device.type == "cpu" and tensor.numel():
        # 12 GB/s, where isfinite does 0.5 (bf16, one core of a cloud machine).
        integer, exponent = _EXPONENTS[tensor.dtype]
        return int((tensor.view(integer) & 0x7FFF).amax()) >= exponent
    # A NaN or Inf anywhere makes the sum one; a sum that overflows by itself is worth the closer look.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return False
    # torch 2.13 has no isfinite for float8_e4m3fn.
    exact = tensor.float() if tensor.element_size() == 1 else tensor
    return not bool(torch.isfinite(exact).all())


def _list_names(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} parameters {what}: {', '.join(names[:LISTED])}{more}"
