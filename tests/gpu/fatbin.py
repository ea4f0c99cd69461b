"""Device code in a CUDA library, cut down to one GPU: vLLM's wheel has the same kernels for ten kinds of GPU.

A library's section `.nv_fatbin` is a row of fat binaries, each a header and one entry for each architecture: machine
code (`sm_90`), or PTX, which the driver compiles where there is no machine code.  The driver looks at the headers and
reads the entry that it takes.  So the code of the other entries is overwritten with zeros, which a wheel's compression
makes vanish; no header, size or address changes.  Read off the libraries of vLLM 0.24.0 (CUDA 13.0), with `cuobjdump`
of the same toolkit to compare with.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from elftools.elf.elffile import ELFFile

MAGIC = 0xBA55ED50
HEADER = struct.Struct("<IHHQ")
"""Of a fat binary: magic, version, bytes of this header, bytes of all entries."""

ENTRY = struct.Struct("<HHIQ8xHHI")
"""The beginning of an entry's header: kind, version, bytes of this header, bytes of its code; then the version of the
code's format (minor, major) and the architecture, as 90."""

PTX, MACHINE_CODE = 1, 2


class FatbinError(ValueError):
    """A library's device code is not laid out as is known here; nothing of it was changed."""


@dataclass(frozen=True)
class Entry:
    """One entry of a fat binary: its kind, its architecture (90 for sm_90 and sm_90a), where its code is."""

    kind: int
    architecture: int
    start: int
    end: int


def fat_binaries(library: bytes) -> Iterator[list[Entry]]:
    """The entries of each fat binary of an ELF library; positions are those in the file.

    Raises:
        FatbinError: the section holds something else than fat binaries.
    """
    section = ELFFile(io.BytesIO(library)).get_section_by_name(".nv_fatbin")
    if section is None:
        return
    at, end = section["sh_offset"], section["sh_offset"] + section["sh_size"]
    while at < end:
        magic, version, header, size = HEADER.unpack_from(library, at)
        if magic == 0:  # padding up to the next one
            at += 4
            continue
        if (magic, version) != (MAGIC, 1) or at + header + size > end:
            raise FatbinError(f"no fat binary of version 1 at byte {at} of the library")
        yield list(_entries(library, at + header, at + header + size))
        at += header + size


def _entries(library: bytes, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        kind, _, header, size, _, _, architecture = ENTRY.unpack_from(library, at)
        if kind not in (PTX, MACHINE_CODE) or header < ENTRY.size or at + header + size > end:
            raise FatbinError(f"an entry of kind {kind} that is not known, at byte {at} of the library")
        yield Entry(kind, architecture, at + header, at + header + size)
        at += header + size


def needed(entries: list[Entry], architecture: int) -> list[Entry]:
    """What a GPU of that architecture can take of one fat binary: what is its own, and PTX up to its own where it has
    no machine code.  PTX of its own stays beside machine code, since `cuobjdump -arch sm_90` reads both."""
    own = [entry for entry in entries if entry.architecture == architecture]
    if any(entry.kind == MACHINE_CODE for entry in own):
        return own
    return [entry for entry in entries if entry.kind == PTX and entry.architecture <= architecture]


def keep_only(library: bytes, architecture: int) -> tuple[bytes, int]:
    """The library with the code of all other architectures zeroed, and how many bytes of code are left.

    Raises:
        FatbinError: see `fat_binaries`.
    """
    cut = bytearray(library)
    left = 0
    for entries in fat_binaries(library):
        kept = needed(entries, architecture)
        left += sum(entry.end - entry.start for entry in kept)
        for entry in entries:
            if entry not in kept:
                cut[entry.start : entry.end] = bytes(entry.end - entry.start)
    return bytes(cut), left
