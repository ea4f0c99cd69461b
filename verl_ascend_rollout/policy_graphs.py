"""Which graphs are captured: the mode, and the batch sizes.

On Ascend a captured graph holds streams of the chip, of which there are 2048.  In PIECEWISE mode each layer is a graph
of its own, and vllm-ascend 0.11 to 0.18 thins the list of sizes out until what it needs fits (`piecewise_limit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from verl_ascend_rollout.decisions import Decision
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.policy_npu import vllm_ascend_release
from verl_ascend_rollout.wishes import ROLLOUT, VLLM_KWARGS, Wishes

STREAMS = 1800
"""Streams that vllm-ascend 0.11 to 0.18 lets graphs take (0.11 utils.py:387, 0.13:441, 0.18:464)."""

EAGER_SOURCE = "vllm 0.11 vllm/config/__init__.py:380, 0.13 config/vllm.py:721, 0.18:787, 0.23:1054, 0.28:1284"

LAST_SIZE = 512
"""The largest batch that vLLM, and vllm-ascend, capture by themselves."""


def cudagraph_mode(facts: PlatformFacts, wish: Wishes, eager: bool) -> Decision:
    """vLLM's `cudagraph_mode`."""
    name = "cudagraph_mode"
    if eager:
        return Decision(name, "NONE", "enforce_eager is on", EAGER_SOURCE, "read")
    if facts.name == "cpu":
        return Decision(name, "NONE", "vLLM captures no graphs on a CPU", "vllm 0.28 vllm/platforms/cpu.py:195", "read")
    wished = wish.compilation_config.get("cudagraph_mode")
    release = vllm_ascend_release(facts) if facts.name == "npu" else None
    if wished is not None:
        reason = "you set it"
        if facts.name == "npu" and wished == "FULL_AND_PIECEWISE" and release is not None and release < (0, 23):
            reason = f"you set it; vllm-ascend {release[0]}.{release[1]} makes PIECEWISE of it"
        if facts.name == "npu" and wished == "FULL" and release is not None and release < (0, 13):
            reason = "you set it; vllm-ascend 0.11 knows no FULL and captures nothing"  # platform.py:243-248
        return Decision(name, str(wished), reason, f"{VLLM_KWARGS}.compilation_config.cudagraph_mode", "read")
    if facts.name == "cuda":
        return Decision(
            name,
            "FULL_AND_PIECEWISE",
            "verl's default",
            "verl 0.9.1 vllm_rollout/vllm_async_server.py:310",
            "read",
        )
    if release is None or release < (0, 18):
        return Decision(
            name,
            "PIECEWISE",
            "what vllm-ascend makes of verl's FULL_AND_PIECEWISE before 0.23",
            "vllm-ascend 0.11 vllm_ascend/platform.py:207, 0.13:236, 0.18:354",
            "read",
        )
    return Decision(
        name,
        "FULL_DECODE_ONLY",
        "decoding is what a rollout spends its time on, and one graph a batch size needs few streams",
        "vllm-ascend 0.18 vllm_ascend/platform.py:389-397, 0.23:630-633; verl docs/ascend_tutorial/examples/"
        "gspo_optimization_practice.md",
        "inferred",
    )


def capture_sizes(facts: PlatformFacts, wish: Wishes, mode: str) -> Decision:
    """vLLM's `cudagraph_capture_sizes`: how many sequences a captured batch has; `None` leaves the list to vLLM."""
    name = "cudagraph_capture_sizes"
    if mode == "NONE":
        return Decision(name, None, "no graphs are captured", "cudagraph_mode", "read")
    thinned = _thinned(facts, wish, mode)
    wished, where = wished_sizes(wish)
    if wished is not None:
        reason = "you set it"
        if thinned is not None and len(wished) > thinned:
            reason += f"; vllm-ascend keeps {thinned} of these {len(wished)}, which is what {STREAMS} streams allow"
        return Decision(name, list(wished), reason, where, "read")
    if facts.name == "cuda":
        return Decision(
            name,
            None,
            "vLLM's own list: 1, 2, 4, then every 8th up to 256 and every 16th up to the smaller of "
            "2 x max_num_seqs and 512 (1024 on a Blackwell of a data centre)",
            "vllm 0.28 vllm/config/vllm.py:1933-1984",
            "read",
        )
    release = vllm_ascend_release(facts)
    piecewise = "PIECEWISE" in mode
    if release is not None and release >= (0, 23):
        if facts.soc == "A5" and piecewise:
            return Decision(
                name,
                None,
                "vllm-ascend keeps 4 sizes of its list on A5",
                "vllm-ascend 0.23 vllm_ascend/platform.py:76, 109-125",
                "read",
            )
        return Decision(
            name,
            None,
            f"vllm-ascend's own list, which ends at the smaller of max_num_seqs ({wish.max_num_seqs}) and {LAST_SIZE}; "
            "its limit on streams is gone",
            "vllm-ascend 0.23 vllm_ascend/platform.py:207-241, 0.28:1392-1426",
            "read",
        )
    if piecewise:
        if thinned is None:
            allowed = "how many depends on the number of layers, which is not known here"
        else:
            allowed = f"for {wish.model.layers} layers that is {thinned} sizes"
        return Decision(
            name,
            None,
            f"vllm-ascend thins vLLM's list out until all graphs fit into {STREAMS} streams: {allowed}",
            "vllm-ascend 0.11 vllm_ascend/utils.py:379, 0.13:433, 0.18:456 (update_aclgraph_sizes)",
            "read",
        )
    return Decision(
        name,
        short_list(wish.max_num_seqs),
        "vllm-ascend does not thin the list out in this mode, and warns that too many sizes end in out of memory or a "
        "hang: a short one",
        "vllm-ascend 0.11 vllm_ascend/platform.py:224-241, 0.13:274-293, 0.18:389-410; verl "
        "docs/ascend_tutorial/examples/gspo_optimization_practice.md (8,16,32,64,128)",
        "inferred",
    )


def conflicts(facts: PlatformFacts, wish: Wishes, mode: str) -> Iterator[str]:
    """What the user asks of graphs and cannot work, one sentence each."""
    sizes, where = wished_sizes(wish)
    if sizes is not None and (not sizes or min(sizes) < 1):
        yield f"{where}={list(sizes)} cannot work: it takes batch sizes of 1 and more"
    passed = wish.compilation_config.get("cudagraph_capture_sizes")
    if wish.cudagraph_capture_sizes and passed and sorted(passed) != sorted(wish.cudagraph_capture_sizes):
        # verl 0.9.1 vllm_async_server.py:321.
        yield (
            f"{ROLLOUT}.cudagraph_capture_sizes and {VLLM_KWARGS}.compilation_config.cudagraph_capture_sizes differ, "
            "and verl drops the second without a word: set one of them"
        )
    thinned = _thinned(facts, wish, mode)
    if thinned is not None and thinned < 2 and (sizes is None or len(sizes) > max(thinned, 0)):
        # It divides by the number less one (vllm-ascend 0.11 utils.py:463, 0.13:534, 0.18:562).
        yield (
            f"cudagraph_mode={mode} cannot work with {wish.model.layers} layers on this many devices: {STREAMS} "
            f"streams are enough for {max(thinned, 0)} batch size(s), and vllm-ascend fails below 2; set "
            f"HCCL_OP_EXPANSION_MODE=AIV, or {ROLLOUT}.enforce_eager=True, or cudagraph_mode=FULL_DECODE_ONLY"
        )


def wished_sizes(wish: Wishes) -> tuple[tuple[int, ...] | None, str]:
    """The capture sizes that the user set, and where.  verl's own field goes before `engine_kwargs` here."""
    if wish.cudagraph_capture_sizes:
        return wish.cudagraph_capture_sizes, f"{ROLLOUT}.cudagraph_capture_sizes"
    passed = wish.compilation_config.get("cudagraph_capture_sizes")
    where = f"{VLLM_KWARGS}.compilation_config.cudagraph_capture_sizes"
    return (None, where) if passed is None else (tuple(int(size) for size in passed), where)


def short_list(max_num_seqs: int) -> list[int]:
    """Powers of two up to 64, then every 64th up to the most sequences that are decoded at once: padding is at most
    half of a batch below 64, and less than 64 sequences above."""
    last = min(max_num_seqs, LAST_SIZE)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= last]
    sizes += range(128, last + 1, 64)
    return sizes if sizes[-1] == last else [*sizes, last]


def piecewise_limit(wish: Wishes, aiv: bool) -> int | None:
    """How many batch sizes vllm-ascend 0.11 to 0.18 captures at most in PIECEWISE mode; `None` without a known model.

    Its own formula (0.18 vllm_ascend/utils.py:488-549), without a drafter and without context parallelism, each of
    which takes more off.

    Args:
        aiv: HCCL_OP_EXPANSION_MODE is AIV.
    """
    layers = wish.model.layers
    if layers is None:
        return None
    groups = (wish.data_parallel_size > 1) + (wish.tensor_parallel_size > 1)
    graph = layers + 1
    if not aiv:
        return math.floor((STREAMS - groups * 40) / graph / (1 + groups * 2))
    factor = 1 + groups + wish.expert_parallel
    factor += bool(wish.additional_config.get("multistream_overlap_shared_expert"))
    streams = STREAMS
    if wish.model.experts:
        factor += wish.data_parallel_size > 1
    else:
        streams -= factor * graph
    return math.floor(streams / graph / factor)


def _thinned(facts: PlatformFacts, wish: Wishes, mode: str) -> int | None:
    """The limit that holds here, or `None` where none does, or none is known."""
    release = vllm_ascend_release(facts) if facts.name == "npu" else None
    if release is None or release >= (0, 23) or "PIECEWISE" not in mode:
        return None
    return piecewise_limit(wish, wish.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV")
