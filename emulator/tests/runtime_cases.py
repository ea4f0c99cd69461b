"""Programs against the stand-in libascendcl, in C terms: runtime_cases.py CASE runs one of the functions below.

Stands in for a user of CANN who calls it without torch.  One case is one process, because device memory, environment
variables and streams belong to a process.  Every case raises when the library does not behave as CANN documents it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path

MIB = 1 << 20
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3  # aclrtMemcpyKind
HBM = 1  # aclrtMemAttr
PARAMETER_INVALID, INVALID_DEVICE, NOT_SUPPORTED, OUT_OF_MEMORY = 107000, 107001, 207000, 207001


def library_path() -> Path:
    """The library that torch-npu itself loads, found without importing torch."""
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None and spec.origin is not None, "torch-npu is not installed here"
    return Path(spec.origin).parent / "lib" / "libascendcl.so"


acl = ctypes.CDLL(str(library_path()))
acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
Pointer, Size = ctypes.c_void_p, ctypes.c_size_t


def call(name: str, *arguments: object) -> None:
    error = getattr(acl, name)(*arguments)
    assert error == 0, f"{name}: {error}: {acl.aclGetRecentErrMsg().decode()}"


def device_memory(size: int) -> Pointer:
    address = Pointer()
    call("aclrtMalloc", ctypes.byref(address), Size(size), 0)
    return address


def pinned_floats(count: int, value: float) -> ctypes.Array[ctypes.c_float]:
    address = Pointer()
    call("aclrtMallocHost", ctypes.byref(address), Size(4 * count))
    assert address.value is not None
    floats = (ctypes.c_float * count).from_address(address.value)
    floats[:] = [value] * count
    return floats


def new_stream() -> Pointer:
    stream = Pointer()
    call("aclrtCreateStreamWithConfig", ctypes.byref(stream), 0, 3)
    return stream


def new_event() -> Pointer:
    event = Pointer()
    call("aclrtCreateEventExWithFlag", ctypes.byref(event), 8)
    return event


def copy_async(to: object, source: object, size: int, kind: int, stream: Pointer) -> None:
    call("aclrtMemcpyAsync", to, Size(size), source, Size(size), kind, stream)


def read_device(address: Pointer, count: int) -> list[float]:
    """What is in device memory now, whatever is still queued."""
    floats = (ctypes.c_float * count)()
    call("aclrtMemcpy", floats, Size(4 * count), address, Size(4 * count), DEVICE_TO_HOST)
    return list(floats)


def fill_device(address: Pointer, count: int, value: float) -> None:
    floats = (ctypes.c_float * count)(*[value] * count)
    call("aclrtMemcpy", address, Size(4 * count), floats, Size(4 * count), HOST_TO_DEVICE)


def free_and_total() -> tuple[int, int]:
    free, total = Size(), Size()
    call("aclrtGetMemInfo", HBM, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def resident_kib(kind: str) -> int:
    """A line of /proc/self/status: RssAnon, RssShmem."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


# ---- memory ----


def allocation_is_accounted() -> None:
    assert free_and_total() == (64 * MIB, 64 * MIB)  # FAKE_CANN_HBM_MB=64
    first, second = device_memory(16 * MIB), device_memory(5)
    assert free_and_total()[0] == 48 * MIB - 4096, "16 MiB and one page"
    ctypes.memset(first, 1, 16 * MIB)
    grown = resident_kib("RssAnon")
    call("aclrtFree", first)
    assert grown - resident_kib("RssAnon") > 15 * 1024, "aclrtFree keeps the pages"
    call("aclrtFree", second)
    assert free_and_total()[0] == 64 * MIB
    assert acl.aclrtFree(second) == PARAMETER_INVALID, "freed twice"


def too_much_is_refused() -> None:
    kept = device_memory(40 * MIB)
    address = Pointer()
    assert acl.aclrtMalloc(ctypes.byref(address), Size(25 * MIB), 0) == OUT_OF_MEMORY
    assert b"out of memory: 25 MiB wanted, 40 of 64 MiB in use" in acl.aclGetRecentErrMsg()
    handle = Pointer()
    assert acl.aclrtMallocPhysical(ctypes.byref(handle), Size(26 * MIB), None, ctypes.c_uint64(0)) == OUT_OF_MEMORY
    assert free_and_total()[0] == 24 * MIB, "a refused allocation was charged"
    call("aclrtFree", device_memory(24 * MIB))
    call("aclrtFree", kept)


def hold(mib: str) -> None:
    """Takes memory of the current device, says so, and waits to be told to end, or to be killed."""
    device_memory(int(mib) * MIB)
    print("holding", flush=True)
    sys.stdin.readline()


def holder(mib: int, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "hold", str(mib)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    return process


def ledger_files() -> set[str]:
    return {
        name
        for name in os.listdir("/dev/shm")
        if name.startswith("fake_cann-hbm-") and os.environ["FAKE_CANN_RUN"] in name
    }


def all_processes_count() -> None:
    first, second = holder(16), holder(8)
    assert free_and_total()[0] == 40 * MIB, "memory of other processes"
    address = Pointer()
    assert acl.aclrtMalloc(ctypes.byref(address), Size(41 * MIB), 0) == OUT_OF_MEMORY
    first.communicate("end\n")
    assert free_and_total()[0] == 56 * MIB, "a process that ended normally"
    second.kill()
    second.wait()
    assert free_and_total()[0] == 64 * MIB, "a process that was killed"
    call("aclrtFree", device_memory(64 * MIB))
    assert len(ledger_files()) == 1, f"besides this process's own: {ledger_files()}"


def another_run_does_not_count() -> None:
    other = holder(16, FAKE_CANN_RUN="another")
    assert free_and_total()[0] == 64 * MIB
    other.communicate("end\n")


def virtual_memory_gives_pages_back() -> None:
    size = 32 * MIB
    address, handle = Pointer(), Pointer()
    call("aclrtReserveMemAddress", ctypes.byref(address), Size(size), Size(0), None, ctypes.c_uint64(0))
    assert free_and_total()[0] == 64 * MIB, "addresses cost nothing"
    call("aclrtMallocPhysical", ctypes.byref(handle), Size(size), None, ctypes.c_uint64(0))
    assert free_and_total()[0] == 32 * MIB
    call("aclrtMapMem", address, Size(size), Size(0), handle, ctypes.c_uint64(0))
    assert acl.aclrtMapMem(address, Size(size), Size(0), handle, ctypes.c_uint64(0)) == PARAMETER_INVALID, (
        "mapped twice"
    )
    ctypes.memset(address, 7, size)
    assert resident_kib("RssShmem") > 31 * 1024
    call("aclrtUnmapMem", address)
    call("aclrtFreePhysical", handle)
    assert resident_kib("RssShmem") < 1024, "pages are still there"
    assert free_and_total()[0] == 64 * MIB
    call("aclrtMallocPhysical", ctypes.byref(handle), Size(size), None, ctypes.c_uint64(0))
    call("aclrtMapMem", address, Size(size), Size(0), handle, ctypes.c_uint64(0))
    assert read_device(address, 2) == [0.0, 0.0], "the old contents came back"
    call("aclrtUnmapMem", address)
    call("aclrtFreePhysical", handle)
    call("aclrtReleaseMemAddress", address)
    assert acl.aclrtReleaseMemAddress(address) == PARAMETER_INVALID


# ---- devices ----


def device_count() -> int:
    count = ctypes.c_uint32()
    call("aclrtGetDeviceCount", ctypes.byref(count))
    return count.value


def devices_are_reordered() -> None:
    """ASCEND_RT_VISIBLE_DEVICES=2,0 of four: logical 0 is physical 2."""
    assert device_count() == 2
    assert acl.aclrtSetDevice(2) == INVALID_DEVICE
    call("aclrtSetDevice", 0)
    on_two = holder(16, ASCEND_RT_VISIBLE_DEVICES="2")
    on_one = holder(4, ASCEND_RT_VISIBLE_DEVICES="1")
    assert free_and_total()[0] == 48 * MIB, "logical 0 is physical 2"
    call("aclrtSetDevice", 1)
    assert free_and_total()[0] == 64 * MIB, "logical 1 is physical 0"
    physical = ctypes.c_int64()
    call("aclrtGetDeviceInfo", 0, 402, ctypes.byref(physical))
    assert physical.value == 2
    on_two.communicate("end\n")
    on_one.communicate("end\n")


def list_ends_at_a_device_that_is_not_there() -> None:
    assert device_count() == 1  # ASCEND_RT_VISIBLE_DEVICES=1,9,0 of two


def a_thread_has_the_device_that_it_set() -> None:
    context, device = Pointer(), ctypes.c_int32()
    assert acl.aclrtGetCurrentContext(ctypes.byref(context)) != 0, "before aclrtSetDevice"
    call("aclrtSetDevice", 1)
    call("aclrtGetDevice", ctypes.byref(device))
    call("aclrtGetCurrentContext", ctypes.byref(context))
    call("aclrtSetDevice", 0)
    call("aclrtSetCurrentContext", context)
    call("aclrtGetDevice", ctypes.byref(device))
    assert device.value == 1
    active = ctypes.c_int32()
    call("aclrtGetPrimaryCtxState", 3, None, ctypes.byref(active))
    assert active.value == 0


# ---- what is refused ----


def refusals_name_what_is_missing() -> None:
    handle = ctypes.c_uint64()
    assert acl.aclrtMemExportToShareableHandle(None, 0, ctypes.c_uint64(0), ctypes.byref(handle)) == NOT_SUPPORTED
    assert acl.aclGetRecentErrMsg().startswith(b"aclrtMemExportToShareableHandle: ")
    arguments = [0, None, None, 0, None, None, None, 0, 0, None, None]
    assert acl.aclopCompileAndExecute(b"SoftmaxV2", *arguments) == NOT_SUPPORTED
    assert acl.aclGetRecentErrMsg().startswith(b"operator SoftmaxV2 ")
    assert not hasattr(acl, "aclnnAdd"), "an operator that does nothing is worse than none"


# ---- streams and events, at once ----


def work_is_done_when_called() -> None:
    stream, device = new_stream(), device_memory(16)
    host = pinned_floats(4, 2.0)
    copy_async(device, host, 16, HOST_TO_DEVICE, stream)
    host[:] = [9.0] * 4
    assert read_device(device, 4) == [2.0] * 4
    copy_async(host, device, 16, DEVICE_TO_HOST, stream)
    assert list(host) == [2.0] * 4


def events_measure_time() -> None:
    stream, first, second = new_stream(), new_event(), new_event()
    status = ctypes.c_int(-1)
    call("aclrtQueryEventStatus", first, ctypes.byref(status))
    assert status.value == 1, "an event that was never recorded counts as complete"
    call("aclrtRecordEvent", first, stream)
    call("aclrtSynchronizeEvent", first)
    time.sleep(0.05)
    call("aclrtRecordEvent", second, stream)
    elapsed = ctypes.c_float()
    call("aclrtEventElapsedTime", ctypes.byref(elapsed), first, second)
    assert 45 < elapsed.value < 5000, elapsed.value
    call("aclrtDestroyEvent", first)
    call("aclrtDestroyStream", stream)
    assert acl.aclrtRecordEvent(second, stream) == PARAMETER_INVALID, "the stream was destroyed"


# ---- streams and events, FAKE_CANN_ASYNC=1 ----


def missing_synchronise_shows_poison() -> None:
    stream, device, host = new_stream(), device_memory(16), pinned_floats(4, 1.0)
    fill_device(device, 4, 5.0)
    copy_async(host, device, 16, DEVICE_TO_HOST, stream)
    assert all(math.isnan(value) for value in host), list(host)
    fill_device(device, 4, 6.0)  # nothing has run yet: the copy takes what is there when it runs
    call("fake_cann_stream_drain", stream)
    fill_device(device, 4, 7.0)
    assert all(math.isnan(value) for value in host), "the device went on, but the host has not waited"
    call("aclrtSynchronizeStream", stream)
    assert list(host) == [6.0] * 4


def host_source_is_read_late() -> None:
    stream, device, host = new_stream(), device_memory(16), pinned_floats(4, 1.0)
    copy_async(device, host, 16, HOST_TO_DEVICE, stream)
    host[:] = [2.0] * 4  # the mistake: the copy has not been waited for
    call("aclrtSynchronizeStream", stream)
    assert read_device(device, 4) == [2.0] * 4


def pageable_memory_is_copied_at_once() -> None:
    stream, device = new_stream(), device_memory(16)
    pageable = (ctypes.c_float * 4)(*[3.0] * 4)
    copy_async(device, pageable, 16, HOST_TO_DEVICE, stream)
    pageable[:] = [4.0] * 4
    assert read_device(device, 4) == [3.0] * 4
    copy_async(pageable, device, 16, DEVICE_TO_HOST, stream)
    assert list(pageable) == [3.0] * 4


def one_stream_keeps_its_order() -> None:
    """host -> a -> b -> the same host memory -> c, all queued, is what it would be one by one."""
    stream, a, b, c = new_stream(), device_memory(16), device_memory(16), device_memory(16)
    host = pinned_floats(4, 8.0)
    copy_async(a, host, 16, HOST_TO_DEVICE, stream)
    copy_async(b, a, 16, DEVICE_TO_DEVICE, stream)
    call("aclrtMemsetAsync", a, Size(16), 0, Size(16), stream)
    copy_async(host, b, 16, DEVICE_TO_HOST, stream)
    copy_async(c, host, 16, HOST_TO_DEVICE, stream)
    call("aclrtSynchronizeStream", stream)
    assert (list(host), read_device(a, 4), read_device(c, 4)) == ([8.0] * 4, [0.0] * 4, [8.0] * 4)


def other_stream_without_wait_sees_old_data() -> None:
    writer, reader, device, out = new_stream(), new_stream(), device_memory(16), pinned_floats(4, 0.0)
    fill_device(device, 4, 1.0)
    copy_async(device, pinned_floats(4, 2.0), 16, HOST_TO_DEVICE, writer)
    copy_async(out, device, 16, DEVICE_TO_HOST, reader)
    call("aclrtSynchronizeStream", reader)
    assert list(out) == [1.0] * 4
    call("aclrtSynchronizeDevice")
    assert read_device(device, 4) == [2.0] * 4


def other_stream_with_wait_sees_new_data() -> None:
    writer, reader, device, out = new_stream(), new_stream(), device_memory(16), pinned_floats(4, 0.0)
    event = new_event()
    copy_async(device, pinned_floats(4, 2.0), 16, HOST_TO_DEVICE, writer)
    call("aclrtRecordEvent", event, writer)
    call("aclrtMemsetAsync", device, Size(16), 0, Size(16), writer)  # behind the record: not waited for
    call("aclrtStreamWaitEvent", reader, event)
    copy_async(out, device, 16, DEVICE_TO_HOST, reader)
    call("aclrtSynchronizeStream", reader)
    assert list(out) == [2.0] * 4
    call("aclrtSynchronizeStream", writer)
    assert read_device(device, 4) == [0.0] * 4


def waiting_stream_carries_visibility() -> None:
    """A copy to the host on one stream is visible once the host waits for a stream that waited for it, not before."""
    copying, waiting, device, out = new_stream(), new_stream(), device_memory(16), pinned_floats(4, 0.0)
    fill_device(device, 4, 3.0)
    event = new_event()
    copy_async(out, device, 16, DEVICE_TO_HOST, copying)
    call("aclrtRecordEvent", event, copying)
    call("aclrtStreamWaitEvent", waiting, event)
    call("fake_cann_stream_drain", waiting)
    assert all(math.isnan(value) for value in out), "a wait between streams tells the host nothing"
    call("aclrtSynchronizeStream", waiting)
    assert list(out) == [3.0] * 4


def event_shows_what_lies_before_it() -> None:
    stream, device, event = new_stream(), device_memory(16), new_event()
    before, behind = pinned_floats(4, 0.0), pinned_floats(4, 0.0)
    fill_device(device, 4, 3.0)
    copy_async(before, device, 16, DEVICE_TO_HOST, stream)
    call("aclrtRecordEvent", event, stream)
    copy_async(behind, device, 16, DEVICE_TO_HOST, stream)
    call("aclrtSynchronizeEvent", event)
    assert list(before) == [3.0] * 4 and math.isnan(behind[0])
    call("aclrtDestroyStream", stream)
    assert list(behind) == [3.0] * 4, "destroying a stream finishes it"


def polling_ends() -> None:
    stream, device, out, event = new_stream(), device_memory(16), pinned_floats(4, 0.0), new_event()
    for function, handle, done in (("aclrtQueryEventStatus", event, 1), ("aclrtStreamQuery", stream, 0)):
        copy_async(out, device, 16, DEVICE_TO_HOST, stream)
        call("aclrtRecordEvent", event, stream)
        answers = []
        while not answers or answers[-1] != done:
            assert math.isnan(out[0])
            status = ctypes.c_int(-1)
            call(function, handle, ctypes.byref(status))
            answers.append(status.value)
            assert len(answers) < 10, f"{function}: {answers}"
        assert len(answers) == 3, f"{function}: {answers}"
        assert list(out) == [0.0] * 4, "complete, and not visible"


def launches_run_in_order_and_once() -> None:
    stream, device, out = new_stream(), device_memory(16), pinned_floats(4, 0.0)
    seen: list[object] = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    launch = function(lambda _: fill_device(device, 4, 4.0) or seen.append("launch"))
    callback = function(lambda _: seen.append(list(out)))
    call("fake_cann_stream_enqueue", stream, launch, None)
    copy_async(out, device, 16, DEVICE_TO_HOST, stream)
    call("aclrtLaunchHostFunc", stream, callback, None)
    assert seen == [] and acl.fake_cann_async() == 1
    call("aclrtSynchronizeStream", stream)
    call("aclrtSynchronizeStream", stream)
    assert seen == ["launch", [4.0] * 4], seen


def freeing_memory_waits_for_its_users() -> None:
    stream, device, other = new_stream(), device_memory(16), device_memory(16)
    host = pinned_floats(4, 6.0)
    copy_async(device, host, 16, HOST_TO_DEVICE, stream)
    copy_async(other, device, 16, DEVICE_TO_DEVICE, stream)
    call("aclrtFree", device)
    assert read_device(other, 4) == [6.0] * 4
    copy_async(host, other, 16, DEVICE_TO_HOST, stream)
    call("aclrtFreeHost", host)
    call("aclrtSynchronizeDevice")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
