"""Frames: what one side encodes the other decodes, however the socket cuts it."""

import struct

import pytest
from support.models import plan_for

from brim.core.answer import Delta, ErrorInfo
from brim.core.memory import Footprint
from brim.core.request import Message, Request
from brim.core.sampling import SamplingParams
from brim.errors import EngineError
from brim.worker import protocol

REQUEST = Request(
    request_id="r",
    model="toy",
    messages=(Message(role="user", content="grüße"),),
    sampling=SamplingParams(logit_bias=((3, -float("inf")),), seed=1),
    template_variables={"enable_thinking": False},
)
TO_WORKER: list[protocol.GatewayFrame] = [
    protocol.Load(plan_for("toy")),
    protocol.Prepare(1, REQUEST),
    protocol.Start(1, 10),
    protocol.Cancel(1),
    protocol.GetStats(),
    protocol.Shutdown(),
]
TO_GATEWAY: list[protocol.WorkerFrame] = [
    protocol.Hello(protocol.PROTOCOL_VERSION, 7),
    protocol.Loaded(
        footprint=Footprint(
            weights_bytes=1, mapped_weights_bytes=1, kv_bytes=2, compute_bytes=3
        ),
        load_s=0.5,
        exact_profile=True,
        forks_share_kv=True,
    ),
    protocol.LoadFailed(ErrorInfo(kind="ModelFileError", message="bad magic")),
    protocol.Counted(1, 5),
    protocol.Steps(((1, Delta(text="é")), (2, Delta(index=1)))),
]  # fmt: skip


def test_gateway_frames_survive_any_cut() -> None:
    """One byte at a time gives the same frames as all at once."""
    stream = b"".join(map(protocol.encode, TO_WORKER))
    reader = protocol.gateway_frames()
    found = [frame for byte in stream for frame in reader.feed(bytes([byte]))]
    assert found == TO_WORKER
    assert list(protocol.gateway_frames().feed(stream)) == TO_WORKER


def test_worker_frames_come_back_as_they_were() -> None:
    """Every frame of the other direction, in one piece."""
    stream = b"".join(map(protocol.encode, TO_GATEWAY))
    assert list(protocol.worker_frames().feed(stream)) == TO_GATEWAY


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<I", protocol.MAX_FRAME_BYTES + 1), "the limit is"),
        (struct.pack("<I", 3) + b"\xc1\xc1\xc1", "not a frame of protocol"),
        (protocol.encode(protocol.Cancel(1)), "not a frame of protocol"),
    ],
    ids=["too long", "not msgpack", "the wrong direction"],
)
def test_anything_else_is_an_error(data: bytes, message: str) -> None:
    """A reader never guesses where the next frame begins."""
    with pytest.raises(EngineError, match=message):
        list(protocol.worker_frames().feed(data))
