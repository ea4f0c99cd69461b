"""Which tensors a checkpoint has for a parameter: for errors that name what is missing as the trainer names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from verl_ascend_rollout.worker.weights.account import Writer
from verl_ascend_rollout.worker.weights.region import Region


class Expected:
    """What is known of the names of a stream: from the last sync that passed, or from the layers beside."""

    def __init__(
        self,
        known: Mapping[str, Sequence[Writer]],
        writers: Mapping[str, Sequence[Writer]],
        packed: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Begin.

        Args:
            known: for each parameter what the last sync that passed has written into it; empty if there was none.
            writers: for each parameter what this sync has written into it.
            packed: what a model's modules are made of, by the last part of their names: q, k and v.
        """
        self._known = known
        self._writers = writers
        self._packed = packed
        self._alike: dict[str, list[str]] = {}
        for target in writers:
            self._alike.setdefault(_pattern(target), []).append(target)

    def of(self, target: str, part: Region) -> Iterator[Writer]:
        """Yield the tensors that belong into a parameter, with their places.

        Args:
            target: the name of the parameter.
            part: all of it; with three axes, the first counts experts.
        """
        if target in self._known:
            yield from self._known[target]
            return
        experts = self._expert(target, part) if len(part.size) == 3 else []
        yield from experts
        beside = [other for other in self._alike.get(_pattern(target), ()) if other != target]
        if beside and not experts:
            # The one of which most came; the first number is the layer's.
            fullest = max(beside, key=lambda other: len(self._writers[other]))
            apart = [two - one for one, two in zip(_numbers(fullest), _numbers(target), strict=True)]
            place = next(place for place, distance in enumerate(apart) if distance)
            for name, region in self._writers[fullest]:
                if len(_numbers(name)) > place:
                    yield _with_number(name, place, apart[place]), region
        elif not experts:
            yield from self._beside(target, part)

    def _beside(self, target: str, part: Region) -> Iterator[Writer]:
        """Yield what belongs into a fused projection and has not come, by what has: q and k, so v."""
        names = next((found for packed, found in self._packed.items() if packed in target.split(".")), ())
        written = {name for name, _ in self._writers.get(target, ())}
        for name in written:
            pieces = name.split(".")
            place = next((at for at, piece in enumerate(pieces) if piece in names), None)
            for other in names if place is not None else ():
                sibling = ".".join((*pieces[:place], other, *pieces[place + 1 :])) if place is not None else name
                if sibling not in written:
                    yield sibling, part

    def _expert(self, target: str, part: Region) -> list[Writer]:
        """Return what belongs into each expert, by the one of which most came; nothing where its names do not tell."""
        experts: dict[int, list[Writer]] = {}
        for name, region in self._writers.get(target, ()):
            experts.setdefault((region.offset - part.offset) // part.stride[0], []).append((name, region))
        if not experts:
            return []
        fullest = max(experts, key=lambda expert: len(experts[expert]))
        others = [(name, expert) for expert, found in experts.items() if expert != fullest for name, _ in found]
        predicted: list[Writer] = []
        for name, region in experts[fullest]:
            place = _place_of_expert(name, fullest, others)
            if place is None:
                continue
            for expert in range(part.size[0]):
                moved = replace(region, offset=region.offset + (expert - fullest) * part.stride[0])
                predicted.append((_with_number(name, place, expert - fullest), moved))
        return predicted


def _place_of_expert(name: str, expert: int, others: Sequence[tuple[str, int]]) -> int | None:
    """Return which of the numbers in a tensor's name counts experts: the one that differs as they do; `None` if none
    does."""
    numbers = _numbers(name)
    for other, its_expert in others:
        if _pattern(other) == _pattern(name):
            apart = [one - two for one, two in zip(numbers, _numbers(other), strict=True)]
            found = [place for place, distance in enumerate(apart) if distance]
            return found[0] if len(found) == 1 and apart[found[0]] == expert - its_expert else None
    alone = [place for place, number in enumerate(numbers) if number == expert]
    return alone[0] if len(alone) == 1 and not others else None


def _with_number(name: str, place: int, more: int) -> str:
    """Return a name with one of its numbers raised."""
    parts = name.split(".")
    index = [at for at, part in enumerate(parts) if part.isdigit()][place]
    parts[index] = str(int(parts[index]) + more)
    return ".".join(parts)


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _pattern(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))
