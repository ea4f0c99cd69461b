"""The stand-in CANN runtime, in C terms and under torch-npu.  See runtime_cases.py for what each case asserts."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("runtime_cases.py")
SMALL = {"FAKE_CANN_HBM_MB": "64"}
ASYNC = {"FAKE_CANN_ASYNC": "1"}


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's, without its own stand-in settings, as a machine of its own."""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("FAKE_CANN_", "ASCEND_", "HCCL_"))
    }
    return {**plain, "FAKE_CANN_RUN": uuid.uuid4().hex, **settings}


def run(command: list[str], settings: dict[str, str], seconds: int = 60) -> str:
    whole = [sys.executable, *command]
    done = subprocess.run(
        whole, env=environment(settings), capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("allocation_is_accounted", SMALL),
        ("too_much_is_refused", SMALL),
        ("all_processes_count", SMALL),
        ("another_run_does_not_count", SMALL),
        ("virtual_memory_gives_pages_back", SMALL),
        ("devices_are_reordered", {**SMALL, "FAKE_CANN_DEVICES": "4", "ASCEND_RT_VISIBLE_DEVICES": "2,0"}),
        ("list_ends_at_a_device_that_is_not_there", {"FAKE_CANN_DEVICES": "2", "ASCEND_RT_VISIBLE_DEVICES": "1,9,0"}),
        ("a_thread_has_the_device_that_it_set", {"FAKE_CANN_DEVICES": "4"}),
        ("refusals_name_what_is_missing", {}),
        ("work_is_done_when_called", {}),
        ("events_measure_time", {}),
        ("events_measure_time", ASYNC),
        ("missing_synchronise_shows_poison", ASYNC),
        ("host_source_is_read_late", ASYNC),
        ("pageable_memory_is_copied_at_once", ASYNC),
        ("one_stream_keeps_its_order", ASYNC),
        ("one_stream_keeps_its_order", {}),
        ("other_stream_without_wait_sees_old_data", ASYNC),
        ("other_stream_with_wait_sees_new_data", ASYNC),
        ("waiting_stream_carries_visibility", ASYNC),
        ("event_shows_what_lies_before_it", ASYNC),
        ("polling_ends", ASYNC),
        ("launches_run_in_order_and_once", ASYNC),
        ("freeing_memory_waits_for_its_users", ASYNC),
    ],
)
def test_case(case: str, settings: dict[str, str]) -> None:
    run([str(CASES), case], settings)


def test_nothing_stays_behind() -> None:
    """The ledger's file goes with its process; a killed process's goes with the next one that starts."""
    run([str(CASES), "allocation_is_accounted"], {**SMALL, "FAKE_CANN_RUN": "endsnormally"})
    holder = subprocess.Popen(
        [sys.executable, str(CASES), "hold", "1"],
        env=environment({"FAKE_CANN_RUN": "iskilled"}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"holding\n"
    assert ledgers("endsnormally") == [] and len(ledgers("iskilled")) == 1
    holder.kill()
    holder.communicate()
    run([str(CASES), "work_is_done_when_called"], {})
    assert ledgers("iskilled") == []


def ledgers(run_name: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("fake_cann-hbm-") and run_name in name]


def test_torch_npu_sees_the_device() -> None:
    """torch-npu's own accounting, out-of-memory error, visible devices and event timing, over this runtime."""
    program = """
import torch, torch_npu
assert torch.npu.device_count() == 2
free, total = torch.npu.mem_get_info()
assert total == 64 << 20
kept = torch.zeros(8 << 20, dtype=torch.uint8, device="npu:0")
assert free - torch.npu.mem_get_info()[0] >= 8 << 20
assert torch.npu.mem_get_info(1)[0] == total, "device 1 has its own memory"
try:
    torch.zeros(80 << 20, dtype=torch.uint8, device="npu:0")
except torch.OutOfMemoryError as error:
    assert "64.00 MiB total capacity" in str(error), error
else:
    raise AssertionError("80 MiB of 64 were given")
del kept
torch.npu.empty_cache()
assert torch.npu.mem_get_info()[0] == total
first, second = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
first.record()
second.record()
torch.npu.synchronize()
assert first.query() and first.elapsed_time(second) >= 0
print("label", torch.npu.get_device_name(0))
"""
    settings = {**SMALL, "FAKE_CANN_DEVICES": "3", "ASCEND_RT_VISIBLE_DEVICES": "2,1", "FAKE_CANN_SOC": "Ascend910B3"}
    assert "label Ascend910B3" in run(["-c", program], settings, seconds=300)
