"""Observes what a server receives and does, and checks it against the rules."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fuzz.context import ClientCall, Failure
from fuzz.corpus import MODELS, Model
from fuzz.finishing import Finishing
from fuzz.world import Center, World
from modelaverage.outcome import Outcome
from modelaverage.purpose import Purpose
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.policy import RoundPolicy

__all__ = ["Given", "Key", "Witness"]

# Worker id, incarnation and number of a push.
Key = tuple[str, bytes, int]
_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass
class Given:
    """What was sent of one push, on all its streams.

    Attributes:
        indexes: of the fragments that were sent correctly.
    """

    value: float
    weight: float
    untouched: frozenset[int]
    purpose: Purpose = Purpose.CONTRIBUTE
    indexes: set[int] = field(default_factory=set)


class Witness:
    """What is known of one server.

    Attributes:
        model: the model of its center; None while there is no center.
        center: the center as last seen.
        initials: what chiefs have sent: step, model and value.
        given: what workers have sent.
    """

    def __init__(self, world: World, policy: RoundPolicy, finishing: Finishing, endings: Counter[str]) -> None:
        self.model: Model | None = None
        self.center: Center | None = None
        self.initials: list[tuple[int, Model, float]] = []
        self.given: dict[Key, Given] = {}
        self._world = world
        self._policy = policy
        self._finishing = finishing
        self._endings = endings
        self._centers: dict[int, bytes] = {}
        self._counted: dict[str, tuple[bytes, int]] = {}  # as it was last seen

    def center_of(self, step: int) -> bytes | None:
        """The center of a step; None if it was never seen."""
        return self._centers.get(step)

    def look(self) -> bool:
        """Whether a round has committed. Raises Failure if the center has changed other than by a chief or by a round
        of pushes that came whole."""
        before, after = self.center, self._world.center()
        if before == after:
            return False
        assert after is not None
        self.center = after
        self._centers[after.step] = after.flat
        self._endings["(rounds committed)"] += before is not None
        if before is None:
            if not any(self._is_initial(after, *initial) for initial in self.initials):
                raise Failure(f"no chief has sent this center: {after}")
        elif after.step <= before.step:
            raise Failure(f"the center changed, but the step went from {before.step} to {after.step}")
        else:
            self._check_average(before, after)
        return before is not None

    def _is_initial(self, center: Center, step: int, model: Model, value: float) -> bool:
        job = self._world.job
        assert job is not None
        self.model = next(each for each in MODELS if each.manifest.id == job.manifest.id)
        return (step, model) == (center.step, self.model) and center.flat == model.flat(value, 0)

    def _check_average(self, before: Center, after: Center) -> None:
        job, policy = self._world.job, self._policy
        assert job is not None
        fragments = set(range(job.manifest.fragment_count))
        counted, self._counted = self._counted, dict(job.round.counted)
        names = tuple(name for name, key in sorted(self._counted.items()) if counted.get(name) != key)
        if not self._finishing.least(names) <= len(names) <= policy.max_workers:
            raise Failure(f"a round of {names} committed with {policy}")
        pushes = dict[str, Given]()
        for worker_id in names:
            key = (worker_id, *job.round.counted[worker_id])
            given = self.given.get(key)
            if given is None or not (given.purpose is Purpose.ABSTAIN or given.indexes == fragments):
                raise Failure(f"a round committed with {key}, which never came whole")
            if given.purpose is not Purpose.ABSTAIN:
                pushes[worker_id] = given
        if job.round.contributors != tuple(pushes):
            raise Failure(f"a round of {tuple(pushes)} is said to be one of {job.round.contributors}")
        self._endings["(rounds with abstentions)"] += len(pushes) < len(names)
        if not pushes:
            if after.flat != before.flat:
                raise Failure("all pushes abstain, and the center has changed")
            return
        self._check_values(before, after, pushes)

    def _check_values(self, before: Center, after: Center, pushes: Mapping[str, Given]) -> None:
        job, names = self._world.job, tuple(pushes)
        assert job is not None
        restoring = [given for given in pushes.values() if given.purpose is Purpose.RESTORE]
        self._endings["(centers given back)"] += bool(restoring)
        if restoring:
            mean = restoring[0].value
        else:
            total_weight = sum(given.weight for given in pushes.values())
            mean = sum(given.weight * given.value for given in pushes.values()) / total_weight
        untouched = frozenset.intersection(*(given.untouched for given in pushes.values()))
        if restoring or after.step != before.step + 1:
            untouched = frozenset()
        arrays = job.center.current.arrays.values()
        for number, (variable, array) in enumerate(zip(job.manifest.variables, arrays, strict=True)):
            offset = job.manifest.offsets_bytes[number]
            if number in untouched:
                if array.tobytes() != before.flat[offset : offset + variable.size_bytes]:
                    raise Failure(f"{variable.name!r} changed, though nobody had touched it")
            elif not np.allclose(array.astype(np.float64), mean, rtol=_TOLERANCE[variable.dtype], atol=0):
                raise Failure(f"{variable.name!r} is {array}, not the average {mean} of {names}")

    def hear(self, call: ClientCall, beside: bytes | None = None) -> None:
        """Raises Failure unless everything that a finished call was sent is in order and true.

        Args:
            call: the call.
            beside: the part of the answer to a push that came on a data connection; None: unknown.
        """
        match call.rpc:
            case "PushAndAverage":
                self._check_push(call, beside)
            case "Pull":
                self._check_pull(call)
            case "GetStatus":
                pb.GetStatusResponse.FromString(call.response)
            case "Initialize" if call.completed:
                assert self.center is not None
                response = pb.InitializeResponse.FromString(call.response)
                if response.global_step not in self._centers:
                    raise Failure(f"a chief was told of a center that never was: {response}")

    def _check_push(self, call: ClientCall, beside: bytes | None) -> None:
        """Checks that the messages came in order, and that the center that came is the one that the outcome names."""
        count, flat, outcome = 0, b"", None
        for number, data in enumerate(call.context.written):
            message = pb.PushAndAverageResponse.FromString(data)
            if message.HasField("admission") is (number > 0) or outcome is not None:
                raise Failure(f"message {number} of an answer is {message}")
            if message.HasField("fragment"):
                if message.fragment.index != count:
                    raise Failure(f"fragment {message.fragment.index} came where {count} belongs")
                count, flat = count + 1, flat + message.fragment.data
            if message.HasField("shared"):
                if message.shared.first != count or not message.shared.count:
                    raise Failure(f"{message.shared} came where {count} belongs")
                count += message.shared.count
            if message.HasField("outcome"):
                outcome = message.outcome
        # A call that fails while it waits to send its first message sends that message, and the error with it.
        was_late = call.context.refused is not None and len(call.context.written) == 1
        if call.completed is (outcome is None) and not (outcome is not None and was_late):
            raise Failure(f"a push ended with the outcome {outcome}")
        if outcome is not None:
            self._check_outcome(outcome, count, flat, beside)

    def _check_outcome(self, outcome: pb.PushOutcome, count: int, flat: bytes, beside: bytes | None) -> None:
        center = self._centers.get(outcome.global_step)
        assert self.model is not None
        if center is None:
            raise Failure(f"there never was a center of {outcome}")
        if count == 0 and beside != b"":
            count, flat = self.model.manifest.fragment_count, center if beside is None else beside
            if flat != center:
                raise Failure(f"{len(flat)} bytes of another center came with {outcome}")
        if count != self.model.manifest.fragment_count:
            raise Failure(f"{count} fragments came with {outcome}")
        if len(flat) == len(center) and flat != center:
            raise Failure(f"another center came than that of {outcome}")
        if outcome.outcome not in [pb.Outcome.Value(f"OUTCOME_{each.name}") for each in Outcome]:
            raise Failure(f"no outcome: {outcome}")
        self._endings[pb.Outcome.Name(outcome.outcome)] += 1

    def _check_pull(self, call: ClientCall) -> None:
        request = pb.PullRequest.FromString(call.request or b"")
        messages = [pb.PullResponse.FromString(data) for data in call.context.written]
        notices = list(itertools.takewhile(lambda message: message.HasField("waiting"), messages))
        self._endings["(notices)"] += len(notices)
        if notices and not (request.accepts_notices and request.wait_initialized):
            raise Failure("a pull is told that it waits, and did not ask for that")
        if call.completed:
            self._check_pulled(request, messages[len(notices) :])

    def _check_pulled(self, request: pb.PullRequest, messages: list[pb.PullResponse]) -> None:
        assert self.model is not None
        header, size_bytes = messages[0].header, self.model.manifest.fragment_size_bytes
        goes_on = request.first_fragment > 0 and request.continued_step == header.global_step
        self._endings["(pulls that go on)"] += goes_on
        first = request.first_fragment if goes_on else 0
        indexes = range(first, 0 if request.header_only else self.model.manifest.fragment_count)
        if [message.fragment.index for message in messages[1:]] != list(indexes):
            raise Failure(f"other fragments came of a pull than {indexes}")
        center = self._centers.get(header.global_step)
        wanted = None if center is None else center[first * size_bytes :] if indexes else b""
        if b"".join(message.fragment.data for message in messages[1:]) != wanted:
            raise Failure(f"the center that was pulled never was: {messages[0]}")
