"""How a server gets its center: from the chief, or from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from modelaverage import wire
from modelaverage.checks import check_global_step, check_worker_id
from modelaverage.chosen import Chosen
from modelaverage.codecs import RAW, Codec, codec_named
from modelaverage.errors import Reason, refusal
from modelaverage.logs import event
from modelaverage.manifest import MAX_VARIABLES, Manifest, first_difference
from modelaverage.outer import AVERAGE, OuterOptimizer, outer_optimizer, text_of
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.center import Center
from ps_server.checkpoints.reading import Checkpoint
from ps_server.flow.call import Call
from ps_server.flow.job import Job, Surroundings
from ps_server.flow.naming import check_named, chosen_of, named
from ps_server.flow.pulls import WaitForChief
from ps_server.machine.helper_thread import HelperThread, no_collections
from ps_server.machine.reserve import Reserve
from ps_server.rules.fragments import check_fragment_order
from ps_server.rules.policy import KeepingPolicy, RoundPolicy
from ps_server.rules.round import Round

__all__ = ["Initialization"]

_log = logging.getLogger("ps_server")
# A model above any of these limits is handled off the event loop, so that other calls do not wait.
_MANY_VARIABLES = 1000
_MANY_FRAGMENTS = 8192
_MANY_BYTES = 64 << 20
_T = TypeVar("_T")


class Initialization:
    """Creates the job, once. Used on one running event loop.

    Args:
        policy: which workers a round waits for.
        max_model_bytes: a center that needs more than twice as much memory is refused.
        shared_memory_from_bytes: centers of at least this size lie in shared memory.
        around: the services that the job uses.
        waiting: calls that wait for a center.
        reserve: descriptors for the center's memory.
        helper: a thread for large models.

    Attributes:
        job: None until there is a center.
        chiefs: calls that are sending a center.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        max_model_bytes: int,
        shared_memory_from_bytes: float,
        around: Surroundings,
        waiting: WaitForChief,
        reserve: Reserve,
        helper: HelperThread,
    ) -> None:
        self.job: Job | None = None
        self.chiefs: set[Call] = set()
        self._policy = policy
        self._max_model_bytes = max_model_bytes
        self._shared_memory_from_bytes = shared_memory_from_bytes
        self._around = around
        self._waiting = waiting
        self._reserve = reserve
        self._helper = helper

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores the job from a checkpoint."""
        manifest = checkpoint.manifest
        center = self._empty_center(manifest, checkpoint.outer, checkpoint.codec)
        center.load_arrays(checkpoint.arrays, checkpoint.state, checkpoint.center_id)
        round_ = Round(
            self._policy,
            manifest.fragment_count,
            checkpoint.global_step,
            checkpoint.contributors,
            dict(checkpoint.counted or {}),
            frozenset(checkpoint.finished),
            self._keeping,
        )
        header = wire.PullHeader(manifest, chosen_of(checkpoint.outer, checkpoint.codec).told.texts)
        self._begin(center, header, round_, is_restored=True)

    async def receive(self, call: Call, heard: Callable[[str], None]) -> pb.InitializeResponse:
        """Serves a call of the chief: takes the center that it sends, or answers that one exists. ``heard`` gets the
        chief's id at once.

        Raises:
            ModelAverageError: the center is refused; an existing center is unchanged.
        """
        header = await call.read_header(pb.InitializeRequest)
        call.worker_id = header.worker_id
        check_worker_id(header.worker_id)
        heard(header.worker_id)
        check_global_step(header.global_step)
        wanted = named(header)
        outer, codec = _outer_of(wanted), codec_named(wanted.compression)
        many = _MANY_VARIABLES < len(header.manifest.variables) <= MAX_VARIABLES
        manifest, pull_header = await self._beside_the_loop(call, many, lambda: _read_manifest(header, wanted))
        is_first = False
        if self.job is None:
            self.chiefs.add(call)
            try:
                values = await self._receive_values(call, manifest, outer, codec)
            finally:
                self.chiefs.discard(call)
            create = partial(self._new_center, manifest, values, outer, codec)
            center = await self._beside_the_loop(call, _is_large(manifest), create)
            del create
            del values
            if self.job is None and center is not None:  # another call may have initialized the center meanwhile
                round_ = Round(self._policy, manifest.fragment_count, header.global_step, keeping=self._keeping)
                self._begin(center, pull_header, round_)
                is_first = True
                _log_initialized(header, manifest, center, call.peer)
        job = self.job
        assert job is not None
        if not is_first:
            await self._check_same(call, manifest, job.manifest, many)
            check_named(wanted, job.chosen)
        record = self._around.roster.heard_of(header.worker_id, self._around.clock())
        record.is_chief = record.may_push = True
        if is_first:
            await job.keep()
        return pb.InitializeResponse(
            initialized=is_first,
            global_step=job.round.global_step,
            manifest_id=job.manifest.id,
            num_workers=self._policy.num_workers,
            shard=wire.shard_to_message(job.manifest.shard),
            **job.chosen.told.texts,
        )

    @property
    def _keeping(self) -> KeepingPolicy | None:
        """Which rounds are written to disk before they are answered."""
        keeper = self._around.keeper
        return None if keeper is None else KeepingPolicy(keeper.every_rounds, keeper.timeout_s)

    def _begin(self, center: Center, pull_header: wire.PullHeader, round_: Round, is_restored: bool = False) -> None:
        self.job = Job(center, pull_header, round_, self._around)
        self._around.history.begun(round_.global_step, is_restored, self._around.clock())
        self._waiting.end()

    async def _check_same(self, call: Call, manifest: Manifest, in_force: Manifest, many: bool) -> None:
        compare = partial(first_difference, manifest.variables, in_force.variables, "in the call", "on the server")
        difference = await self._beside_the_loop(call, many, compare)
        if difference is not None:
            raise refusal(
                Reason.MANIFEST_MISMATCH,
                f"the center was initialized with another manifest: {difference}; give all workers the same model",
            )

    async def _beside_the_loop(self, call: Call, is_long: bool, work: Callable[[], _T]) -> _T:
        """Returns the result of ``work``. Long work runs in the helper and does not count against the client's stall
        timeout."""
        if not is_long:
            return work()
        call.expecting = False
        result = await self._helper.run(work)
        call.expecting = True
        return result

    async def _receive_values(
        self, call: Call, manifest: Manifest, outer: OuterOptimizer, codec: Codec
    ) -> NDArray[np.uint8]:
        """The flat buffer that the chief sends. Memory is committed only as bytes arrive, so a header alone costs
        nothing."""
        memory_bytes = Center.memory_bytes(manifest, outer, codec)
        if memory_bytes > 2 * self._max_model_bytes:
            raise refusal(
                Reason.MANIFEST_INVALID,
                f"a model of {manifest.size_bytes} bytes with {outer.name} and {codec.name} needs "
                f"{memory_bytes} bytes of memory, over twice the server's --max-model-bytes {self._max_model_bytes}",
            )
        values = np.zeros(manifest.buffer_size_bytes, np.uint8)
        for expected in range(manifest.fragment_count):
            fragment = await call.read_content()
            if not isinstance(fragment, tuple):
                raise refusal(
                    Reason.FRAGMENT_MISSING,
                    f"the stream ended after {expected} of {manifest.fragment_count} fragments; initialize again",
                )
            index, data = fragment
            call.count_received(len(data), len(data))
            check_fragment_order(index, expected, manifest.fragment_count)
            RAW.check_size(manifest, index, data)
            RAW.decode_run(manifest, values, index, data)
        if await call.read() is not None:
            raise refusal(
                Reason.FRAGMENT_EXTRA, f"a message came after the last of {manifest.fragment_count} fragments"
            )
        return values

    def _new_center(
        self, manifest: Manifest, values: NDArray[np.uint8], outer: OuterOptimizer, codec: Codec
    ) -> Center | None:
        """A center with these values, a flat buffer; None if there is a job already."""
        if self.job is not None:
            return None
        with no_collections() if _is_large(manifest) else nullcontext():
            center = self._empty_center(manifest, outer, codec)
            for index in range(manifest.fragment_count):
                start, end = manifest.fragment_bounds(index)
                center.load(index, values[start:end].data)
        return center

    def _empty_center(self, manifest: Manifest, outer: OuterOptimizer, codec: Codec) -> Center:
        if manifest.buffer_size_bytes >= self._shared_memory_from_bytes:
            try:
                return Center(manifest, True, self._reserve, outer, codec)
            except OSError as error:
                _log.warning(
                    "no shared memory for the center: %s; all bytes go inline",
                    error,
                    extra=event("no_shared_memory", worker=None),
                )
        return Center(manifest, outer=outer, codec=codec)


def _log_initialized(header: pb.InitializeHeader, manifest: Manifest, center: Center, peer: str) -> None:
    _log.debug(
        "center initialized by %r: %s%d variables, %d bytes, global_step %d, outer optimizer %s, compression %s",
        header.worker_id,
        "" if manifest.shard is None else f"{manifest.shard}, ",
        len(manifest.variables),
        manifest.size_bytes,
        header.global_step,
        text_of(center.outer),
        center.codec.name,
        extra=event(
            "center_initialized",
            worker=header.worker_id,
            peer=peer,
            round=header.global_step,
            variables=len(manifest.variables),
            size_bytes=manifest.size_bytes,
            outer_optimizer=text_of(center.outer),
            compression=center.codec.name,
        ),
    )


def _outer_of(chosen: Chosen) -> OuterOptimizer:
    return outer_optimizer(chosen.outer_optimizer) if chosen.outer_optimizer else AVERAGE


def _read_manifest(header: pb.InitializeHeader, wanted: Chosen) -> tuple[Manifest, wire.PullHeader]:
    """Raises InvalidRequestError (MANIFEST_INVALID), also if no pull could be answered with it."""
    manifest = wire.manifest_from_message(header.manifest)
    return manifest, wire.PullHeader(manifest, wanted.told.texts)


def _is_large(manifest: Manifest) -> bool:
    return (
        len(manifest.variables) > _MANY_VARIABLES
        or manifest.fragment_count > _MANY_FRAGMENTS
        or manifest.buffer_size_bytes > _MANY_BYTES
    )
