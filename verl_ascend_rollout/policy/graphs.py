"""Which graphs are captured: the mode, and the batch sizes.

On Ascend a captured graph holds streams of the chip, of which there are 2048.  In PIECEWISE mode each layer is a graph
of its own, and vllm-ascend 0.11 to 0.20 thins the list of sizes out until what it needs fits (`piecewise_limit`).  From
0.21 on it does not, since newer drivers hold more; on others the capture fails (vllm-ascend#9962, #9564).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from verl_ascend_rollout.options import ROLLOUT
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.policy import releases
from verl_ascend_rollout.policy.decision import Decision
from verl_ascend_rollout.policy.releases import Release, vllm_ascend_release
from verl_ascend_rollout.policy.request import VLLM_KWARGS, EngineRequest

STREAMS = 1800
"""Streams that vllm-ascend 0.11 to 0.20 lets graphs take (0.11 utils.py:387, 0.13:441, 0.18:464)."""

EAGER_SOURCE = "vllm 0.11 vllm/config/__init__.py:380, 0.13 config/vllm.py:721, 0.18:787, 0.23:1054, 0.28:1284"

LAST_SIZE = 512
"""The largest batch that vLLM, and vllm-ascend, capture by themselves."""


def cudagraph_mode(facts: PlatformFacts, request: EngineRequest, eager: bool) -> Decision:
    """vLLM's `cudagraph_mode`."""
    name = "cudagraph_mode"
    if eager:
        return Decision(name, "NONE", "enforce_eager is on", EAGER_SOURCE, "read")
    if facts.name == "cpu":
        return Decision(name, "NONE", "vLLM captures no graphs on a CPU", "vllm 0.28 vllm/platforms/cpu.py:195", "read")
    wished = request.compilation_config.get("cudagraph_mode")
    release = vllm_ascend_release(facts)
    if wished is not None:
        reason = "you set it"
        if wished == "FULL_AND_PIECEWISE" and release and releases.THINS_SIZES.is_in(release):
            reason = f"you set it; vllm-ascend {release[0]}.{release[1]} makes PIECEWISE of it"
        if wished == "FULL" and not releases.FULL_MODE.may_be_in(release):
            reason = "you set it; vllm-ascend 0.11 knows no FULL and captures nothing"
        return Decision(name, str(wished), reason, f"{VLLM_KWARGS}.compilation_config.cudagraph_mode", "read")
    if facts.name == "cuda":
        return Decision(
            name,
            "FULL_AND_PIECEWISE",
            "verl's default",
            "verl 0.9.1 vllm_rollout/vllm_async_server.py:310",
            "read",
        )
    if not releases.FULL_GRAPHS.is_in(release):
        return Decision(
            name,
            "PIECEWISE",
            "what vllm-ascend makes of verl's FULL_AND_PIECEWISE before 0.21",
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


def capture_sizes(facts: PlatformFacts, request: EngineRequest, mode: str) -> Decision:
    """vLLM's `cudagraph_capture_sizes`: how many sequences a captured batch has; `None` leaves the list to vLLM."""
    name = "cudagraph_capture_sizes"
    if mode == "NONE":
        return Decision(name, None, "no graphs are captured", "cudagraph_mode", "read")
    release = vllm_ascend_release(facts)
    thinned = _thinned(facts, request, mode)
    fits = _fits(facts, request, mode)
    wished, where = wished_sizes(request)
    if wished is not None:
        reason = "you set it"
        if thinned is not None and len(wished) > thinned:
            reason += f"; vllm-ascend keeps {thinned} of these {len(wished)}, which is what {STREAMS} streams allow"
        if fits is not None and len(wished) > fits:
            reason += f"; {STREAMS} streams allow {fits} of these {len(wished)}: with an old driver the capture fails"
        if _sequence_parallel(facts, request) and len(_multiples(wished, request)) < len(wished):
            reason += f"; sequence parallelism keeps the multiples of {request.tensor_parallel_size}"
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
    piecewise = "PIECEWISE" in mode
    thins = releases.THINS_SIZES.may_be_in(release)
    if not thins and facts.soc == "A5" and piecewise:
        return Decision(
            name,
            None,
            "vllm-ascend keeps 4 sizes of its list on A5",
            "vllm-ascend 0.22.1 vllm_ascend/platform.py:107-117, 0.23:76, 109-125",
            "read",
        )
    if piecewise or not thins:
        return _vllm_ascends_list(facts, request, release, thinned, fits)
    sizes = short_list(request.max_num_seqs)
    reason = (
        "vllm-ascend does not thin the list out in this mode, and warns that too many sizes end in out of memory or a "
        "hang: a short one"
    )
    if _sequence_parallel(facts, request):
        sizes, reason = (
            _multiples(sizes, request),
            f"{reason}, of the multiples of TP, which sequence parallelism keeps",
        )
    return Decision(
        name,
        sizes,
        reason,
        "vllm-ascend 0.11 vllm_ascend/platform.py:224-241, 0.13:274-293, 0.18:389-410; verl "
        "docs/ascend_tutorial/examples/gspo_optimization_practice.md (8,16,32,64,128)",
        "inferred",
    )


def _vllm_ascends_list(
    facts: PlatformFacts, request: EngineRequest, release: Release | None, thinned: int | None, fits: int | None
) -> Decision:
    """vllm-ascend's own list, where it is right, else one in its place."""
    name = "cudagraph_capture_sizes"
    source = "vllm-ascend 0.18 vllm_ascend/platform.py:157-209, 0.22.1:205-259, 0.23:207-241, 0.28:1392-1426"
    last = min(request.max_num_seqs, LAST_SIZE)
    listed = vllms_list(last)
    whole = listed if listed and listed[-1] == last else [*listed, last]
    if _sequence_parallel(facts, request):
        whole = _multiples(whole, request)
    if fits is not None and 2 <= fits < len(whole):
        return Decision(
            name,
            _evenly(whole, fits),
            f"vllm-ascend does not thin its list of {len(whole)} sizes out any more, and for {request.model.layers} "
            f"layers {STREAMS} streams, which is what older drivers have for graphs, allow {fits}: so many of them",
            f"vllm-ascend#9962, #9564; {source}",
            "inferred",
        )
    if thinned is None:
        allowed = "how many depends on the number of layers, which is not known here"
    else:
        allowed = f"for {request.model.layers} layers that is {thinned} sizes"
    thins = f"thins it out until all graphs fit into {STREAMS} streams: {allowed}"
    ends_early = whole != listed and not _sequence_parallel(facts, request)
    if ends_early and releases.OWN_LIMIT.may_be_in(release):
        return Decision(
            name,
            whole,
            f"vllm-ascend's own list, and max_num_seqs ({request.max_num_seqs}), which is not in it: batches above "
            f"{listed[-1] if listed else 0} would run without a graph"
            + (f"; vllm-ascend {thins}" if releases.THINS_SIZES.may_be_in(release) else ""),
            f"vllm-ascend#16049; {source}",
            "inferred",
        )
    if not releases.THINS_SIZES.may_be_in(release):
        kept = f", of which sequence parallelism keeps the multiples of {request.tensor_parallel_size}"
        return Decision(
            name,
            None,
            f"vllm-ascend's own list, which ends at the smaller of max_num_seqs ({request.max_num_seqs}) and "
            f"{LAST_SIZE}{kept if _sequence_parallel(facts, request) else ''}; its limit on streams is gone",
            source,
            "read",
        )
    return Decision(
        name,
        None,
        f"vLLM's own list; vllm-ascend {thins}",
        "vllm-ascend 0.11 vllm_ascend/utils.py:379, 0.13:433, 0.18:456, 0.20.2:567 (update_aclgraph_sizes)",
        "read",
    )


def conflicts(facts: PlatformFacts, request: EngineRequest, mode: str) -> Iterator[str]:
    """Yield what the user asks of graphs and cannot work, one sentence each."""
    sizes, where = wished_sizes(request)
    if sizes is not None and (not sizes or min(sizes) < 1):
        yield f"{where}={list(sizes)} cannot work: it takes batch sizes of 1 and more"
    passed = request.compilation_config.get("cudagraph_capture_sizes")
    if request.cudagraph_capture_sizes and passed and sorted(passed) != sorted(request.cudagraph_capture_sizes):
        # verl 0.9.1 vllm_async_server.py:321.
        yield (
            f"{ROLLOUT}.cudagraph_capture_sizes and {VLLM_KWARGS}.compilation_config.cudagraph_capture_sizes differ, "
            "and verl drops the second without a word: set one of them"
        )
    if mode != "NONE" and _sequence_parallel(facts, request):
        of = list(sizes) if sizes is not None else vllms_list(min(request.max_num_seqs, LAST_SIZE))
        if of and not _multiples(of, request):
            # It asserts that something is left (vllm-ascend 0.18 platform.py:340, 0.23:557).
            yield (
                f"sequence parallelism (VLLM_ASCEND_ENABLE_FLASHCOMM1) keeps the multiples of "
                f"{ROLLOUT}.tensor_model_parallel_size={request.tensor_parallel_size} of the captured batch sizes, and "
                f"there is none in {of}: add one to {where}, or set {ROLLOUT}.enforce_eager=True"
            )
    thinned = _thinned(facts, request, mode)
    if thinned is not None and thinned < 2 and (sizes is None or len(sizes) > max(thinned, 0)):
        # It divides by the number less one (vllm-ascend 0.11 utils.py:463, 0.13:534, 0.18:562).
        yield (
            f"cudagraph_mode={mode} cannot work with {request.model.layers} layers on this many devices: {STREAMS} "
            f"streams are enough for {max(thinned, 0)} batch size(s), and vllm-ascend fails below 2; set "
            f"HCCL_OP_EXPANSION_MODE=AIV, or {ROLLOUT}.enforce_eager=True, or cudagraph_mode=FULL_DECODE_ONLY"
        )


def wished_sizes(request: EngineRequest) -> tuple[tuple[int, ...] | None, str]:
    """Return the capture sizes that the user set, and where.  verl's own field goes before `engine_kwargs` here."""
    if request.cudagraph_capture_sizes:
        return request.cudagraph_capture_sizes, f"{ROLLOUT}.cudagraph_capture_sizes"
    passed = request.compilation_config.get("cudagraph_capture_sizes")
    where = f"{VLLM_KWARGS}.compilation_config.cudagraph_capture_sizes"
    return (None, where) if passed is None else (tuple(int(size) for size in passed), where)


def short_list(max_num_seqs: int) -> list[int]:
    """Powers of two up to 64, then every 64th up to the most sequences that are decoded at once: padding is at most
    half of a batch below 64, and less than 64 sequences above."""
    last = min(max_num_seqs, LAST_SIZE)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= last]
    sizes += range(128, last + 1, 64)
    return sizes if sizes[-1] == last else [*sizes, last]


def vllms_list(last: int) -> list[int]:
    """Return the sizes that vLLM lists by itself up to `last` (vllm 0.18 config/vllm.py, _set_cudagraph_sizes)."""
    sizes = [*(size for size in (1, 2, 4) if size <= last), *range(8, min(last + 1, 256), 8), *range(256, last + 1, 16)]
    return sizes


def _evenly(sizes: list[int], count: int) -> list[int]:
    """So many of the sizes, evenly spread over the list, with the first and the last."""
    step = (len(sizes) - 1) / (count - 1)
    return [sizes[round(index * step)] for index in range(count)]


def _sequence_parallel(facts: PlatformFacts, request: EngineRequest) -> bool:
    """Whether vllm-ascend pads batches to multiples of TP, and so captures no other sizes.

    The variable is read by all releases, its older name until 0.18, the setting from 0.20 on (enable_sp in 0.18
    utils.py:774, 0.20.2 and 0.22.1 utils.py:847; the sizes in 0.11 platform.py:193, 0.13:223, 0.18:336, 0.22.1:550).
    """
    if facts.name != "npu" or request.tensor_parallel_size < 2:
        return False
    release = vllm_ascend_release(facts)
    setting = request.additional_config.get("enable_flashcomm1")
    if setting is not None and releases.SETTINGS.may_be_in(release):
        return bool(setting)
    names = ["VLLM_ASCEND_ENABLE_FLASHCOMM1"]
    if releases.FLASHCOMM.may_be_in(release):
        names.append("VLLM_ASCEND_ENABLE_FLASHCOMM")
    return any(request.environ.get(name, "0") not in ("", "0") for name in names)


def _multiples(sizes: Sequence[int], request: EngineRequest) -> list[int]:
    return [size for size in sizes if size % request.tensor_parallel_size == 0]


def piecewise_limit(request: EngineRequest, aiv: bool) -> int | None:
    """How many batch sizes vllm-ascend 0.11 to 0.20 captures at most in PIECEWISE mode; `None` without a known model.

    Its own formula (0.18 vllm_ascend/utils.py:488-549), without a drafter and without context parallelism, each of
    which takes more off.

    Args:
        aiv: HCCL_OP_EXPANSION_MODE is AIV.
    """
    layers = request.model.layers
    if layers is None:
        return None
    groups = (request.data_parallel_size > 1) + (request.tensor_parallel_size > 1)
    graph = layers + 1
    if not aiv:
        return math.floor((STREAMS - groups * 40) / graph / (1 + groups * 2))
    factor = 1 + groups + request.expert_parallel
    factor += bool(request.additional_config.get("multistream_overlap_shared_expert"))
    streams = STREAMS
    if request.model.experts:
        factor += request.data_parallel_size > 1
    else:
        streams -= factor * graph
    return math.floor(streams / graph / factor)


def _thinned(facts: PlatformFacts, request: EngineRequest, mode: str) -> int | None:
    """To how many sizes vllm-ascend thins the list out; `None` where it does not, or where that is not known."""
    release = vllm_ascend_release(facts)
    if "PIECEWISE" not in mode or not releases.THINS_SIZES.is_in(release):
        return None
    return piecewise_limit(request, request.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV")


def _fits(facts: PlatformFacts, request: EngineRequest, mode: str) -> int | None:
    """How many sizes the streams of an older driver allow, where nothing thins the list out."""
    release = vllm_ascend_release(facts)
    if release is None or releases.THINS_SIZES.is_in(release) or "PIECEWISE" not in mode or facts.soc == "A5":
        return None
    return piecewise_limit(request, request.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV")
