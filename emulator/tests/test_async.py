"""FAKE_CANN_ASYNC=1: code that forgets to wait sees what it may see on hardware; code that waits sees no difference.

Real torch-npu on a stand-in CANN.  The switch is read when a process starts: one process here has it, one has
it not.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("fake_npu.aten", reason="runs in the emulator's environment: make npu")

# Runs each body that comes in with a fresh `values` and `on_npu`, nothing pending; answers with what it printed.
WORKER = """
import contextlib, io, json, sys, traceback
import torch
import torch_npu

for line in sys.stdin:
    values = torch.arange(1.0, 5.0)
    names = {"torch": torch, "torch_npu": torch_npu, "values": values, "on_npu": values.npu()}
    torch.npu.synchronize()
    printed = io.StringIO()
    error = ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), names)
    except Exception:
        error = traceback.format_exc()
    torch.npu.synchronize()
    print("ANSWER " + json.dumps([printed.getvalue().strip(), error]), flush=True)
"""


@contextlib.contextmanager
def worker(environment: dict[str, str]) -> Iterator[Callable[[str], str]]:
    """A process in which bodies run one after the other; gives the function that runs one and returns its output."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None

    def run(body: str) -> str:
        process.stdin.write(json.dumps(textwrap.dedent(body)) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("ANSWER "):
                output, error = json.loads(line.removeprefix("ANSWER "))
                assert not error, error
                return str(output)
        raise AssertionError(f"the process ended with {process.wait()}")

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def delayed() -> Iterator[Callable[[str], str]]:
    with worker({**os.environ, "FAKE_CANN_ASYNC": "1"}) as run:
        yield run


@pytest.fixture(scope="module")
def immediate() -> Iterator[Callable[[str], str]]:
    environment = {name: value for name, value in os.environ.items() if name != "FAKE_CANN_ASYNC"}
    with worker(environment) as run:
        yield run


Run = Callable[[str], str]


def test_off_unless_asked_for(delayed: Run, immediate: Run) -> None:
    assert immediate("print(torch.ops.fake_npu.delayed())") == "False"
    assert delayed("print(torch.ops.fake_npu.delayed())") == "True"


TO_HOST = """
host = torch.zeros(4, pin_memory=True)
host.copy_(on_npu * 2, non_blocking=True)
{wait}
print(host.tolist())
"""


def test_a_copy_to_the_host_without_a_synchronise_is_nan(delayed: Run, immediate: Run) -> None:
    assert delayed(TO_HOST.format(wait="")) == "[nan, nan, nan, nan]"
    assert immediate(TO_HOST.format(wait="")) == "[2.0, 4.0, 6.0, 8.0]"


@pytest.mark.parametrize(
    "wait",
    [
        "torch.npu.synchronize()",
        "torch.npu.current_stream().synchronize()",
        "event = torch.npu.Event(); event.record(); on_npu.add_(1); event.synchronize()",
        "on_npu.cpu()",
        "on_npu.sum().item()",
    ],
)
def test_a_copy_to_the_host_with_a_synchronise_is_right(delayed: Run, wait: str) -> None:
    assert delayed(TO_HOST.format(wait=wait)) == "[2.0, 4.0, 6.0, 8.0]"


def test_a_launch_is_no_synchronise(delayed: Run) -> None:
    assert delayed(TO_HOST.format(wait="on_npu.add_(1)")) == "[nan, nan, nan, nan]"


def test_to_cpu_non_blocking_is_pinned_and_late(delayed: Run) -> None:
    body = "host = on_npu.to('cpu', non_blocking=True)\nprint(host.is_pinned(), host.tolist())"
    assert delayed(body) == "True [nan, nan, nan, nan]"


def test_blocking_copies_wait(delayed: Run) -> None:
    body = """
    product = on_npu * 3
    print(product.cpu().tolist(), product[1].item(), product.tolist() == product.to("cpu").tolist())
    plain = torch.zeros(4)
    plain.copy_(product, non_blocking=True)  # memory that is not pinned
    print(plain.tolist())
    half = torch.zeros(4, dtype=torch.float64, pin_memory=True)
    half.copy_(product, non_blocking=True)  # a cast on the host
    print(half.tolist())
    """
    expected = "[3.0, 6.0, 9.0, 12.0]"
    assert delayed(body).splitlines() == [f"{expected} 6.0 True", expected, expected]


FROM_HOST = """
host = values.clone(){pin}
target = torch.zeros({sizes}, device="npu")[{part}]
target.copy_(host, non_blocking={non_blocking})
{wait}
host.fill_(-1)
print(target.cpu().tolist())
"""


@pytest.mark.parametrize("sizes,part", [("4", ":"), ("4, 2", ":, 1")])
def test_a_host_buffer_that_is_reused_too_early(delayed: Run, immediate: Run, sizes: str, part: str) -> None:
    options = {"sizes": sizes, "part": part, "pin": ".pin_memory()", "non_blocking": True}
    right = "[1.0, 2.0, 3.0, 4.0]"
    assert delayed(FROM_HOST.format(**options, wait="")) == "[-1.0, -1.0, -1.0, -1.0]"
    assert delayed(FROM_HOST.format(**options, wait="torch.npu.synchronize()")) == right
    assert immediate(FROM_HOST.format(**options, wait="")) == right
    assert delayed(FROM_HOST.format(**{**options, "pin": ""}, wait="")) == right
    assert delayed(FROM_HOST.format(**{**options, "non_blocking": False}, wait="")) == right


SIDE_STREAM = """
side = torch.npu.Stream()
result = torch.zeros(4, device="npu")
torch.npu.synchronize()
with torch.npu.stream(side):
    {work}
{wait}
print((result + 0).tolist())
"""
IN_PLACE = ("result.add_(on_npu)", "[0.0, 0.0, 0.0, 0.0]", "[1.0, 2.0, 3.0, 4.0]")
NEW_TENSOR = ("result = on_npu * 2", "[nan, nan, nan, nan]", "[2.0, 4.0, 6.0, 8.0]")


@pytest.mark.parametrize("work,stale,right", [IN_PLACE, NEW_TENSOR])
def test_another_stream_sees_stale_values(delayed: Run, immediate: Run, work: str, stale: str, right: str) -> None:
    """The last launch of a stream is the one that is still missing: the next one on it lets it finish."""
    assert delayed(SIDE_STREAM.format(work=work, wait="")) == stale
    assert immediate(SIDE_STREAM.format(work=work, wait="")) == right


@pytest.mark.parametrize("work,stale,right", [IN_PLACE, NEW_TENSOR])
@pytest.mark.parametrize(
    "wait",
    [
        "torch.npu.current_stream().wait_stream(side)",
        "side.record_event().wait()",
        "side.synchronize()",
        "torch.npu.synchronize()",
    ],
)
def test_another_stream_that_waits_is_right(delayed: Run, wait: str, work: str, stale: str, right: str) -> None:
    assert delayed(SIDE_STREAM.format(work=work, wait=wait)) == right


def test_an_event_that_was_recorded_too_early(delayed: Run) -> None:
    wait = "event = torch.npu.Event()\nevent.record(side)\n"
    wait += "with torch.npu.stream(side):\n    result.add_(100)\nevent.wait()"
    assert delayed(SIDE_STREAM.format(work=IN_PLACE[0], wait=wait)) == "[1.0, 2.0, 3.0, 4.0]"


def test_the_side_stream_must_wait_too(delayed: Run) -> None:
    body = """
    side = torch.npu.Stream()
    produced = on_npu * 10
    with torch.npu.stream(side):
        early = produced + 1
        side.wait_stream(torch.npu.default_stream())
        late = produced + 1
    side.synchronize()
    print(early.tolist(), late.tolist())
    """
    assert delayed(body) == "[nan, nan, nan, nan] [11.0, 21.0, 31.0, 41.0]"


def test_resized_and_indexed_outputs(delayed: Run) -> None:
    body = """
    grown = torch.empty(0, device="npu")
    torch.mul(on_npu, 2, out=grown)
    base = torch.zeros(2, 4, device="npu")
    base[1, ::2].copy_(on_npu[:2])
    base[0, on_npu > 2] = 7
    torch._foreach_add_([base[0], base[1]], 1)
    print(grown.tolist(), base.tolist(), on_npu[on_npu > 2].tolist(), torch.equal(on_npu, on_npu))
    """
    expected = "[2.0, 4.0, 6.0, 8.0] [[1.0, 1.0, 8.0, 8.0], [2.0, 1.0, 3.0, 1.0]] [3.0, 4.0] True"
    assert delayed(body) == expected


def test_memory_that_is_freed_before_the_launch_ran(delayed: Run) -> None:
    body = """
    for _ in range(50):
        values = torch.randn(1000, device="npu") * 2
        del values
    torch.npu.empty_cache()
    print(torch.npu.memory_allocated() < 1 << 20, torch.ones(3, device="npu").sum().item())
    """
    assert delayed(body) == "True 3.0"


def test_fractal_nz_is_delayed_too(delayed: Run) -> None:
    body = """
    torch.npu.config.allow_internal_format = True
    weight = torch.arange(600.0).view(20, 30)
    nz = torch_npu.npu_format_cast(weight.npu(), 29)
    nz.mul_(2)
    nz[3].copy_(torch.ones(30, device="npu"))
    weight = weight * 2
    weight[3] = 1
    print(torch.equal(nz.cpu(), weight), torch.equal((nz @ nz.t()).cpu(), weight @ weight.t()))
    """
    assert delayed(body) == "True True"


TRAINING = """
torch.manual_seed(0)
torch.npu.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(11, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Dropout(0.2),
    torch.nn.Linear(16, 11),
).npu()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
tokens = (torch.arange(12) * 5 % 11).pin_memory().to("npu", non_blocking=True)
for _ in range(3):
    with torch.autocast("npu", dtype=torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
import hashlib
digest = hashlib.sha256()
for tensor in [loss.detach(), *(p.detach() for p in model.parameters())]:
    digest.update(tensor.cpu().numpy().tobytes())
print(loss.item() < 10, digest.hexdigest())
"""


def test_training_has_the_same_bits(delayed: Run, immediate: Run) -> None:
    result = delayed(TRAINING)
    assert result == immediate(TRAINING)
    assert result.startswith("True ")
