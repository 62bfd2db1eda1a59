"""A transport, an outer optimizer and a codec are each added with one file and one line: an example of each.

The file is a class here (or a toy of the other tests), and the line is the entry that a test makes in a registry.
Nothing else is touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ma_client import ParameterServerSession
from ma_client.transports import registry as client_registry
from ma_client.transports.base import ClientLane, ClientTransport, Ending, OutgoingPush
from modelaverage import codecs, outer
from modelaverage.errors import ModelAverageError
from modelaverage.manifest import Manifest, Variable
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.fields import Checkpoint
from ps_server.flow.service import ParameterServerService
from ps_server.transports import registry
from ps_server.transports.base import Opening, Run, Source
from tests.conftest import StartServer
from tests.toy_codec import ToyCodec
from tests.toy_outer import ToyMomentum

pytestmark = pytest.mark.in_memory
COUNT = 1000

# A transport: lofts in the memory of this process, found by a key that the server offers.

LOFTS: dict[bytes, Loft] = {}


class Loft:
    """Holds the bytes of one worker's pushes on their way up and down."""

    def __init__(self) -> None:
        self.up: deque[bytes] = deque()
        self.down = bytearray()


class PigeonPost:
    """The server's end."""

    def open(self, opening: Opening) -> PigeonLane | None:
        if opening.header.uses_transport != "pigeons":
            return None
        return PigeonLane(LOFTS[opening.header.incarnation])

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        if "pigeons" in opening.header.accepts_transports:
            key = opening.header.incarnation
            LOFTS.setdefault(key, Loft())
            admission.offers.add(transport="pigeons", details=key)

    def keep_only(self, worker_ids: frozenset[str]) -> None: ...

    def leave(self, worker_id: str, incarnation: bytes) -> None:  # noqa: ARG002
        LOFTS.pop(incarnation, None)

    def close(self) -> None: ...


class PigeonLane:
    """The server's end of one push."""

    kind = pb.TRANSPORT_UNSPECIFIED
    is_shared = False

    def __init__(self, loft: Loft) -> None:
        self._loft = loft
        self._received = 0

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None: ...

    def whole(self) -> Run | None:
        """Nothing: the fragments never come with the header."""
        return None

    async def receive(self) -> Run | None:
        if not self._loft.up:
            return None
        run = Run(self._received, memoryview(self._loft.up.popleft()))
        self._received += 1
        return run

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:  # noqa: ARG002
        return finished

    async def send(self, average: Source, first: int, end: int) -> bytes:
        for data in average.data(first, end):
            self._loft.down += data
        return b""

    def answered(self, is_committed: bool) -> None: ...

    def close(self) -> None: ...


class ClientPigeonPost(ClientTransport):
    """The client's end."""

    pushes = 0

    def __init__(self) -> None:
        self._key: bytes | None = None

    def begin(self, opening: OutgoingPush) -> ClientLane | None:
        return ClientPigeonLane(LOFTS[self._key], opening) if self._key is not None and opening.may_follow else None

    def announce(self, header: pb.PushHeader, opening: OutgoingPush, is_free: bool) -> None:  # noqa: ARG002
        header.accepts_transports.append("pigeons")

    def admitted(self, admission: pb.PushAdmission, is_free: bool) -> ClientLane | None:  # noqa: ARG002
        for offer in admission.offers:
            if offer.transport == "pigeons":
                self._key = offer.details
        return None


class ClientPigeonLane(ClientLane):
    """The client's end of one push."""

    at_once = is_beside = True

    def __init__(self, loft: Loft, opening: OutgoingPush) -> None:
        self._loft, self._staging = loft, opening.staging
        loft.down.clear()
        count = opening.staging.manifest.fragment_count
        loft.up.extend(b"".join(opening.fragment(index)) for index in range(count))

    def announce(self, header: pb.PushHeader) -> None:
        header.uses_transport = "pigeons"
        ClientPigeonPost.pushes += 1

    def rest(self, goes_on: Callable[[], bool]) -> object | None:  # noqa: ARG002
        self._staging.begin_to_fill()
        self._staging.room()[:] = self._loft.down
        return None

    def end(self, ending: Ending) -> ModelAverageError | None:  # noqa: ARG002
        self._loft.up.clear()
        return None


@pytest.fixture
def pigeons(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.TRANSPORTS, "pigeons", lambda _: PigeonPost())  # the server's line
    here = [lambda _, __: ClientPigeonPost(), *client_registry.TRANSPORTS]  # the client's line
    monkeypatch.setattr(client_registry, "TRANSPORTS", here)
    monkeypatch.setattr(ClientPigeonPost, "pushes", 0)
    yield
    LOFTS.clear()


@pytest.mark.usefixtures("pigeons")
def test_a_transport_is_a_file_and_a_line_on_either_side(start_server: StartServer) -> None:
    server = start_server(1)
    values = {"w": np.arange(COUNT, dtype=np.float32)}
    with ParameterServerSession([server.address], worker_id="a", is_chief=True, fragment_size_bytes=512) as session:
        session.initialize(values)
        for number in range(1, 4):
            pushed = {"w": values["w"] * number}
            result = session.push_and_average(pushed)
            np.testing.assert_array_equal(result.center["w"], pushed["w"])
        assert session.base_step == 3
    assert ClientPigeonPost.pushes == 2  # all but the first, whose admission made the offer


# An outer optimizer.


def test_an_outer_optimizer_is_a_file_and_a_line(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(outer.OUTER_OPTIMIZERS, "toy", ToyMomentum)  # the line
    manifest = Manifest((Variable("w", "float32", (COUNT,)),), 512)
    begin = np.zeros(COUNT, np.float32)
    toy = outer.outer_optimizer("toy:lr=1.0,momentum=0.5")
    restored = Checkpoint(manifest, {"w": begin}, 0, outer=toy, state={"velocity": {"w": np.zeros(COUNT, np.float32)}})
    make = ParameterServerService
    monkeypatch.setattr("tests.in_memory.ParameterServerService", lambda policy: make(policy, restored=restored))
    server = start_server(1)
    with ParameterServerSession([server.address], worker_id="a") as session:
        center, velocity, expected = session.pull()[0]["w"], begin.copy(), begin.copy()
        for _ in range(3):
            local = center + 1
            velocity = 0.5 * velocity + (expected - local)
            expected = expected - velocity
            center = session.push_and_average({"w": local}).center["w"]
            np.testing.assert_array_equal(center, expected)
    assert center[0] > 3  # momentum has carried it further than the average


# A codec.


def test_a_codec_is_a_file_and_a_line(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ToyCodec()
    monkeypatch.setitem(codecs.CODECS, toy.name, toy)  # the line
    server = start_server(1)
    values = np.linspace(-1, 1, COUNT, dtype=np.float32)
    with ParameterServerSession(
        [server.address], worker_id="a", is_chief=True, fragment_size_bytes=512, shared_memory=False
    ) as session:
        session.initialize({"w": values}, compression=toy.name)
        session.pull()
        before = session.status()
        result = session.push_and_average({"w": values * 2})
        after = session.status()
    np.testing.assert_allclose(result.center["w"], values * 2, atol=1e-3)
    for field in ("received", "sent"):
        moved, raw = (getattr(after, name) - getattr(before, name) for name in (f"{field}_bytes", f"{field}_raw_bytes"))
        assert raw == values.nbytes
        assert 0.5 < moved / raw < 0.65
