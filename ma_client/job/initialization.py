"""How the chief initializes the center: on one server, or consistently on all shards of a job."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ma_client.job.all_servers import AllServers
from ma_client.job.assembly import Assembly
from ma_client.job.naming import check_has, check_same
from ma_client.job.one_server import OneServer, known_codec
from ma_client.transports.staging import Staging
from ma_client.values.raw import bytes_of
from modelaverage import wire
from modelaverage.chosen import NOTHING_CHOSEN, Chosen
from modelaverage.codecs import RAW
from modelaverage.errors import ConflictError, NotInitializedError, Reason
from modelaverage.manifest import Manifest, Shard, Variable, first_difference
from modelaverage.placement import default_fragment_size_bytes, place
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["CenterSet", "Proposal", "initialize"]


@dataclass(frozen=True)
class Proposal:
    """The center that the chief wants to set.

    Args:
        worker_id: the chief's worker id.
        variables: the variables of the whole model.
        values: their bytes.
        global_step: the step at which to start counting rounds.
        placement: assigns parts of the model to servers.
        fragment_size_bytes: None: chosen by the size of the model and the number of servers.
        must_be_new: whether an existing center is an error.
        chosen: the job's choices; empty: those of an existing center, or the defaults.
        frozen_digests: see `Manifest`. An existing center keeps those that it has.
    """

    worker_id: str
    variables: tuple[Variable, ...]
    values: Sequence[memoryview]
    global_step: int
    placement: str
    fragment_size_bytes: int | None
    must_be_new: bool
    chosen: Chosen = NOTHING_CHOSEN
    frozen_digests: bytes = b""

    def manifest(self, num_shards: int) -> Manifest:
        """The manifest of the whole model."""
        if self.fragment_size_bytes is not None:
            return Manifest(self.variables, self.fragment_size_bytes, frozen_digests=self.frozen_digests)
        buffer_size_bytes = Manifest(self.variables).buffer_size_bytes
        is_coded = self.chosen.in_force.compression != RAW.name
        fragment_size_bytes = default_fragment_size_bytes(buffer_size_bytes, num_shards, is_coded)
        return Manifest(self.variables, fragment_size_bytes, frozen_digests=self.frozen_digests)


@dataclass(frozen=True)
class CenterSet:
    """The result of an initialization.

    Args:
        by_this_call: whether this call set the center.
        global_step: the number of completed rounds.
        num_workers: how many workers a round waits for.
        assembly: the shards, if this call set all of them.
        chosen: the job's choices, as servers tell them.
    """

    by_this_call: bool
    global_step: int
    num_workers: int
    assembly: Assembly | None
    chosen: Chosen


def initialize(servers: AllServers, addresses: Sequence[str], proposal: Proposal, deadline: Deadline) -> CenterSet:
    """Sets the center on all servers, or completes an interrupted initialization. Changes nothing if it is set.

    Raises:
        InvalidRequestError: MANIFEST_INVALID: a manifest is too long for a message; nothing was sent.
        ConflictError: MANIFEST_MISMATCH: another model is in force, or the servers do not belong together;
            OUTER_OPTIMIZER_MISMATCH, COMPRESSION_MISMATCH: the center has another one; or the center exists but must be
            new.
        NotInitializedError: a server has lost its part of a center that has already been averaged.
    """
    there = _centers_there(servers, deadline) if len(servers) > 1 or proposal.must_be_new else [None]
    headers = [header for header in there if header is not None]
    if headers and proposal.must_be_new:
        steps = {address: header.global_step for address, header in zip(addresses, there, strict=True) if header}
        raise _not_new(*steps.popitem())
    chosen = _chosen(proposal.chosen, addresses, there)
    if len(headers) == len(servers):
        manifests = [wire.manifest_from_message(header.manifest) for header in headers]
        _check_variables(proposal.variables, Assembly(manifests, addresses).manifest.variables)
        step = max(header.global_step for header in headers)
        return CenterSet(False, step, headers[0].num_workers, None, Chosen.of(headers[0]))
    if any(header.global_step != proposal.global_step for header in headers):
        lost = next(address for address, header in zip(addresses, there, strict=True) if header is None)
        raise NotInitializedError(
            f"the parameter server at {lost} has no center, but others have reached global_step "
            f"{max(header.global_step for header in headers)}; start it with the --checkpoint-dir that it had",
            Reason.NOT_INITIALIZED,
        )
    shards = _place(proposal, addresses, there)
    # Checks all manifests before the first is sent.
    messages = [pb.Manifest.FromString(wire.encode_manifest(shard)) for shard in shards]
    assembly = Assembly(shards, addresses)
    values = assembly.cut(proposal.values)

    def set_one(index: int, server: OneServer) -> pb.InitializeResponse:
        header = pb.InitializeHeader(
            worker_id=proposal.worker_id,
            manifest=messages[index],
            global_step=proposal.global_step,
            **chosen.texts,
        )
        response = server.initialize(header, values[index], assembly.stagings[index], deadline)
        _check_shard(response, shards[index].shard, addresses[index])
        check_has(chosen, Chosen.of(response), addresses[index])
        return response

    # The first server goes first: its center determines the job's id.
    first = set_one(0, next(iter(servers)))
    # Shards are tied to their job by a random id from this call; a single server's center has none.
    if proposal.must_be_new and len(servers) == 1 and not first.initialized:
        _check_ours(proposal, first, next(iter(servers)), assembly.stagings[0], addresses[0], deadline)
    rest = servers.each(lambda index, server: set_one(index, server) if index > 0 else first)
    all_set = not headers and all(response.initialized for response in rest)
    return CenterSet(
        proposal.must_be_new or any(response.initialized for response in rest),
        first.global_step,
        first.num_workers,
        assembly if all_set else None,
        Chosen.of(first),
    )


def _chosen(wanted: Chosen, addresses: Sequence[str], there: Sequence[pb.CenterHeader | None]) -> Chosen:
    """The choices to send: the wanted ones, or those of the centers that are there. Raises ConflictError if they
    differ."""
    told = {address: Chosen.of(header) for address, header in zip(addresses, there, strict=True) if header}
    if not told:
        return wanted
    check_same(list(told.values()), list(told))
    address, first = next(iter(told.items()))
    check_has(wanted, first, address)
    return first.in_force


def _check_ours(
    proposal: Proposal,
    answer: pb.InitializeResponse,
    server: OneServer,
    staging: Staging,
    address: str,
    deadline: Deadline,
) -> None:
    """Checks that a center which appeared during this call is its own (the answer was lost). Raises ConflictError."""
    if answer.global_step == proposal.global_step:
        server.adopt(staging, answer.manifest_id, known_codec(answer.compression))
        server.pull(False, deadline)
        if all(bytes_of(a) == value for a, value in zip(staging.arrays.values(), proposal.values, strict=True)):
            return
    raise _not_new(address, answer.global_step)


def _not_new(address: str, global_step: int) -> ConflictError:
    return ConflictError(
        f"the center must be new, but the parameter server at {address} has one already, at global_step "
        f"{global_step}: of an earlier run, or this chief was restarted. To continue from it, leave out --fresh "
        "(must_be_new, MA_FRESH); to begin with new values, start the servers with an empty --checkpoint-dir. Nothing "
        "was changed"
    )


def _centers_there(servers: AllServers, deadline: Deadline) -> list[pb.CenterHeader | None]:
    """The header of each server's center; None: it has none."""

    def header(_: int, server: OneServer) -> pb.CenterHeader | None:
        try:
            return server.center_header(False, deadline)
        except NotInitializedError:
            return None

    return servers.each(header)


def _place(proposal: Proposal, addresses: Sequence[str], there: Sequence[pb.CenterHeader | None]) -> Sequence[Manifest]:
    """The shards' manifests. Shards set by an interrupted initialization keep theirs."""
    job_id = uuid.uuid4().bytes
    manifests = [None if header is None else wire.manifest_from_message(header.manifest) for header in there]
    for manifest in manifests:
        if manifest is not None and manifest.shard is not None:
            job_id = manifest.shard.job_id
    first = manifests[0]
    if first is not None:  # a chief that comes again may have others now; the job keeps the first ones
        proposal = replace(proposal, frozen_digests=first.frozen_digests)
    placed = place(proposal.manifest(len(addresses)), len(addresses), proposal.placement, job_id)
    for address, here, wanted in zip(addresses, manifests, placed, strict=True):
        if here is not None and here != wanted:
            difference = first_difference(wanted.variables, here.variables, "in this call", f"at {address}")
            raise ConflictError(
                f"the parameter server at {address} was initialized for another job: it is "
                f"{here.shard or 'no shard'}, {difference or 'divided in another way'}; give the addresses of one job "
                "in order, or start the servers again",
                Reason.MANIFEST_MISMATCH,
            )
    return placed


def _check_variables(ours: Sequence[Variable], theirs: Sequence[Variable]) -> None:
    difference = first_difference(ours, theirs, "in this call", "on the servers")
    if difference is not None:
        raise ConflictError(
            f"the center was initialized with another manifest: {difference}; give all workers the same model",
            Reason.MANIFEST_MISMATCH,
        )


def _check_shard(response: pb.InitializeResponse, wanted: Shard | None, address: str) -> None:
    in_force = wire.shard_from_message(response.shard) if response.HasField("shard") else None
    if in_force != wanted:
        raise ConflictError(
            f"the parameter server at {address} is {in_force or 'no shard'}, not {wanted or 'a whole model'}; give the "
            "addresses of all servers of one job, in order",
            Reason.MANIFEST_MISMATCH,
        )
