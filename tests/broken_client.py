"""The Python client, broken on purpose in one way: `python -m tests.broken_client FAULT ADDRESS WORKER_ID`."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.clients.python import client
from ma_client import ParameterServerSession
from ma_client.job import center_arrays
from ma_client.job.naming import named
from ma_client.transports.connection import Connection
from ma_client.transports.push import ClientPush, Keep
from ma_client.transports.pushing import Answer
from ma_client.transports.staging import Staging
from modelaverage import errors, wire
from modelaverage.chosen import Chosen
from modelaverage.codecs import codec_named
from modelaverage.codecs.int8 import INT8
from modelaverage.errors import ModelAverageError, ProtocolError, ServerUnavailableError
from modelaverage.manifest import Manifest
from modelaverage.v1 import parameter_server_pb2 as pb

push_and_average = Connection.push_and_average
session_push = ParameterServerSession.push_and_average


def replace(owner: Any, name: str, by: object) -> None:
    setattr(owner, name, by)


def does_not_try_again() -> None:
    client.RECONNECT_TIMEOUT_S = 0.0


def makes_every_attempt_a_new_push() -> None:
    numbers = itertools.count(1)

    def push(self: Connection, header: pb.PushHeader, *arguments: Any) -> Answer:
        header.push_id = next(numbers)
        return push_and_average(self, header, *arguments)

    replace(Connection, "push_and_average", push)


def takes_an_average_without_an_outcome() -> None:
    def push(self: Connection, header: pb.PushHeader, *arguments: Any) -> Answer:
        try:
            return push_and_average(self, header, *arguments)
        except ProtocolError:
            return Answer(pb.PushOutcome(outcome=pb.OUTCOME_COMMITTED, global_step=header.base_step + 1), None)

    replace(Connection, "push_and_average", push)


def keeps_its_base_step() -> None:
    def push(self: ParameterServerSession, *arguments: Any) -> Any:
        base_step = self.base_step
        result = session_push(self, *arguments)
        self.base_step = base_step
        return result

    replace(ParameterServerSession, "push_and_average", push)


def knows_no_padding() -> None:
    def offsets_bytes(self: Manifest) -> tuple[int, ...]:
        return tuple(itertools.accumulate((v.size_bytes for v in self.variables[:-1]), initial=0))

    replace(Manifest, "offsets_bytes", property(offsets_bytes))


def does_not_look_for_missing_fragments() -> None:
    def came(self: ClientPush, first: int, count: int) -> Keep:
        self.received = self._fragment_count
        return Keep(first, count)

    replace(ClientPush, "came", came)


def mixes_up_types_of_16_bits() -> None:
    client.TYPES["f16"], client.TYPES["bf16"] = client.TYPES["bf16"], client.TYPES["f16"]


def sorts_the_variables() -> None:
    words = client.words
    client.words = lambda center: words(dict(sorted(center.items())))


def knows_no_reasons() -> None:
    def name_of(error: ModelAverageError) -> str:
        return error.status or "CLIENT"

    client.name_of = name_of


def answers_twice() -> None:
    def status(self: client.Conformer) -> str:
        print(f"ok {conformer_status(self)}")
        return conformer_status(self)

    conformer_status = client.Conformer.status
    replace(client.Conformer, "status", status)


def counts_in_doubles() -> None:
    def pull(self: client.Conformer, how: str) -> str:
        step, *rest = conformer_pull(self, how).split(" ")
        return " ".join([str(int(float(step))), *rest])

    conformer_pull = client.Conformer.pull
    replace(client.Conformer, "pull", pull)


def never_finishes() -> None:
    def finish(self: client.Conformer) -> str:
        return self.leave()

    replace(client.Conformer, "finish", finish)


def finishes_when_it_leaves() -> None:
    def leave(self: client.Conformer) -> str:
        return self.finish()

    replace(client.Conformer, "leave", leave)


def says(**fields: Any) -> None:
    header = pb.PushHeader

    def push_header(**others: Any) -> pb.PushHeader:
        return header(**others, **fields)

    replace(pb, "PushHeader", push_header)


def knows_no_actions() -> None:
    errors._BY_ACTION.clear()


def takes_every_action_for_later() -> None:
    class Later(dict[str, type[ModelAverageError]]):
        def get(self, *_: Any) -> Any:
            return ServerUnavailableError

    errors._BY_ACTION = Later()


def says_half_duplex_and_waits_for_the_admission() -> None:
    says(half_duplex=True)


def accepts_combined_messages_and_takes_one_thing_of_each() -> None:
    def read(message_type: type[Any], data: bytes) -> Any:
        message = read_fragment(message_type, data)
        if isinstance(message, pb.PushAndAverageResponse) and message.HasField("fragment"):
            message.ClearField("outcome")
        return message

    read_fragment = wire.read_fragment
    says(accepts_combined=True)
    replace(wire, "read_fragment", read)


# Outer optimizers.


def insists_on_the_average() -> None:
    def initialize(self: ParameterServerSession, *arguments: Any) -> Any:
        return session_initialize(self, *arguments, outer_optimizer="average")

    session_initialize = ParameterServerSession.initialize
    replace(ParameterServerSession, "initialize", initialize)


def takes_only_outer_optimizers_that_it_knows() -> None:
    def note(_: ParameterServerSession, told: Chosen) -> None:
        named(told.outer_optimizer or None)

    replace(ParameterServerSession, "_note", note)


# Compression.


def encodes_relative_to_nothing() -> None:
    def encode(manifest: Manifest, index: int, variables: Any, base: NDArray[np.uint8]) -> Any:
        return encode_variables(manifest, index, variables, np.zeros_like(base))

    encode_variables = INT8.encode_variables
    replace(INT8, "encode_variables", encode)


def decodes_relative_to_nothing() -> None:
    def decode(
        manifest: Manifest, flat: NDArray[np.uint8], index: int, data: memoryview, base: NDArray[np.uint8]
    ) -> None:
        decode_into(manifest, flat, index, data, np.zeros_like(base))

    decode_into = INT8.decode_into
    replace(INT8, "decode_into", decode)


def always_names_its_first_base() -> None:
    first = list[int]()

    def push(self: Connection, header: pb.PushHeader, *arguments: Any) -> Answer:
        first.append(header.base_center_id)
        header.base_center_id = first[0]
        return push_and_average(self, header, *arguments)

    replace(Connection, "push_and_average", push)


def takes_every_center_for_coded() -> None:
    def read(message_type: type[Any], data: bytes) -> Any:
        message = read_fragment(message_type, data)
        if isinstance(message, pb.PushAndAverageResponse) and message.HasField("admission"):
            message.admission.codec = INT8.name
        return message

    read_fragment = wire.read_fragment
    replace(wire, "read_fragment", read)


def loses_its_base_when_a_push_breaks() -> None:
    replace(Staging, "roll_back", lambda _: None)


def pushes_in_its_codec_whatever_the_server_says() -> None:
    coded: dict[int, tuple[str, int]] = {}

    def push(self: Connection, header: pb.PushHeader, *arguments: Any) -> Answer:
        first = header.codec, header.base_center_id
        header.codec, header.base_center_id = coded.setdefault(header.push_id, first)
        return push_and_average(self, header, *arguments)

    replace(Connection, "push_and_average", push)


def takes_only_codecs_that_it_knows() -> None:
    replace(center_arrays, "known_codec", codec_named)


# What is broken, and the case that has to notice.
FAULTS = {
    does_not_try_again: "a_push_is_made_again_when_the_page_says_so",
    makes_every_attempt_a_new_push: "a_push_that_breaks_upwards_sends_only_what_is_missing",
    takes_an_average_without_an_outcome: "fragments_without_an_outcome_are_void",
    keeps_its_base_step: "a_push_says_who_pushes_what",
    knows_no_padding: "padding_is_ignored_and_sent_as_zeros",
    does_not_look_for_missing_fragments: "an_average_that_lacks_a_fragment_is_an_error",
    mixes_up_types_of_16_bits: "bfloat16_is_averaged",
    sorts_the_variables: "the_order_is_the_manifest_s",
    knows_no_actions: "after_an_unknown_reason_the_action_is_followed",
    takes_every_action_for_later: "an_unknown_action_means_stop",
    says_half_duplex_and_waits_for_the_admission: "a_half_duplex_client_sends_all_before_anything_comes",
    accepts_combined_messages_and_takes_one_thing_of_each: "the_outcome_may_come_with_the_last_fragment",
    knows_no_reasons: "a_refused_push_is_named_by_its_reason",
    answers_twice: "the_status_tells_the_phase",
    never_finishes: "a_worker_that_has_finished_is_not_waited_for",
    finishes_when_it_leaves: "a_push_says_who_pushes_what",
    counts_in_doubles: "global_step_may_exceed_2_to_the_53",
    insists_on_the_average: "the_servers_outer_optimizer_makes_the_center",
    takes_only_outer_optimizers_that_it_knows: "an_outer_optimizer_that_the_client_does_not_know_changes_nothing",
    decodes_relative_to_nothing: "raw_and_coded_pushes_stand_in_one_round",
    encodes_relative_to_nothing: "a_raw_push_in_a_job_with_a_codec_counts_exactly",
    always_names_its_first_base: "a_codec_is_spoken_as_the_header_says",
    takes_every_center_for_coded: "a_push_in_a_codec_may_be_answered_by_a_raw_center",
    loses_its_base_when_a_push_breaks: "a_push_that_breaks_after_a_part_of_its_center_keeps_its_base",
    pushes_in_its_codec_whatever_the_server_says: "a_base_that_the_server_does_not_have_is_no_end",
    takes_only_codecs_that_it_knows: "a_codec_that_the_client_does_not_know_changes_nothing",
}


if __name__ == "__main__":
    next(fault for fault in FAULTS if fault.__name__ == sys.argv[1])()
    client.conform(*sys.argv[2:])
