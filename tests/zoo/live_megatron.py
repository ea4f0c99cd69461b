"""Real Megatron trainers and their streams: `make megatron`, which installs megatron-core and mbridge and runs this."""

from __future__ import annotations

import pytest
from megatron_stream import TRAINERS, form, recorded, trained
from specimen import Specimen

MODELS = tuple(dict.fromkeys(family for family, _, _ in TRAINERS))


@pytest.mark.specimens(MODELS, ("bfloat16",))
@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("ep", (1, 2))
def test_a_trainer_streams_what_was_recorded_and_its_syncs_leave_what_a_fresh_load_leaves(
    specimen: Specimen, tp: int, ep: int
) -> None:
    specimen.loaded.start_over()
    for which in "BA":
        stream = trained(specimen.pair[which].folder, tp, ep)
        assert form(stream) == recorded(specimen.pair.family.name, tp, ep)
        specimen.loaded.sync(stream, verify="always")
        assert not specimen.unlike_fresh(which)
