"""Rules of finishing: a worker that says that it has finished is waited for no longer, in every order of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelaverage.errors import ModelAverageError
from modelaverage.outcome import Outcome
from ps_server.rules.decisions import Admit, CenterFollows, Commit, Dismiss, Hold, Push, Restart
from ps_server.rules.policy import RoundPolicy
from tests.committing import CommittingRound as Round
from tests.committing import Decided

EVENTS = ("open", "give", "give all", "break", "kill", "finish", "leave", "look", "come back", "wait")


@dataclass
class Process:
    """A worker's process, as the server hears of it."""

    name: str
    number: int = 1
    pushes: int = 0
    push: Push | None = None  # what it pushes now
    stream: int | None = None
    is_held: bool = False
    given: int = 0
    is_whole: bool = False
    has_finished: bool = False  # as it has said, or taken back
    is_late: bool = False  # it took that back when the others' round was closed

    @property
    def incarnation(self) -> bytes:
        return f"{self.name}-{self.number}".encode().ljust(16, b".")

    def forget(self) -> None:
        """Nothing of it is in the round."""
        self.stream, self.given, self.is_whole, self.is_held = None, 0, False, False


@dataclass
class Play:
    """Some workers, the round, and a list of what was committed. Checks after every event what has to hold."""

    policy: RoundPolicy
    fragment_count: int
    names: Sequence[str]
    commits: list[Commit] = field(default_factory=list)
    now_s: float = 0.0
    streams: int = 0

    def __post_init__(self) -> None:
        self.round = Round(self.policy, self.fragment_count)
        self.processes = {name: Process(name) for name in self.names}

    # What a worker does.

    def open(self, name: str) -> None:
        """Begins a push, or goes on with the one that broke off."""
        process = self.processes[name]
        if process.stream is not None:
            return
        if process.push is None or process.push.base_step != self.round.global_step:
            process.pushes += 1
            process.push = Push(name, process.incarnation, process.pushes, self.round.global_step)
        self.streams += 1
        self._returns(process)
        process.stream = self.streams
        self._decided(self.round.open(self.streams, process.push, self.now_s), process)

    def give(self, name: str, all_of_it: bool = False) -> None:
        process = self.processes[name]
        while process.stream is not None and not process.is_held and process.given < self.fragment_count:
            index, process.given = process.given, process.given + 1
            process.is_whole = process.given == self.fragment_count
            self._decided(self.round.take_fragments(process.stream, index, index + 1, self.now_s))
            if not all_of_it:
                return

    def break_off(self, name: str) -> None:
        process = self.processes[name]
        if process.stream is not None:
            stream, was_held, process.stream, process.is_held = process.stream, process.is_held, None, False
            if process.given == 0 and not process.is_whole:
                process.forget()
                for other in self.processes.values():  # the round is open again, unless it was not in it
                    other.is_late = other.is_late and was_held
            self._decided(self.round.close(stream, self.now_s))

    def kill(self, name: str) -> None:
        """The process is gone, and another one begins in its place; what is whole stays."""
        self.break_off(name)
        process = self.processes[name]
        process.number += 1
        process.push = None

    def finish(self, name: str) -> None:
        """It may overtake the news that the connection of its push is lost."""
        process = self.processes[name]
        process.has_finished = True
        self._decided(self.round.finish(name, process.incarnation, self.now_s))

    def leave(self, name: str) -> None:
        process = self.processes[name]
        if process.stream is None:
            self._decided(self.round.leave(name, process.incarnation, self.now_s))

    def come_back(self, name: str) -> None:
        if self.round.job_is_over:
            for process in self.processes.values():
                process.has_finished = False
        self._returns(self.processes[name])
        self.round.come_back(name)

    def wait(self) -> None:
        """Time passes until the round has something to do."""
        due_at_s = self.round.due_at_s
        self.now_s = max(self.now_s, self.now_s if due_at_s is None else due_at_s) + 0.001
        self._decided(self.round.expire(self.now_s))
        due_at_s = self.round.due_at_s
        assert due_at_s is None or due_at_s > self.now_s, "it has nothing to do, and is woken again and again"

    def do(self, event: str, name: str) -> None:
        match event:
            case "open":
                self._begin_run_if_over()
                self.open(name)
            case "give":
                self.give(name)
            case "give all":
                self.give(name, all_of_it=True)
            case "break":
                self.break_off(name)
            case "kill":
                self.kill(name)
            case "finish":
                self.finish(name)
            case "leave":
                self.leave(name)
            case "come back":
                self.come_back(name)
            case "wait":
                self.wait()
        self.check()

    def _returns(self, process: Process) -> None:
        there = {p.name for p in self.processes.values() if (p.stream and not p.is_held) or p.given or p.is_whole}
        others = {p.name for p in self.processes.values() if p.has_finished or p.is_late}
        if process.has_finished and there and there | others == set(self.names):
            process.is_late = True
        process.has_finished = False

    def _begin_run_if_over(self) -> None:
        if self.round.job_is_over:
            for process in self.processes.values():
                process.has_finished = False

    # What the round does.

    def _decided(self, decisions: list[Decided], opened: Process | None = None) -> None:
        by_stream = {process.stream: process for process in self.processes.values() if process.stream is not None}
        for decision in decisions:
            match decision:
                case Restart():
                    for process in self.processes.values():
                        process.given, process.is_whole, process.is_late = 0, False, False
                case Dismiss(stream):
                    if stream in by_stream:
                        by_stream[stream].forget()
                    self.round.close(stream, self.now_s)
                case Admit(first_needed):
                    assert opened is not None
                    if opened.stream is not None:
                        opened.given, opened.is_whole = first_needed, first_needed == self.fragment_count
                case Hold():
                    assert opened is not None
                    opened.is_held = True
                case CenterFollows():
                    assert opened is not None
                    assert opened.stream is not None
                    stream = opened.stream
                    opened.forget()
                    opened.push = None
                    self.round.close(stream, self.now_s)
                case Commit():
                    self._committed(decision)

    def _committed(self, commit: Commit) -> None:
        self.commits.append(commit)
        whole = {name for name, process in self.processes.items() if process.is_whole}
        assert set(commit.contributors) == whole
        if self.policy.is_strict:
            training = {name for name, p in self.processes.items() if not (p.has_finished or p.is_late)}
            assert training <= whole, "a worker that trains is not in the average"
        for process in self.processes.values():
            process.is_late = False
            if process.is_whole or process.is_held:
                if process.stream is not None:
                    self.round.close(process.stream, self.now_s)
                process.forget()
                process.push = None

    def check(self) -> None:
        """What holds after every event."""
        finished = {name for name, process in self.processes.items() if process.has_finished}
        whole = {name for name, process in self.processes.items() if process.is_whole}
        half = [process for process in self.processes.values() if process.given and not process.is_whole]
        assert self.round.finished == finished
        if self.policy.is_strict:
            late = {name for name, process in self.processes.items() if process.is_late}
            due = whole and not half and whole | finished | late == set(self.names)
            owed = [p for p in self.processes.values() if p.stream is not None and not p.is_held and not p.is_whole]
            assert owed or not due, "all are there, and the round has not committed"
        if finished == set(self.names) and not whole and not half:
            streams = [process for process in self.processes.values() if process.stream is not None]
            assert self.round.job_is_over == (not streams)


def plays(policy: RoundPolicy, names: Sequence[str]) -> st.SearchStrategy[tuple[Play, list[tuple[str, str]]]]:
    events = st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(names)), max_size=40)
    return st.tuples(st.integers(0, 3).map(lambda count: Play(policy, count, names)), events)


NAMES = ("a", "b", "c")
POLICIES = {
    "strict": (RoundPolicy.strict(3), NAMES),
    "quorum of two": (RoundPolicy(3, 2, 3, grace_s=1.0), NAMES),
    "one more than announced": (RoundPolicy(3, 2, 4, grace_s=1.0), (*NAMES, "d")),
}


def run(play: Play, events: list[tuple[str, str]]) -> None:
    for event, name in events:
        play.do(event, name)


def push_whole(play: Play, name: str) -> None:
    """A push, made again as often as the round asks for it, until it is whole or over."""
    process = play.processes[name]
    for _ in range(20):
        before = len(play.commits)
        if process.stream is None:
            play.do("open", name)
        play.do("give all", name)
        if process.is_whole or process.is_held or len(play.commits) > before:
            return
    raise AssertionError(f"the push of {name} does not become whole")


@pytest.mark.parametrize(("policy", "names"), POLICIES.values(), ids=POLICIES)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_has_happened_a_round_commits_once_all_who_train_have_pushed(
    policy: RoundPolicy, names: Sequence[str], data: st.DataObject
) -> None:
    play, events = data.draw(plays(policy, names))
    run(play, events)
    order = data.draw(st.permutations(names))
    finishing = data.draw(st.sets(st.sampled_from(names), max_size=2))
    before = len(play.commits)
    for name in order:
        if play.processes[name].has_finished:
            play.do("break", name)
        elif play.processes[name].stream is None and name in finishing:
            play.do("finish", name)
    for name in order:
        if not play.processes[name].has_finished and not play.processes[name].is_whole:
            push_whole(play, name)
    nobody_pushes = not any(process.stream or process.is_whole for process in play.processes.values())
    for _ in range(10):  # times of grace
        if len(play.commits) > before or nobody_pushes:
            return
        play.wait()
        for name in order:
            process = play.processes[name]
            if not process.has_finished and not process.is_whole and len(play.commits) == before:
                push_whole(play, name)
    raise AssertionError("it waits for ever")


@pytest.mark.parametrize(("policy", "names"), POLICIES.values(), ids=POLICIES)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_has_happened_when_all_have_finished_nobody_waits_and_the_job_is_over(
    policy: RoundPolicy, names: Sequence[str], data: st.DataObject
) -> None:
    play, events = data.draw(plays(policy, names))
    run(play, events)
    for name in data.draw(st.permutations(names)):
        process = play.processes[name]
        if process.has_finished:
            play.do("break", name)
        if process.stream is not None and not process.is_held:
            push_whole(play, name)
        if process.stream is None:
            play.do("finish", name)
    for _ in range(10):
        waiting = [process for process in play.processes.values() if process.stream is not None]
        if not waiting:
            break
        play.wait()
        for process in waiting:  # its round is over, and it has nothing more to do
            if process.stream is None:
                play.do("finish", process.name)
            elif not process.is_whole and not process.is_held:
                push_whole(play, process.name)
    for process in play.processes.values():
        assert process.stream is None, f"{process.name} waits for ever"
        play.do("finish", process.name)
    assert play.round.job_is_over
    assert play.round.training == 0


# What the properties do not say by name.


def strict(count: int = 2, names: Sequence[str] = NAMES) -> Play:
    return Play(RoundPolicy.strict(len(names)), count, names)


def test_who_finishes_while_the_others_wait_lets_their_round_commit() -> None:
    play = strict()
    for name in ("a", "b"):
        push_whole(play, name)
    assert play.commits == []
    play.do("finish", "c")
    assert [commit.contributors for commit in play.commits] == [("a", "b")]
    assert play.round.training == 2


def test_a_whole_push_of_one_that_has_finished_is_averaged() -> None:
    play = strict()
    push_whole(play, "a")
    play.do("break", "a")
    play.do("finish", "a")
    for name in ("b", "c"):
        push_whole(play, name)
    assert [commit.contributors for commit in play.commits] == [("a", "b", "c")]


def test_half_a_push_of_one_that_has_finished_starts_the_round_over_without_it() -> None:
    play = strict()
    play.do("open", "a")
    play.do("give", "a")
    play.do("break", "a")
    push_whole(play, "b")
    decisions = play.round.finish("a", play.processes["a"].incarnation, 0.0)
    assert isinstance(decisions[0], Restart)


def test_that_one_has_finished_may_be_heard_before_its_connection_breaks() -> None:
    play = strict()
    play.do("open", "a")
    play.do("give", "a")
    play.do("finish", "a")
    stream = play.processes["a"].stream
    assert stream is not None
    assert isinstance(play.round.close(stream, 0.0)[0], Restart)


def test_the_time_of_grace_begins_when_all_who_are_left_have_pushed_but_one_more_than_announced() -> None:
    play = Play(RoundPolicy(3, 2, 4, grace_s=1.0), 1, (*NAMES, "d"))
    for _ in range(2):
        for name in play.names:
            play.do("open", name)
        for name in play.names:
            play.do("give all", name)
    assert play.commits[-1].contributors == tuple(play.names)
    for name in ("a", "b"):
        play.do("finish", name)
    push_whole(play, "c")
    assert len(play.commits) == 2  # it waits for d, which was killed
    play.do("wait", "c")
    assert play.commits[-1].contributors == ("c",)


def test_one_that_comes_back_counts_again() -> None:
    play = strict()
    play.do("finish", "c")
    play.do("come back", "c")
    for name in ("a", "b"):
        push_whole(play, name)
    assert play.commits == []
    assert play.round.waits_for[1] == 1
    push_whole(play, "c")
    assert [commit.contributors for commit in play.commits] == [NAMES]


def test_what_was_enough_is_not_once_one_has_come_back() -> None:
    play = Play(RoundPolicy(3, 2, 4, grace_s=1.0), 1, (*NAMES, "d"))
    for name in NAMES:
        push_whole(play, name)
    play.do("open", "d")
    for name in ("b", "c"):
        play.do("finish", name)
    push_whole(play, "a")  # and waits for d
    play.do("break", "d")
    play.do("come back", "b")
    play.do("wait", "a")
    assert len(play.commits) == 1
    push_whole(play, "b")  # now there are two, and d has its time of grace
    assert len(play.commits) == 1
    play.do("wait", "a")
    assert [commit.contributors for commit in play.commits] == [NAMES, ("a", "b")]


def test_one_that_comes_back_when_a_round_is_closed_is_not_in_it() -> None:
    play = strict()
    for name in ("a", "b"):
        play.do("open", name)
    play.do("finish", "c")
    play.do("open", "c")
    for name in ("a", "b"):
        play.do("give all", name)
    assert [commit.contributors for commit in play.commits] == [("a", "b")]
    assert len(play.commits[0].held) == 1


def test_a_push_is_a_way_to_come_back() -> None:
    play = strict()
    play.do("finish", "c")
    play.do("open", "c")
    for name in ("a", "b"):
        push_whole(play, name)
    assert play.commits == []


def test_in_a_new_run_none_of_the_last_one_has_finished() -> None:
    play = strict()
    for name in NAMES:
        play.do("finish", name)
    assert play.round.job_is_over
    push_whole(play, "a")
    assert (play.round.job_is_over, play.commits, play.round.training) == (False, [], 3)
    for name in ("b", "c"):
        push_whole(play, name)
    assert [commit.contributors for commit in play.commits] == [NAMES]


def test_to_say_twice_that_one_has_finished_changes_nothing() -> None:
    play = strict()
    play.do("finish", "a")
    play.do("finish", "a")
    assert (set(play.round.finished), play.round.training) == ({"a"}, 2)
    push_whole(play, "b")
    assert play.commits == []


def test_while_another_process_of_its_name_pushes_a_worker_has_not_finished() -> None:
    play = strict()
    play.do("open", "a")
    play.round.finish("a", b"an earlier one..", 0.0)
    assert play.round.finished == frozenset()


def test_a_goodbye_without_having_finished_changes_nothing_for_a_strict_round() -> None:
    play = strict()
    for name in ("a", "b"):
        push_whole(play, name)
    play.do("leave", "c")
    assert play.commits == []
    assert play.round.waits_for[1] == 1


def test_with_a_quorum_as_many_are_enough_as_are_left() -> None:
    play = Play(RoundPolicy(4, 3, 4, grace_s=1.0), 1, ("a", "b", "c", "d"))
    for name in play.names:
        push_whole(play, name)
    assert len(play.commits) == 1
    play.do("finish", "a")
    play.do("finish", "b")
    push_whole(play, "c")
    push_whole(play, "d")
    assert [commit.contributors for commit in play.commits] == [play.names, ("c", "d")]
    play.do("finish", "c")
    push_whole(play, "d")
    assert play.commits[-1].contributors == ("d",)


def test_with_more_workers_than_were_announced_the_job_is_over_once_the_last_of_them_has_finished() -> None:
    play = Play(RoundPolicy(2, 1, 3, grace_s=1.0), 1, NAMES)
    for _ in range(2):  # the first does not know of the third one yet
        for name in NAMES:
            play.do("open", name)
        for name in NAMES:
            play.do("give all", name)
    assert [commit.contributors for commit in play.commits] == [("a", "b"), NAMES]
    for name in ("a", "b"):
        play.do("finish", name)
    assert (play.round.job_is_over, play.round.training) == (False, 1)
    play.do("finish", "c")
    assert (play.round.job_is_over, play.round.training) == (True, 0)


def test_a_server_that_comes_back_from_a_checkpoint_knows_who_has_finished() -> None:
    round_ = Round(RoundPolicy.strict(2), 0, 7, finished=frozenset({"b"}))
    (_, commit) = round_.open(1, Push("a", bytes(16), 1, 7), 0.0)
    assert isinstance(commit, Commit)
    assert commit.contributors == ("a",)


def test_a_stale_push_is_one_of_a_worker_that_trains() -> None:
    round_ = Round(RoundPolicy.strict(2), 0, 7, finished=frozenset({"b"}))
    assert round_.open(1, Push("b", bytes(16), 1, 6), 0.0) == [CenterFollows(Outcome.STALE)]
    assert round_.finished == frozenset()


def test_a_refused_push_does_not_bring_its_worker_back() -> None:
    round_ = Round(RoundPolicy.strict(2), 1, finished=frozenset({"b"}))
    for stream, name in enumerate("ac"):
        round_.open(stream, Push(name, bytes(16), 1, 0), 0.0)
    with pytest.raises(ModelAverageError, match="one too many"):
        round_.open(2, Push("b", bytes(16), 1, 0), 0.0)
    assert round_.finished == {"b"}
