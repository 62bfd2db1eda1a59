"""Well-formed messages of every type: those that correct clients and the server exchange about small models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from modelaverage import wire
from modelaverage.codecs import codec_named
from modelaverage.manifest import Manifest, Variable
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = [
    "CENTER_ID",
    "CENTER_VALUE",
    "COMPRESSIONS",
    "CONVERSATIONS",
    "INCARNATIONS",
    "MODELS",
    "OUTER_TEXTS",
    "Model",
    "RESPONSES",
    "STEP",
    "WORKER_IDS",
    "conversations",
    "initialize_messages",
    "odd_fragment",
    "push_header",
    "responses",
]

CENTER_VALUE = -1.0
CENTER_ID = 0x0123456789ABCDEF
"""Of the center that a push in a codec is relative to."""
STEP = 7
# Padding between variables has no meaning, so it gets bytes that no average can have.
_PADDING = 0xA5
INCARNATIONS = (b"0123456789abcdef", b"\x00" * 16, b"\xff" * 16)
OUTER_TEXTS = (
    "average",
    "sgd:lr=0.7,momentum=0.9,nesterov",
    "adam:lr=0.1,betas=0.5/0.75",
    "sgd:lr=1e999",
    "of:the=future",
)
COMPRESSIONS = ("int8", "raw", "bfloat16", "int4", "INT8", "of-the-future: \u00fc")
WORKER_IDS = ("a", "b", "worker 3", "\u00fc", "\U0001f9e0" * 32)


@dataclass(frozen=True, eq=False)
class Model:
    """A manifest, and values for it that are easy to tell apart."""

    manifest: Manifest

    @cached_property
    def message(self) -> pb.Manifest:
        """The manifest as it goes over the wire."""
        return wire.manifest_to_message(self.manifest)

    @lru_cache(128)  # noqa: B019  # the models live as long as the module
    def flat(self, value: float, padding: int = _PADDING) -> bytes:
        """The flat buffer of a model that has ``value`` everywhere."""
        buffer: NDArray[np.uint8] = np.full(self.manifest.buffer_size_bytes, padding, np.uint8)
        for array in self.manifest.arrays(buffer).values():
            array[...] = value
        return buffer.tobytes()

    @lru_cache(128)  # noqa: B019
    def pieces(self, value: float) -> tuple[bytes, ...]:
        """The same in fragments."""
        bounds = map(self.manifest.fragment_bounds, range(self.manifest.fragment_count))
        return tuple(self.flat(value)[start:end] for start, end in bounds)

    @lru_cache(128)  # noqa: B019
    def fragments(self, value: float) -> tuple[bytes, ...]:
        """The messages that carry them."""
        return tuple(wire.encode_fragment(index, (piece,)) for index, piece in enumerate(self.pieces(value)))

    @lru_cache(128)  # noqa: B019
    def coded_fragments(self, value: float, codec: str) -> tuple[bytes, ...]:
        """The messages that carry the change from the center to ``value`` in a codec."""
        manifest = self.manifest
        base, values = (np.frombuffer(self.flat(each), np.uint8) for each in (CENTER_VALUE, value))
        return tuple(
            wire.encode_fragment(
                index,
                codec_named(codec).encode(
                    manifest, index, manifest.piece_arrays(index, values), manifest.piece_arrays(index, base)
                ),
            )
            for index in range(manifest.fragment_count)
        )


MODELS = tuple(
    Model(Manifest(tuple(Variable(*variable) for variable in variables), size_bytes, frozen_digests=b"digests!"))
    for size_bytes, *variables in (
        (64, ("w", "float32", (3, 1)), ("b", "float32", ())),
        (
            64,
            ("w", "float32", (7, 3)),
            ("nothing", "float16", (0, 4)),
            ("scale", "float64", ()),
            ("half", "float16", (3, 3)),
            ("brain", "bfloat16", (31,)),
            ("\u00e9t\u00e9", "float64", (2,)),
        ),
        (8, ("x", "bfloat16", (5,)), ("y", "float64", (3,)), ("z", "float16", (1,))),
        (1024, ("long", "float32", (700,)), ("short", "float16", (2, 1, 1, 1))),
        (8, ("empty", "float32", (0,))),
        (1024, ("coded", "float32", (1030,)), ("half", "float16", (1024,)), ("double", "float64", (3,))),
    )
)


def initialize_messages(
    model: Model,
    worker_id: str,
    step: int,
    value: float = CENTER_VALUE,
    fragment_size_bytes: int | None = None,
    outer: str = "",
    compression: str = "",
) -> list[bytes]:
    """A chief's header and fragments."""
    header = pb.InitializeHeader(
        worker_id=worker_id, manifest=model.message, global_step=step, outer_optimizer=outer, compression=compression
    )
    if fragment_size_bytes is not None:
        header.manifest.fragment_size_bytes = fragment_size_bytes
    return [pb.InitializeRequest(header=header).SerializeToString(), *model.fragments(value)]


def push_header(model: Model, worker_id: str, step: int, **fields: Any) -> pb.PushHeader:
    """The header of a good push, with ``fields`` changed."""
    right: dict[str, Any] = {"incarnation": INCARNATIONS[0], "push_id": 1, "manifest_id": model.manifest.id}
    return pb.PushHeader(**{"worker_id": worker_id, "base_step": step, **right, **fields})


def odd_fragment(index: int, data: bytes) -> bytes:
    """A legal encoding of a fragment that protobuf itself would not write: other order, long varint, unknown field."""
    inner = b"\x12" + _long_varint(len(data)) + data + b"\x08" + _long_varint(index) + b"\x78\x01"
    return b"\x12" + _long_varint(len(inner)) + inner


def _long_varint(value: int) -> bytes:
    return bytes((*(value >> 7 * place & 0x7F | 0x80 for place in range(5)), 0))


def _serialized(messages: Iterable[Message]) -> list[bytes]:
    return [message.SerializeToString() for message in messages]


def _pushes(model: Model, step: int) -> list[list[bytes]]:
    fragments, odd = list(model.fragments(2.0)), [odd_fragment(i, p) for i, p in enumerate(model.pieces(3.0))]
    count = len(fragments)
    all_shared = [pb.PushAndAverageRequest(shared=pb.SharedFragments(first=0, count=count)).SerializeToString()]
    bodies: list[tuple[dict[str, Any], list[bytes]]] = [
        ({}, fragments),
        ({}, odd),
        ({"weight": 0.5, "push_id": 2**64 - 1, "is_chief": True, "local_step": 2**64 - 1}, fragments),
        ({"incarnation": INCARNATIONS[1], "untouched_variables": range(len(model.manifest.variables))}, fragments),
        ({"accepts_shared_memory": True}, all_shared),
        ({"accepts_shared_memory": True, "weight": 1e9}, [*fragments[:1], *all_shared]),
        ({"fragments_follow": True}, fragments),
        ({"fragments_follow": True, "accepts_shared_memory": True, "weight": 1e-9}, odd),
        ({"half_duplex": True}, fragments),
        ({"half_duplex": True, "accepts_combined": True, "accepts_shared_memory": True}, odd),
        ({"accepts_combined": True, "fragments_follow": True, "accepts_runs": True}, fragments),
        ({"codec": "raw"}, fragments),
        ({"codec": "of-the-future", "accepts_transports": ["memory"], "uses_transport": "memory"}, fragments),
        *(
            ({"codec": codec, "base_center_id": CENTER_ID, "half_duplex": codec == "int4"}, body)
            for codec in ("int8", "int4", "bfloat16")
            for body in ([*model.coded_fragments(2.0, codec)], [*model.coded_fragments(3.0, codec)], fragments)
        ),
        *(
            ({"codec": "int8", "base_center_id": center_id, "base_step": at}, [*model.coded_fragments(2.0, "int8")])
            for center_id, at in ((0, step), (2**64 - 1, step), (CENTER_ID, step + 1), (CENTER_ID, step - 1))
        ),
        ({"codec": "int8", "base_center_id": CENTER_ID, "purpose": pb.PURPOSE_RESTORE}, fragments),
        ({"codec": "int8", "base_center_id": CENTER_ID, "accepts_shared_memory": True}, all_shared),
        ({"base_center_id": CENTER_ID}, fragments),
        ({"accepts_data_connection": True}, fragments),
        ({"uses_data_connection": True}, fragments),
        ({"base_step": step - 1, "interval_steps": 50}, []),
        ({"base_step": step + 1}, fragments),
        ({"base_step": 2**63 - 1}, fragments),
    ]
    pushes = []
    for number, (fields, body) in enumerate(bodies):
        header = push_header(model, WORKER_IDS[number % len(WORKER_IDS)], step, **fields)
        first = pb.PushAndAverageRequest(header=header).SerializeToString()
        pushes.append([first, *body])
        if (header.fragments_follow or header.half_duplex) and body:
            pushes.append([first + body[0], *body[1:]])
    return pushes


def conversations(model: Model, step: int) -> dict[str, list[list[bytes]]]:
    """By handler, what good clients send: streams of messages, or single ones."""
    leaves = [
        pb.LeaveRequest(worker_id=worker_id, incarnation=incarnation, finished=finished)
        for worker_id in WORKER_IDS
        for incarnation in INCARNATIONS
        for finished in (False, True)
    ]
    joins = [
        pb.JoinRequest(incarnation=incarnation, task_index=wanted)
        for incarnation in INCARNATIONS
        for wanted in (None, 0, 1, 2**32 - 1)
    ]
    pulls = [pb.PullRequest(worker_id=w, wait_initialized=wait) for w in WORKER_IDS for wait in (False, True)]
    pulls += [
        pb.PullRequest(worker_id=WORKER_IDS[0], wait_initialized=True, accepts_notices=True),
        pb.PullRequest(worker_id=WORKER_IDS[1], will_train=True),
        *(pb.PullRequest(worker_id="b", outer_optimizer=outer) for outer in OUTER_TEXTS),
        *(pb.PullRequest(worker_id="b", compression=compression) for compression in COMPRESSIONS),
        *(pb.PullRequest(worker_id="b", first_fragment=1, continued_step=at) for at in (step, step - 1)),
        pb.PullRequest(worker_id="b", first_fragment=2**32 - 1, continued_step=step, header_only=True),
    ]
    initializes = [
        initialize_messages(each, worker_id, at, 4.0)
        for each in (model, *MODELS)
        for worker_id, at in (("chief", step), (WORKER_IDS[-1], 0), ("b", 2**63 - 1))
    ]
    initializes += [initialize_messages(model, "chief", step, 4.0, outer=outer) for outer in OUTER_TEXTS]
    initializes += [initialize_messages(model, "chief", step, 4.0, compression=name) for name in COMPRESSIONS]
    return {
        "Initialize": initializes,
        "Pull": [[message] for message in _serialized(pulls)],
        "PushAndAverage": _pushes(model, step),
        "Leave": [[message] for message in _serialized(leaves)],
        "GetStatus": [[b""]],
        "Join": [[message] for message in _serialized(joins)],
    }


def responses(model: Model, step: int) -> list[bytes]:
    """Messages of the server: hostile clients send them back to it."""
    memory = pb.SharedMemory(path="/proc/123/fd/7", nonce=bytes(16))
    outcomes = [
        pb.PushOutcome(
            outcome=outcome,
            global_step=step,
            contributors=["a", "b"],
            waited_s=0.5,
            untouched_variables=[0],
            center_id=CENTER_ID,
        )
        for outcome in (pb.OUTCOME_COMMITTED, pb.OUTCOME_STALE, pb.OUTCOME_ALREADY_COUNTED)
    ]
    offers = [pb.TransportOffer(transport="memory", details=b"\x00\x01")]
    admission = pb.PushAdmission(
        first_needed_fragment=1, contribution=memory, average=memory, offers=offers, codec="int8"
    )
    missing = [pb.MissingWorker(has_left=True, last_seen_age_s=7.0)]
    waiting = pb.WaitingNotice(
        waiting_for=["a"], waiting_for_unknown=2, round_age_s=5, missing=missing, finished=["b"], workers_training=3
    )
    center = pb.CenterHeader(manifest=model.message, manifest_id=model.manifest.id, global_step=step, num_workers=2)
    center.outer_optimizer, center.compression, center.center_id = OUTER_TEXTS[1], "int8", CENTER_ID
    status = pb.GetStatusResponse(
        phase=pb.PHASE_AVERAGING, global_step=step, workers=[pb.WorkerStatus(worker_id="a", is_chief=True)]
    )
    return _serialized(
        [
            pb.InitializeResponse(initialized=True, global_step=step, manifest_id=model.manifest.id, num_workers=2),
            pb.PullResponse(header=center),
            pb.PullResponse(waiting=pb.ChiefNotice(waited_s=15.0)),
            pb.LeaveResponse(workers_training=1, global_step=step),
            pb.PushAndAverageResponse(admission=admission),
            pb.PushAndAverageResponse(waiting=waiting),
            *(pb.PushAndAverageResponse(outcome=outcome) for outcome in outcomes),
            status,
        ]
    )


CONVERSATIONS = tuple(conversations(model, STEP) for model in MODELS)
RESPONSES = tuple(responses(model, STEP) for model in MODELS)
