"""The stream of a Megatron trainer, by verl's engine and mbridge, leaves what a fresh load leaves.

Recorded from real trainers, so that these tests need none; `live_megatron.py` has the trainers themselves.
"""

from __future__ import annotations

import pytest
from megatron_stream import TRAINERS, rebuilt, recorded
from specimen import Specimen, named, refusal

MODELS = tuple(dict.fromkeys(family for family, _, _ in TRAINERS))


@pytest.mark.specimens(MODELS, ("bfloat16", "float16"))
@pytest.mark.parametrize("bucket", (1, 16, 10**9))
def test_the_streams_of_megatron_trainers_leave_what_a_fresh_load_leaves(specimen: Specimen, bucket: int) -> None:
    """One after the other, as after a restart with other ranks: each in another order than the last."""
    specimen.loaded.start_over()
    for family, tp, ep in TRAINERS:
        for which in "BA" if family == specimen.pair.family.name else "":
            stream = rebuilt(recorded(family, tp, ep), specimen.pair[which].published)
            said = refusal(lambda stream=stream: specimen.loaded.sync(stream, bucket=bucket, verify="always"))
            unlike = said or specimen.unlike_fresh(which)
            assert not unlike, f"{specimen.name}, tp={tp}, ep={ep}, buckets of {bucket}: {unlike}"


@pytest.mark.specimens(("qwen2_moe",), ("bfloat16",))
def test_a_trainer_without_the_gates_of_its_shared_experts_is_refused_with_their_names(specimen: Specimen) -> None:
    """mbridge 0.15.1 makes a Qwen2-MoE without them on megatron-core 0.16, where nobody sets moe_shared_expert_gate."""
    stream = rebuilt(recorded("qwen2_moe", 1, 1), specimen.pair.b.published)
    gates = {name for name, _ in stream if "shared_expert_gate" in name}
    assert gates
    specimen.loaded.start_over()
    specimen.loaded.sync(stream)
    for when in ("after a good sync", "after a failed sync"):
        said = refusal(lambda: specimen.loaded.sync([pair for pair in stream if pair[0] not in gates]))
        assert gates <= named(said), f"{specimen.name}, {when}: {said or 'accepted'}"
