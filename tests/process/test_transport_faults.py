"""When a side of the weight transport is killed, stands still, has no memory, or sends what it should not.

Each time: one sentence that says what happened, in time; nothing left behind; and the other side can go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from transport_processes import ROOT, Peer

from verl_ascend_rollout.transport import rendezvous
from verl_ascend_rollout.transport.messages import (
    MAX_MESSAGE,
    VERSION,
    Bucket,
    Connection,
    Done,
    End,
    Hello,
    Loaded,
    PeerFailedError,
    PeerGoneError,
    PeerSilentError,
    Piece,
    ProtocolError,
    Ready,
    TransportError,
)
from verl_ascend_rollout.transport.receiver import receive_weights
from verl_ascend_rollout.transport.segment import F_SEAL_FUTURE_WRITE, Segment
from verl_ascend_rollout.transport.sender import WeightSender
from verl_ascend_rollout.transport.tensors import RunningChecksum

KIB = 1024


@pytest.fixture(scope="module")
def idle() -> Iterator[dict[str, list[Peer]]]:
    """Processes that a test has done with."""
    peers: dict[str, list[Peer]] = {"receive": [], "send": []}
    yield peers
    for peer in (*peers["receive"], *peers["send"]):
        peer.close()


@pytest.fixture
def start(idle: dict[str, list[Peer]]) -> Iterator[Callable[[str], Peer]]:
    used: list[tuple[str, Peer]] = []

    def started(role: str) -> Peer:
        peer = idle[role].pop() if idle[role] else Peer(role)
        used.append((role, peer))
        return peer

    yield started
    for role, peer in used:
        if peer.is_at_rest and peer.process.is_alive():
            idle[role].append(peer)
        else:
            peer.close()


def send_to(peers: list[Peer], count: int = 8, **how: Any) -> int:
    """One sync of `count` tensors of a bucket each; how many were sent."""
    with WeightSender(receivers=len(peers), bucket_bytes=KIB, timeout=how.pop("timeout", 60)) as sender:
        for rank, peer in enumerate(peers):
            peer.ask(name=sender.name, rank=rank, **how)
        sender.connect()
        for number in range(count):
            sender.send(f"weight.{number}", torch.full((KIB,), number, dtype=torch.uint8))
        return sender.finish().tensors


# --------------------------------------------------------------------------------------------------------------------
# one side ends, fails, or stands still


def test_a_receiver_that_is_killed_ends_the_sync_with_a_sentence(start: Callable[[str], Peer]) -> None:
    staying, killed = start("receive"), start("receive")
    with (
        pytest.raises(PeerGoneError) as failure,
        WeightSender(receivers=2, bucket_bytes=KIB, timeout=60) as sender,
    ):
        killed.ask(name=sender.name, rank=1, stand_still=2)
        staying.ask(name=sender.name, rank=0)
        sender.connect()
        for number in range(3):
            sender.send(f"weight.{number}", torch.zeros(KIB, dtype=torch.uint8))
        assert killed.line() == {"standing_still": True}
        killed.kill()
        started = time.monotonic()
        for number in range(3, 9):
            sender.send(f"weight.{number}", torch.zeros(KIB, dtype=torch.uint8))
    assert time.monotonic() - started < 10
    assert f"the rollout worker of rank 1 (process {killed.process.pid}) ended" in str(failure.value)
    # The other receiver is told why.
    assert f"the rollout worker of rank 1 (process {killed.process.pid}) ended" in staying.line()["error"]
    # And takes the next sync.
    assert send_to([staying]) == 8
    assert len(staying.line()["tensors"]) == 8


def test_a_sender_that_is_killed_ends_the_sync_at_once_and_the_receiver_takes_the_next(
    start: Callable[[str], Peer],
) -> None:
    sender, receiver = start("send"), start("receive")
    sender.ask(count=9, size=KIB, bucket_bytes=KIB, stand_still=5)
    receiver.ask(name=sender.line()["name"], timeout=600)
    assert sender.line() == {"standing_still": True}
    sender.kill()
    started = time.monotonic()
    answer = receiver.line()
    assert time.monotonic() - started < 10
    assert answer["kind"] == "PeerGoneError"
    assert f"the trainer (process {sender.process.pid}) ended" in answer["error"]
    assert send_to([receiver]) == 8
    assert len(receiver.line()["tensors"]) == 8


@pytest.mark.parametrize("stand_still", [1, 8])
def test_a_receiver_that_stands_still_is_not_waited_for_past_the_time_out(
    start: Callable[[str], Peer], stand_still: int
) -> None:
    receiver = start("receive")
    started = time.monotonic()
    with pytest.raises(PeerSilentError, match=r"nothing came from the rollout worker of rank 0 .* for 1 s"):
        send_to([receiver], stand_still=stand_still, timeout=1)
    assert time.monotonic() - started < 15


def test_a_sender_that_stands_still_is_not_waited_for_past_the_time_out(start: Callable[[str], Peer]) -> None:
    receiver = start("receive")
    with WeightSender(receivers=1, bucket_bytes=KIB, timeout=30) as sender:
        receiver.ask(name=sender.name, timeout=1)
        sender.connect()
        answer = receiver.line()
        assert answer["kind"] == "PeerSilentError"
        assert f"nothing came from the trainer (process {os.getpid()}) for 1 s" in answer["error"]
        with pytest.raises(PeerFailedError, match=r"broken off by the rollout worker of rank 0 .* nothing came from"):
            sender.send("weight", torch.zeros(4 * KIB, dtype=torch.uint8))
            sender.finish()


def test_a_receiver_that_fails_to_load_says_why(start: Callable[[str], Peer]) -> None:
    receiver = start("receive")
    with pytest.raises(PeerFailedError, match="ValueError: the model has no such layer"):
        send_to([receiver], fail=3, count=2000)
    assert receiver.line() == {"error": "the model has no such layer", "kind": "ValueError"}


def test_receivers_that_never_come_are_not_waited_for_past_the_time_out() -> None:
    with (
        pytest.raises(PeerSilentError, match="No rollout worker came"),
        WeightSender(receivers=1, bucket_bytes=KIB, timeout=0.3) as sender,
    ):
        sender.connect()


@pytest.mark.parametrize("connected", [False, True])
def test_waiting_ends_when_it_no_longer_makes_sense(start: Callable[[str], Peer], connected: bool) -> None:
    """The receiving call has ended, says Ray: no time-out is waited for."""
    call_has_ended = threading.Event()
    with (
        pytest.raises(OSError, match="the call has ended"),
        WeightSender(receivers=1, bucket_bytes=KIB, timeout=600) as sender,
    ):
        if connected:
            start("receive").ask(name=sender.name, stand_still=1)
        else:
            call_has_ended.set()
        sender.connect(lambda: OSError("the call has ended") if call_has_ended.is_set() else None)
        call_has_ended.set()
        for number in range(4):
            sender.send(f"weight.{number}", torch.zeros(KIB, dtype=torch.uint8))


# --------------------------------------------------------------------------------------------------------------------
# no room


def test_memory_that_is_refused_is_a_sentence_with_numbers(start: Callable[[str], Peer]) -> None:
    sender = start("send")
    sender.ask(count=1, size=KIB, bucket_bytes=32 * KIB * KIB, limit_file_size=8 * KIB * KIB)
    answer = sender.line()
    assert answer["kind"] == "TransportError"
    assert answer["error"].startswith("There is no room for the weight buckets: they take up to 64 MiB and File too la")
    assert answer["error"].endswith("update_weights_bucket_megabytes")
    sender.kill()


def test_memory_that_runs_out_in_the_middle_is_a_sentence_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = os.posix_fallocate

    def until_it_is_full(descriptor: int, offset: int, size: int) -> None:
        if offset >= 32 * KIB * KIB:
            raise OSError(28, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", until_it_is_full)
    segment = Segment(128 * KIB * KIB)
    segment.reserve(20 * KIB * KIB)
    with pytest.raises(TransportError, match=r"take up to 128 MiB and 32 MiB were to be had, then: No space left"):
        segment.reserve(40 * KIB * KIB)
    segment.close()


def test_more_than_the_machine_has_is_refused_before_anything_is_taken() -> None:
    with pytest.raises(TransportError, match=r"take up to 2147483648 MiB and \d+ MiB of memory are available; lower"):
        WeightSender(receivers=1, bucket_bytes=2**50)


def test_a_full_dev_shm_is_no_matter() -> None:
    """Buckets of 64 MiB beside a /dev/shm of 1 MiB that is full, in a mount namespace of their own."""
    program = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
from verl_ascend_rollout.transport.receiver import receive_weights
from verl_ascend_rollout.transport.sender import WeightSender
try:
    open("/dev/shm/full", "wb").write(bytes(2**21))
except OSError as error:
    print(error.strerror)
with WeightSender(receivers=1, bucket_bytes=2**26, timeout=60) as sender:
    receiver = threading.Thread(target=receive_weights, args=(sender.name, list))
    receiver.start()
    sender.connect()
    for number in range(2):
        sender.send(str(number), torch.zeros(2**25, dtype=torch.uint8))
    print(sender.finish().bytes)
    receiver.join()
"""
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} -c "$PROGRAM"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PROGRAM": program},
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        # Containers mostly forbid it; the segment is a memfd there as well.
        segment = Segment(KIB)
        assert os.readlink(f"/proc/self/fd/{segment.descriptor}").startswith("/memfd:")
        segment.close()
        return
    assert done.stdout.split("\n")[:2] == ["No space left on device", str(2**26)], done.stderr


# --------------------------------------------------------------------------------------------------------------------
# what is left behind


def test_a_killed_sender_leaves_its_name_to_the_next(start: Callable[[str], Peer]) -> None:
    killed = start("send")
    name = uuid.uuid4().hex
    killed.ask(count=1, size=1, bucket_bytes=KIB, name=name)
    assert killed.line() == {"name": name}
    with pytest.raises(TransportError, match=rf"with the name {name}: Address already in use"):
        WeightSender(receivers=1, bucket_bytes=KIB, name=name)
    killed.kill()
    sender, receiver = start("send"), start("receive")
    sender.ask(count=1, size=1, bucket_bytes=KIB, name=name)
    receiver.ask(name=sender.line()["name"])
    assert sender.line() == {"sent": 1}


def test_two_nodes_in_one_network_do_not_meet(start: Callable[[str], Peer]) -> None:
    """Each node's receiver gets what was sent on its node; the second one asks before there is a sender."""
    name = uuid.uuid4().hex[:8]
    addresses = [rendezvous.on_node(name, node) for node in ("a" * 56, "b" * 56)]
    senders, receivers = [start("send"), start("send")], [start("receive"), start("receive")]
    for receiver, address in zip(receivers[::-1], addresses[::-1], strict=True):
        receiver.ask(name=address)
    for number, (sender, address) in enumerate(zip(senders, addresses, strict=True)):
        sender.ask(count=40 + number, size=KIB, bucket_bytes=4 * KIB, name=address)
    assert [len(receiver.line()["tensors"]) for receiver in receivers] == [40, 41]
    assert [(sender.line(), sender.line()) for sender in senders] == [
        ({"name": address}, {"sent": 40 + number}) for number, address in enumerate(addresses)
    ]


def test_where_nobody_listens_is_a_sentence() -> None:
    with pytest.raises(
        TransportError, match=r"No trainer listens on this node for the weight sync none: Connection re"
    ):
        receive_weights("none", list, timeout=0.2)


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_connection_is_dropped() -> None:
    listener = rendezvous.Listener()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.seteuid(NOBODY)
            other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            other.connect(f"\0{rendezvous.PREFIX}{listener.name}")
            os.write(writing, b"connected")
            other.settimeout(20)
            os._exit(0 if other.recv(1) == b"" else 1)
        except BaseException:
            os._exit(2)
    os.close(writing)
    try:
        os.read(reading, 1)
        with pytest.raises(PeerSilentError, match="No rollout worker came"):
            listener.accept(time.monotonic() + 0.3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "it connected, and was not dropped"
    finally:
        os.close(reading)
        listener.close()


# --------------------------------------------------------------------------------------------------------------------
# malformed streams

BUCKET_BYTES = 4 * KIB
HELLO = Hello(VERSION, 2, BUCKET_BYTES, False)


def piece(**other: Any) -> Piece:
    fields = {"name": "w", "dtype": "float32", "shape": [4], "start": 0, "offset": 0, "size": 16, "checksum": None}
    return Piece(**{**fields, **other})


def big(**other: Any) -> Piece:
    """A piece of a tensor that is larger than a bucket."""
    return piece(name="big", shape=[3000], size=BUCKET_BYTES, **other)


def pieces(*found: Piece) -> Bucket:
    return Bucket(0, list(found))


MALFORMED = [
    (pieces(piece(dtype="float33")), "w has the unknown dtype 'float33'"),
    (pieces(piece(dtype="Tensor")), "w has the unknown dtype 'Tensor'"),
    (pieces(piece(offset=3)), "w starts at byte 3 of a bucket that is taken up to byte 0, or not aligned"),
    (pieces(piece(), piece(name="v")), "v starts at byte 0 of a bucket that is taken up to byte 16"),
    (pieces(piece(offset=4096)), "w is said to lie at bytes 4096 to 4112 of a bucket of 4096"),
    (pieces(piece(offset=2**40)), "of a bucket of 4096"),
    (pieces(piece(size=2**40)), "of a bucket of 4096"),
    (pieces(piece(size=32)), r"w has 32 bytes for a float32 of shape \[4\]"),
    (pieces(piece(), piece(offset=64)), "w comes a second time"),
    (pieces(piece(size=0)), "w has an empty piece"),
    (pieces(big(start=64)), "big starts with its byte 64"),
    (pieces(big(), piece(offset=4096)), "w is said to lie at bytes 4096"),
    (pieces(piece(checksum=1)), "w has a checksum where none belongs"),
    (Bucket(1, [piece()]), "bucket 1 came where bucket 0 was due"),
    (End(1, 16), "it ends with 1 tensors of 16 bytes, and 0 of 0 bytes have come"),
    (End(0, 16), "it ends with 0 tensors of 16 bytes, and 0 of 0 bytes have come"),
    (End(0, 0, 5), "the checksum of all tensors differs"),
    (Loaded(0), "a Loaded came where only Bucket or End can"),
    (HELLO, "a Hello came where only Bucket or End can"),
]

NOT_EVEN_A_MESSAGE = [
    (b"\xc1", "does not decode"),
    (b"", "does not decode"),
    (b"\x80\x05cposix\nsystem\n.", "does not decode"),
    (b"\x91" * 100_000, "does not decode"),
    (msgspec.msgpack.encode({"type": "exec", "reason": "rm"}), "Invalid value 'exec'"),
    (msgspec.msgpack.encode({"type": "bucket"}), "missing required field `number`"),
    (msgspec.msgpack.encode({"type": "bucket", "number": -1, "pieces": []}), "Expected `int` >= 0"),
    (msgspec.msgpack.encode({"type": "bucket", "number": 0, "pieces": [], "and": 1}), "unknown field `and`"),
    (
        msgspec.msgpack.encode({"type": "bucket", "number": 0, "pieces": [["w", "int8", [-1], 0, 0, 0]]}),
        r"shape|\[2\]",
    ),
    (msgspec.msgpack.encode({"type": "bucket", "number": 0, "pieces": [["w", "int8", [1] * 65, 0, 0, 1]]}), "<= 64"),
    (msgspec.msgpack.encode({"type": "bucket", "number": 0, "pieces": [[7, "int8", [1], 0, 0, 1]]}), "Expected `str`"),
]


def forged(
    talk: Callable[[Connection, socket.socket, Segment], None], load: Callable[[Any], Any] = list
) -> tuple[str, str]:
    """A sender that says what it likes: what the receiver raised, and what it told the sender."""
    raised: list[BaseException] = []
    segment = Segment(2 * BUCKET_BYTES)
    listener = rendezvous.Listener()

    def receive() -> None:
        try:
            receive_weights(listener.name, load, timeout=10)
        except Exception as error:
            raised.append(error)

    receiver = threading.Thread(target=receive)
    receiver.start()
    connected, _ = listener.accept(time.monotonic() + 10)
    listener.close()
    connection = Connection(connected, "the rollout worker", 10)
    told = ""
    with contextlib.suppress(PeerGoneError, BrokenPipeError):
        try:
            talk(connection, connected, segment)
            while True:
                connection.receive(Loaded)
        except PeerFailedError as error:
            told = str(error)
    receiver.join(30)
    assert not receiver.is_alive()
    connection.close()
    segment.close()
    assert len(raised) == 1 and isinstance(raised[0], TransportError), raised
    assert "\n" not in str(raised[0])
    return str(raised[0]), told


def greet(connection: Connection, segment: Segment) -> None:
    connection.send(HELLO, segment.descriptor)
    assert connection.receive_ready() == Ready(VERSION, 0)


@pytest.mark.parametrize(("message", "says"), MALFORMED)
def test_a_message_that_cannot_be_right_is_refused(message: Any, says: str) -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        greet(connection, segment)
        connection.send(message)

    raised, told = forged(talk, load=lambda tensors: pytest.fail("loaded"))
    with pytest.raises(ProtocolError, match=says):
        raise ProtocolError(raised)
    assert raised in told


@pytest.mark.parametrize(("body", "says"), NOT_EVEN_A_MESSAGE)
def test_bytes_that_are_no_message_are_refused(body: bytes, says: str) -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        greet(connection, segment)
        connected.setblocking(True)
        connected.sendall(struct.pack(">I", len(body)) + body)
        connected.setblocking(False)

    raised, _ = forged(talk)
    with pytest.raises(ProtocolError, match=says):
        raise ProtocolError(raised)


def test_a_message_without_end_is_refused_before_it_is_read() -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        greet(connection, segment)
        connected.send(struct.pack(">I", 2**32 - 1))

    assert f"a message of {2**32 - 1} bytes is announced, and the most is {MAX_MESSAGE}" in forged(talk)[0]


def test_a_message_that_breaks_off_is_an_end() -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        greet(connection, segment)
        connected.send(struct.pack(">I", 100) + b"half")
        connected.shutdown(socket.SHUT_WR)

    assert "the trainer (process" in forged(talk)[0]


@pytest.mark.parametrize(
    ("continued", "says"),
    [
        ([piece(name="other")], "other comes before big is whole"),
        ([piece(name="big", shape=[3001], start=BUCKET_BYTES)], "big comes before big is whole"),
        ([piece(name="big", shape=[3000], start=64)], "big goes on with its byte 64 after byte 4096"),
        ([], "it ends after 4096 of the 12000 bytes of big"),
    ],
)
def test_a_tensor_in_pieces_that_do_not_fit_is_refused(continued: list[Piece], says: str) -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        greet(connection, segment)
        connection.send(pieces(big()))
        connection.send(Bucket(1, continued) if continued else End(1, 12000))

    assert says in forged(talk)[0]


def test_a_tensor_for_which_there_is_no_memory_is_a_sentence() -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        greet(connection, segment)
        connection.send(pieces(piece(name="huge", dtype="uint8", shape=[2**50], size=BUCKET_BYTES)))

    raised, _ = forged(talk)
    assert raised.startswith(f"There is no memory for huge, which takes {2**50} bytes on cpu: ")


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (Hello(VERSION + 1, 2, BUCKET_BYTES, False), f"version {VERSION + 1} of the protocol and this process version"),
        # A later version may say more: that it is another version still comes first.
        ({"type": "hello", "version": 99, "zstd": True}, "it speaks version 99 of the protocol"),
        (Hello(VERSION, 2, BUCKET_BYTES + 64, False), "The weight buckets are 8192 bytes, sealed, and should be 8320"),
        (
            {"type": "hello", "version": VERSION, "buckets": 0, "bucket_bytes": 1, "checksums": False},
            "Expected `int` >",
        ),
        (Ready(VERSION, 0), "a Ready came where only Hello can"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(hello: Any, says: str) -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        body = msgspec.msgpack.encode(hello)
        socket.send_fds(connected, [struct.pack(">I", len(body)) + body], [segment.descriptor])

    assert says in forged(talk)[0]


@pytest.mark.parametrize("count", [0, 2])
def test_a_hello_without_its_one_file_descriptor_is_refused(count: int) -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        body = msgspec.msgpack.encode(HELLO)
        socket.send_fds(connected, [struct.pack(">I", len(body)) + body], [segment.descriptor] * count)

    assert f"its hello brings {count} file descriptors instead of one" in forged(talk)[0]


def test_buckets_that_could_be_made_smaller_under_the_reader_are_refused() -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, 2 * BUCKET_BYTES)
        connection.send(HELLO, unsealed)
        os.close(unsealed)

    assert "The weight buckets are 8192 bytes, not sealed, and should be 8192 bytes, sealed" in forged(talk)[0]


def test_buckets_that_are_no_segment_are_refused() -> None:
    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        with open("/dev/null") as null:
            connection.send(HELLO, null.fileno())

    assert "The weight buckets cannot be mapped: Invalid argument" in forged(talk)[0]


def test_a_byte_that_changed_on_the_way_is_found() -> None:
    """As when a bucket is filled again before it has been read."""

    def talk(connection: Connection, connected: socket.socket, segment: Segment) -> None:
        sent = RunningChecksum()
        sent.add(segment.bytes[:16])
        checksum = sent.end_tensor()
        segment.bytes[7] += 1
        connection.send(Hello(VERSION, 2, BUCKET_BYTES, True), segment.descriptor)
        connection.receive_ready()
        connection.send(pieces(piece(checksum=checksum)))

    raised, _ = forged(talk, load=lambda tensors: pytest.fail("loaded"))
    assert raised.startswith("w did not arrive as the trainer (process ")
    assert raised.endswith("its checksum differs")


def test_a_segment_cannot_be_written_by_who_receives_it() -> None:
    segment = Segment(KIB)
    sealed = bool(fcntl.fcntl(segment.descriptor, fcntl.F_GET_SEALS) & F_SEAL_FUTURE_WRITE)
    major, minor = (int(number) for number in os.uname().release.split(".")[:2])
    assert sealed == ((major, minor) >= (5, 1))
    if sealed:
        with pytest.raises(PermissionError):
            os.write(segment.descriptor, b"x")
    segment.close()


def test_a_receiver_that_says_nonsense_is_refused_by_the_sender() -> None:
    def receive(answers: list[Any]) -> None:
        connected, _ = rendezvous.connect(sender.name, 10)
        connection = Connection(connected, "the trainer", 10)
        connection.receive_hello()
        connection.send(Ready(VERSION, 3))
        for answer in answers:
            connection.send(answer)
        assert refused.wait(30)
        connection.close()

    for answers, says in (
        ([Loaded(5)], "bucket 5 is reported as loaded after bucket -1"),
        ([Loaded(0), Loaded(0)], "bucket 0 is reported as loaded after bucket 0"),
        ([Done()], "a Done came where only Loaded can"),
    ):
        with WeightSender(receivers=1, bucket_bytes=KIB, timeout=10) as sender:
            refused = threading.Event()
            receiver = threading.Thread(target=receive, args=(answers,))
            receiver.start()
            sender.connect()
            with pytest.raises(ProtocolError, match=says):
                for number in range(4):
                    sender.send(str(number), torch.zeros(KIB, dtype=torch.uint8))
                sender.finish()
            refused.set()
            receiver.join()
