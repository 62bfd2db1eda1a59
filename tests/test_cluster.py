"""Cluster settings: what flags and launchers say about a cluster, their precedence, and contradictions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client import ClusterError, ClusterSpec
from ma_client.cluster.nodelist import nodes
from tests.recorded import PS_HOSTS, kubernetes, slurm, tf_config, torchrun, without_a_cluster
from tests.strategies import fast

DOCUMENT = Path(__file__).parent.parent / "docs" / "cluster.md"
SECOND_OF_TWO = ClusterSpec((PS_HOSTS,), num_workers=2, task_index=1)
OURS = SECOND_OF_TWO.to_env()
SERVERS = {"MA_PS_HOSTS": PS_HOSTS}


def tf(cluster: Any, task: Any = None) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster} if task is None else {"cluster": cluster, "task": task})}


def task(job: str, index: Any) -> dict[str, Any]:
    return {"type": job, "index": index}


def workers(count: int) -> list[str]:
    return [f"worker{index}:2222" for index in range(count)]


def refusal(environ: Mapping[str, str], **flags: Any) -> str:
    with pytest.raises(ClusterError) as refused:
        ClusterSpec.resolve(environ, **flags)
    message = str(refused.value)
    assert message.isprintable()
    return message


# What each source says.


@pytest.mark.parametrize(
    "environ",
    [OURS, tf_config(), {**torchrun(), **SERVERS}, {**slurm(), **SERVERS}, kubernetes()],
    ids=["ours", "TF_CONFIG", "torchrun", "Slurm", "Kubernetes"],
)
def test_every_launcher_tells_who_is_who(environ: Mapping[str, str]) -> None:
    assert ClusterSpec.from_env(environ) == SECOND_OF_TWO


def test_flags_tell_who_is_who() -> None:
    assert ClusterSpec.resolve({}, ps_hosts=(PS_HOSTS,), num_workers=2, task_index=1) == SECOND_OF_TWO


def test_without_servers_those_of_a_slurm_job_are_on_its_first_node() -> None:
    assert ClusterSpec.from_env(slurm()).ps_hosts == ("node07:2222",)
    assert ClusterSpec.from_env({**slurm(), **torchrun()}).ps_hosts == ("node07:2222",)
    assert ClusterSpec.resolve(slurm(), num_workers=5, task_index=4) == ClusterSpec(("node07:2222",), 5, 4)


def test_several_servers_keep_their_order() -> None:
    hosts = ("b:1", "a:2", "[::1]:3", "unix:/run/ps.sock")
    assert ClusterSpec.from_env({**OURS, "MA_PS_HOSTS": " b:1, a:2,[::1]:3,unix:/run/ps.sock"}).ps_hosts == hosts
    assert ClusterSpec.from_env(tf({"ps": ["b:1", "a:2"], "worker": ["w:1"]}, task("worker", 0))).ps_hosts == hosts[:2]


def test_what_is_missing_in_one_source_comes_from_the_next() -> None:
    assert ClusterSpec.resolve({"MA_NUM_WORKERS": "2", **torchrun()}, ps_hosts=(PS_HOSTS,)) == SECOND_OF_TWO
    assert ClusterSpec.from_env({**SERVERS, "RANK": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}) == SECOND_OF_TWO
    assert ClusterSpec.from_env({**SERVERS, **tf({"worker": workers(2)}), "JOB_COMPLETION_INDEX": "1"}) == SECOND_OF_TWO


@pytest.mark.parametrize("name", ["TF_CONFIG", "RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"])
def test_an_empty_variable_counts_as_not_set(name: str) -> None:
    assert ClusterSpec.from_env({**kubernetes(), name: ""}) == SECOND_OF_TWO


def test_a_file_to_initialize_from_is_that_of_the_flag_or_else_of_the_environment() -> None:
    environ = {**torchrun(), **SERVERS, "MA_INIT_FROM": "environment"}
    assert ClusterSpec.from_env(environ).init_from == "environment"
    assert ClusterSpec.resolve(environ, init_from="flag").init_from == "flag"
    assert ClusterSpec.from_env({**environ, "MA_INIT_FROM": ""}).init_from is None


# TF_CONFIG.


@pytest.mark.parametrize(
    ("cluster", "who", "num_workers", "task_index"),
    [
        ({"worker": workers(3)}, task("worker", 0), 3, 0),
        ({"worker": workers(3)}, task("worker", 2), 3, 2),
        ({"worker": workers(3)}, task("worker", "2"), 3, 2),
        ({"chief": ["c:1"], "worker": workers(3)}, task("chief", 0), 4, 0),
        ({"chief": ["c:1"], "worker": workers(3)}, task("worker", 0), 4, 1),
        ({"chief": ["c:1"], "worker": workers(3)}, task("worker", 2), 4, 3),
        ({"master": ["c:1"], "worker": workers(1)}, task("master", 0), 2, 0),
        ({"chief": {"0": "c:1"}, "worker": []}, task("chief", 0), 1, 0),
        ({"worker": {"0": "a:1", "1": "b:1"}}, task("worker", 1), 2, 1),
        ({"worker": workers(2), "evaluator": ["e:1"]}, task("worker", 1), 2, 1),
    ],
)
def test_tf_config_counts_workers_as_tensorflow_does(
    cluster: Mapping[str, Any], who: Mapping[str, Any], num_workers: int, task_index: int
) -> None:
    expected = ClusterSpec(("ps0:1", "ps1:1"), num_workers, task_index)
    assert ClusterSpec.from_env(tf({"ps": ["ps0:1", "ps1:1"], **cluster}, who)) == expected
    assert ClusterSpec.from_env(tf({"ps": {"1": "ps1:1", "0": "ps0:1"}, **cluster}, who)) == expected


@pytest.mark.parametrize("index", range(3))
def test_workers_that_know_only_themselves_are_told_how_many_there_are(index: int) -> None:
    environ = tf({"ps": ["ps:1"], "worker": {str(index): "w:1"}}, task("worker", index))
    assert ClusterSpec.resolve(environ, num_workers=3) == ClusterSpec(("ps:1",), 3, index)
    assert ClusterSpec.from_env({**environ, "MA_NUM_WORKERS": "3"}) == ClusterSpec(("ps:1",), 3, index)
    nobody = tf({"ps": ["ps:1"], "worker": {"0": "w:1"}}, task("worker", index))
    assert ClusterSpec.resolve(nobody, num_workers=3) == ClusterSpec(("ps:1",), 3, index)
    if index:
        assert refusal(environ).startswith("MA_NUM_WORKERS not set, and what is set (TF_CONFIG's cluster.ps='ps:1', ")


@pytest.mark.parametrize("text", ["{}", '{"cluster": {}}', '{"task": {"type": "worker", "index": 0}}'])
def test_a_tf_config_without_a_cluster_tells_nothing(text: str) -> None:
    assert ClusterSpec.from_env({**kubernetes(), "TF_CONFIG": text}) == SECOND_OF_TWO


def test_parameter_servers_of_tf_config_are_told_what_to_run_instead() -> None:
    cluster = {"ps": ["ps0:2222", "ps1:2223"], "chief": ["c:1"], "worker": workers(3)}
    message = refusal(tf(cluster, task("ps", 1)))
    assert "this process is parameter server 1" in message
    assert "`ps-server serve --bind 0.0.0.0:2223 --num-workers 4`" in message
    assert "`ps-server serve --bind 0.0.0.0:2223 --num-workers N`" in refusal(tf({"ps": cluster["ps"]}, task("ps", 1)))


def test_evaluators_of_tf_config_are_told_what_to_do_instead() -> None:
    message = refusal(tf({"ps": ["ps:1"], "worker": workers(1)}, task("evaluator", 0)))
    assert "this process is an evaluator" in message
    assert ".pull()" in message


# What is read, and what is not.

NOBODY_CAN_READ_THIS = {
    "MA_PS_HOSTS": "no port",
    "MA_NUM_WORKERS": "many",
    "MA_TASK_INDEX": "-1",
    "TF_CONFIG": "{",
    "RANK": "abc",
    "WORLD_SIZE": "0",
    "SLURM_PROCID": "first",
    "SLURM_NTASKS": "2.0",
    "SLURM_JOB_NODELIST": "node[1-",
    "JOB_COMPLETION_INDEX": "none",
}
# Launchers around the one that sets everything: `srun ma-launch`, torchrun in every pod and the like.
AROUND = {
    "Slurm": slurm(0),
    "torchrun": torchrun(0),
    "Kubernetes": {"JOB_COMPLETION_INDEX": "0"},
    "a worker's TF_CONFIG": tf_config(0, "elsewhere:1"),
    "a server's TF_CONFIG": tf({"ps": ["ps:1"], "worker": workers(5)}, task("ps", 0)),
    "what nobody can read": {name: NOBODY_CAN_READ_THIS[name] for name in NOBODY_CAN_READ_THIS if name not in OURS},
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_what_our_launchers_set_is_believed_whatever_is_around_it(around: Mapping[str, str]) -> None:
    cluster = ClusterSpec(("127.0.0.1:40123",), num_workers=7, task_index=6)
    assert ClusterSpec.from_env({**around, **cluster.to_env()}) == cluster


def test_flags_that_tell_everything_are_believed_whatever_is_around_them() -> None:
    assert ClusterSpec.resolve(NOBODY_CAN_READ_THIS, ps_hosts=("a:1",), num_workers=7, task_index=6) == ClusterSpec(
        ("a:1",), 7, 6
    )


def test_torchrun_in_every_task_of_slurm_or_pod_of_kubernetes_is_believed() -> None:
    of_eight = {**torchrun(), "RANK": "5", "WORLD_SIZE": "8", **SERVERS}
    expected = ClusterSpec((PS_HOSTS,), 8, 5)
    assert ClusterSpec.from_env({**slurm(), **of_eight}) == expected
    assert ClusterSpec.from_env({**kubernetes(), **of_eight, "MA_NUM_WORKERS": ""}) == expected


NODES = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"},
    "Slurm": {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NODEID": "1", "SLURM_NNODES": "2"},
}


@pytest.mark.parametrize("launcher", NODES.values(), ids=NODES)
def test_a_node_is_a_worker_if_that_is_asked_for(launcher: Mapping[str, str]) -> None:
    of_a_node = {**SERVERS, **launcher}
    assert ClusterSpec.from_env({**of_a_node, "MA_WORKER_PER": "node"}) == SECOND_OF_TWO
    assert ClusterSpec.from_env({**of_a_node, "MA_WORKER_PER": "process"}) == ClusterSpec((PS_HOSTS,), 8, 5)
    assert ClusterSpec.from_env({**of_a_node, "MA_WORKER_PER": ""}) == ClusterSpec((PS_HOSTS,), 8, 5)


def test_a_worker_is_a_process_or_a_node() -> None:
    message = refusal({**SERVERS, **NODES["torchrun"], "MA_WORKER_PER": "gpu"})
    assert message == "MA_WORKER_PER='gpu' is neither 'process' nor 'node'; set it to one of them, or unset it"


def test_slurm_in_pods_of_kubernetes_is_believed() -> None:
    assert ClusterSpec.from_env({**kubernetes(0), **slurm(1), "MA_NUM_WORKERS": ""}) == SECOND_OF_TWO


def test_tf_config_made_of_slurms_tasks_is_believed() -> None:
    # Task 0 is the server, tasks 1 to 3 are workers.
    environ = {**slurm(), "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    cluster = {"ps": ["node07:2222"], "worker": workers(3)}
    assert ClusterSpec.from_env({**environ, **tf(cluster, task("worker", 2))}) == ClusterSpec(("node07:2222",), 3, 2)


def environments() -> st.SearchStrategy[dict[str, str]]:
    variables = st.sampled_from(
        [
            *itertools.chain(*(environ.items() for environ in (slurm(0), torchrun(0), kubernetes(0), tf_config(0)))),
            *NOBODY_CAN_READ_THIS.items(),
        ]
    )
    return st.lists(variables, max_size=12).map(dict)


def specs() -> st.SearchStrategy[ClusterSpec]:
    name = st.text("abcxyz0189.-", min_size=1, max_size=8)
    host = st.builds("{}:{}".format, name | st.just("[fe80::1]"), st.integers(1, 65535))
    return st.integers(1, 10**6).flatmap(
        lambda count: st.builds(
            ClusterSpec,
            st.lists(host, min_size=1, max_size=4).map(tuple),
            st.just(count),
            st.integers(0, count - 1),
            st.none() | st.text("abc/. ,=", min_size=1, max_size=8),
        )
    )


@given(specs(), environments())
@fast
def test_every_cluster_survives_the_way_through_any_environment(cluster: ClusterSpec, around: dict[str, str]) -> None:
    environ = {name: value for name, value in around.items() if name not in cluster.to_env()}
    assert ClusterSpec.from_env({**environ, **cluster.to_env()}) == cluster


@given(specs(), st.data())
@fast
def test_sources_that_each_tell_a_part_of_the_truth_give_the_same_cluster(
    cluster: ClusterSpec, data: st.DataObject
) -> None:
    hosts, count, index = cluster.ps_hosts, cluster.num_workers, cluster.task_index
    tellers: dict[str, dict[str, Any]] = {
        "ps_hosts": {"MA_PS_HOSTS": ",".join(hosts), "flag": hosts},
        "num_workers": {
            "MA_NUM_WORKERS": str(count),
            "WORLD_SIZE": str(count),
            "SLURM_NTASKS": str(count),
            "flag": count,
        },
        "task_index": {
            "MA_TASK_INDEX": str(index),
            "RANK": str(index),
            "SLURM_PROCID": str(index),
            "JOB_COMPLETION_INDEX": str(index),
            "flag": index,
        },
    }
    environ: dict[str, str] = {}
    flags: dict[str, Any] = {}
    may_be_silent: set[str] = set()
    if count <= 100 and data.draw(st.booleans(), "with TF_CONFIG"):
        with_chief = data.draw(st.booleans(), "with a chief")
        names = {"chief": workers(1), "worker": workers(count - 1)} if with_chief else {"worker": workers(count)}
        who = task("chief", 0) if with_chief and not index else task("worker", index - with_chief)
        environ.update(tf({"ps": hosts, **names}, who))
        may_be_silent = set(tellers)
    for fact, variables in tellers.items():
        chosen = st.sets(st.sampled_from(sorted(variables)), min_size=0 if fact in may_be_silent else 1)
        for teller in data.draw(chosen, fact):
            if teller == "flag":
                flags[fact] = variables[teller]
            else:
                environ[teller] = variables[teller]
    assert ClusterSpec.resolve(environ, **flags) == ClusterSpec(hosts, count, index)


# What contradicts what.

CONTRADICTIONS: dict[str, tuple[dict[str, Any], Mapping[str, str], tuple[str, str]]] = {
    "flag and ours: servers": (
        {"ps_hosts": ("a:1", "b:1")},
        {**OURS, "MA_PS_HOSTS": "b:1,a:1"},
        ("--ps-hosts a:1,b:1", "MA_PS_HOSTS='b:1,a:1'"),
    ),
    "flag and ours: number": ({"num_workers": 3}, OURS, ("--num-workers 3", "MA_NUM_WORKERS='2'")),
    "flag and ours: index": ({"task_index": 0}, OURS, ("--task-index 0", "MA_TASK_INDEX='1'")),
    "flag and Slurm": (
        {"ps_hosts": (PS_HOSTS,), "num_workers": 3},
        slurm(),
        ("--num-workers 3", "SLURM_NTASKS='2'"),
    ),
    "ours and TF_CONFIG: servers": (
        {},
        {"MA_PS_HOSTS": "ps:1", **tf_config()},
        ("MA_PS_HOSTS='ps:1'", f"TF_CONFIG's cluster.ps='{PS_HOSTS}'"),
    ),
    "ours and TF_CONFIG: number": (
        {},
        {"MA_NUM_WORKERS": "3", **tf_config()},
        ("MA_NUM_WORKERS='3'", "TF_CONFIG's 2 workers (the chief is one of them)"),
    ),
    "ours and TF_CONFIG: fewer than it knows": (
        {},
        {"MA_NUM_WORKERS": "1", **tf({"ps": ["ps:1"], "worker": {"0": "a:1", "1": "b:1"}}, task("worker", 0))},
        ("MA_NUM_WORKERS='1'", "TF_CONFIG's 2 workers"),
    ),
    "ours and TF_CONFIG: index": (
        {},
        {"MA_TASK_INDEX": "0", **tf_config()},
        ("MA_TASK_INDEX='0'", "TF_CONFIG's task worker 0 (it follows the chief)"),
    ),
    "ours and torchrun: number": (
        {},
        {**SERVERS, "MA_NUM_WORKERS": "3", **torchrun()},
        ("MA_NUM_WORKERS='3'", "WORLD_SIZE='2'"),
    ),
    "ours and torchrun: index": (
        {},
        {**SERVERS, "MA_TASK_INDEX": "0", **torchrun()},
        ("MA_TASK_INDEX='0'", "RANK='1'"),
    ),
    "ours and Slurm: number": (
        {},
        {**SERVERS, "MA_NUM_WORKERS": "3", **slurm()},
        ("MA_NUM_WORKERS='3'", "SLURM_NTASKS='2'"),
    ),
    "ours and Slurm: index": (
        {},
        {**SERVERS, "MA_TASK_INDEX": "0", **slurm()},
        ("MA_TASK_INDEX='0'", "SLURM_PROCID='1'"),
    ),
    "TF_CONFIG and torchrun": (
        {},
        {**tf({"ps": ["ps:1"], "worker": workers(3)}), **torchrun()},
        ("TF_CONFIG's 3 workers", "WORLD_SIZE='2'"),
    ),
    "torchrun and Slurm": ({}, {**SERVERS, "WORLD_SIZE": "3", **slurm()}, ("WORLD_SIZE='3'", "SLURM_NTASKS='2'")),
}


@pytest.mark.parametrize(("flags", "environ", "both"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_settings_that_contradict_each_other_are_both_named_with_their_values(
    flags: dict[str, Any], environ: Mapping[str, str], both: tuple[str, str]
) -> None:
    assert refusal(environ, **flags).startswith(f"{both[0]} and {both[1]} contradict each other: ")


def test_a_contradiction_says_what_each_of_them_means() -> None:
    assert "task_index is 0 or 1;" in refusal({"MA_TASK_INDEX": "0", **tf_config()})
    assert "ps_hosts is a:1,b:1 or b:1;" in refusal({"MA_PS_HOSTS": "b:1"}, ps_hosts=("a:1", "b:1"))


def test_an_index_that_does_not_fit_the_number_is_refused_with_both_variables() -> None:
    message = refusal({**SERVERS, "WORLD_SIZE": "2", "RANK": "2"})
    assert "task_index 2 is not from 0 to 1" in message
    assert "WORLD_SIZE='2', RANK='2'" in message


# What is malformed, and what is missing.

MALFORMED: dict[str, tuple[Mapping[str, str], str]] = {
    "our servers": (OURS, "MA_PS_HOSTS=no port"),
    "a port too large": (OURS, "MA_PS_HOSTS=a:65536"),
    "a port of 0": (OURS, "MA_PS_HOSTS=a:0"),
    "our number": (OURS, "MA_NUM_WORKERS=1_0"),
    "our index": (OURS, "MA_TASK_INDEX=+1"),
    "RANK": (torchrun(), "RANK=abc"),
    "WORLD_SIZE": (torchrun(), "WORLD_SIZE=0"),
    "SLURM_PROCID": (slurm(), "SLURM_PROCID=-1"),
    "SLURM_NTASKS": (slurm(), "SLURM_NTASKS=4(x2)"),
    "JOB_COMPLETION_INDEX": (kubernetes(), "JOB_COMPLETION_INDEX=1.0"),
    "a number of many digits": (kubernetes(), "JOB_COMPLETION_INDEX=" + "1" * 5000),
    "digits of another script": (kubernetes(), "JOB_COMPLETION_INDEX=\N{ARABIC-INDIC DIGIT ONE}"),
    "brackets that do not end": (slurm(), "SLURM_JOB_NODELIST=node[01-03"),
    "brackets that do not begin": (slurm(), "SLURM_JOB_NODELIST=node01-03]"),
    "brackets in brackets": (slurm(), "SLURM_JOB_NODELIST=node[1[2]]"),
    "empty brackets": (slurm(), "SLURM_JOB_NODELIST=node[]"),
    "a range that runs backwards": (slurm(), "SLURM_JOB_NODELIST=node[3-1]"),
    "a range without an end": (slurm(), "SLURM_JOB_NODELIST=node[1-]"),
    "a range that is too long": (slurm(), "SLURM_JOB_NODELIST=node[1-99999999]"),
    "an empty name": (slurm(), "SLURM_JOB_NODELIST=node1,,node2"),
    "no JSON": ({}, "TF_CONFIG={cluster"),
    "no object": ({}, "TF_CONFIG=[]"),
    "no cluster": ({}, 'TF_CONFIG={"cluster": "here"}'),
    "no list": ({}, 'TF_CONFIG={"cluster": {"worker": 2}}'),
    "no address": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1", 2]}}'),
    "no port in TF_CONFIG": ({}, 'TF_CONFIG={"cluster": {"ps": ["a"]}}'),
    "no index of an address": ({}, 'TF_CONFIG={"cluster": {"worker": {"a": "a:1"}}}'),
    "a server left out": ({}, 'TF_CONFIG={"cluster": {"ps": {"1": "a:1"}}}'),
    "two chiefs": ({}, 'TF_CONFIG={"cluster": {"chief": ["a:1", "b:1"]}}'),
    "two kinds of chiefs": ({}, 'TF_CONFIG={"cluster": {"chief": ["a:1"], "master": ["b:1"]}}'),
    "no task": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": 0}'),
    "no type": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}'),
    "no index": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}'),
    "true is no index": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": true}}'),
    "a job not there": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}'),
    "a job of others": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": {"type": "cook", "index": 0}}'),
    "a worker not there": ({}, 'TF_CONFIG={"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}'),
}


@pytest.mark.parametrize(("environ", "setting"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_variable_is_named_with_its_value(environ: Mapping[str, str], setting: str) -> None:
    name, _, value = setting.partition("=")
    message = refusal({**environ, name: value})
    assert message.startswith(f"{name}={value!r}")


def test_without_anything_the_possibilities_are_listed() -> None:
    message = refusal({"PATH": "/bin"})
    assert message.startswith("MA_PS_HOSTS, MA_NUM_WORKERS, MA_TASK_INDEX not set; ")
    for possibility in ("ma-launch", "ps-worker run", "TF_CONFIG", "torchrun", "srun", "Kubernetes", "docs/cluster.md"):
        assert possibility in message


@pytest.mark.parametrize(
    ("environ", "missing", "there"),
    [
        (torchrun(), "MA_PS_HOSTS", "WORLD_SIZE='2', RANK='1'"),
        ({**SERVERS, "JOB_COMPLETION_INDEX": "1"}, "MA_NUM_WORKERS", "JOB_COMPLETION_INDEX='1'"),
        ({**SERVERS, "SLURM_NTASKS": "2"}, "MA_TASK_INDEX", "SLURM_NTASKS='2'"),
        ({"SLURM_JOB_NODELIST": "a,b"}, "MA_NUM_WORKERS, MA_TASK_INDEX", "SLURM_JOB_NODELIST='a,b'"),
    ],
)
def test_what_is_missing_is_named_beside_what_is_there(environ: Mapping[str, str], missing: str, there: str) -> None:
    assert refusal(environ).startswith(f"{missing} not set, and what is set ({there}) does not say ")


# Slurm's lists of nodes.


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node07", "node07"),
        ("node[01-03,07],gpu5", "node01 node02 node03 node07 gpu5"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[1,3,10-11]-ib", "n1-ib n3-ib n10-ib n11-ib"),
        ("rack[0-1]node[01-02]", "rack0node01 rack0node02 rack1node01 rack1node02"),
        ("a-1.example,b[2]", "a-1.example b2"),
    ],
)
def test_slurms_short_form_of_nodes_is_read(text: str, names: str) -> None:
    assert list(nodes(text)) == names.split()


def slow_nodes(text: str) -> Iterator[str]:
    """A simple oracle: replaces one bracket after the other by each of its numbers."""
    depth, names = 0, [""]
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            names.append("")
        else:
            names[-1] += character
    for name in names:
        if "[" not in name:
            yield name
            continue
        before, _, rest = name.partition("[")
        inside, _, behind = rest.partition("]")
        for part in inside.split(","):
            first, _, last = part.partition("-")
            number = first
            while True:
                yield from slow_nodes(before + number + behind)
                if int(number) == int(last or first):
                    break
                number = str(int(number) + 1).rjust(len(first), "0")


def node_lists() -> st.SearchStrategy[str]:
    number = st.builds(lambda value, width: f"{value:0{width}d}", st.integers(0, 120), st.integers(1, 4))
    longer = st.builds(lambda first, more: f"{first}-{int(first) + more}", number, st.integers(0, 12))
    brackets = st.lists(number | longer, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
    name = st.lists(st.text("ab-.01", min_size=1, max_size=3) | brackets, min_size=1, max_size=4).map("".join)
    return st.lists(name, min_size=1, max_size=3).map(",".join)


@given(node_lists())
@fast
def test_nodes_are_those_of_a_dumb_oracle(text: str) -> None:
    few = list(itertools.islice(nodes(text), 500))
    assert few == list(itertools.islice(slow_nodes(text), 500))


@given(st.text("n01-,[] ", max_size=12))
@fast
def test_what_is_no_list_of_nodes_is_refused_at_once(text: str) -> None:
    brackets = re.sub(r"[^\[\]]", "", text)
    fits = bool(text) and " " not in text and not brackets.replace("[]", "")
    try:
        names = list(itertools.islice(nodes(text), 500))
    except ValueError:
        return
    assert fits
    assert all(names)


# The interface of tf.train.ClusterSpec.


def test_a_cluster_answers_as_tensorflows_does() -> None:
    cluster = ClusterSpec(("ps0:2222", "ps1:2222"), num_workers=3, task_index=1)
    assert cluster.jobs == ["ps", "worker"]
    assert cluster.as_dict() == {"ps": ["ps0:2222", "ps1:2222"], "worker": [None, None, None]}
    assert (cluster.num_tasks("ps"), cluster.num_tasks("worker")) == (2, 3)
    assert (cluster.task_indices("ps"), cluster.task_indices("worker")) == ([0, 1], [0, 1, 2])
    assert cluster.job_tasks("ps") == ["ps0:2222", "ps1:2222"]
    assert cluster.task_address("ps", 1) == "ps1:2222"
    assert cluster.task_address("worker", 2) is None


def test_what_tensorflows_gives_away_is_the_callers_to_change() -> None:
    cluster = ClusterSpec(("ps0:2222",), 1, 0)
    cluster.as_dict()["ps"].append("ps1:2222")
    cluster.job_tasks("ps").clear()
    cluster.jobs.clear()
    assert cluster.as_dict() == {"ps": ["ps0:2222"], "worker": [None]}


@pytest.mark.parametrize("index", [-1, 2, "0"])
def test_a_task_that_is_not_there_is_a_value_error(index: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no task {index!r} in job 'ps'; it has 0 to 1")):
        ClusterSpec(("a:1", "b:1"), 3, 1).task_address("ps", index)


@pytest.mark.parametrize("method", ["num_tasks", "task_indices", "job_tasks"])
def test_a_job_that_is_not_there_is_a_value_error(method: str) -> None:
    cluster = ClusterSpec(("a:1",), 1, 0)
    with pytest.raises(ValueError, match="no job 'chief' in the cluster"):
        getattr(cluster, method)("chief")
    with pytest.raises(ValueError, match="no job 'chief' in the cluster"):
        cluster.task_address("chief", 0)


# The document.


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_tf_config_of_the_document_describes_a_worker() -> None:
    found = [ClusterSpec.from_env({"TF_CONFIG": block}) for block in blocks("json")]
    assert found == [ClusterSpec(("ps0:2222",), num_workers=3, task_index=1)]


def test_without_a_cluster_nothing_of_a_recorded_one_is_left() -> None:
    for environ in (OURS, tf_config(), torchrun(), slurm(), kubernetes()):
        assert "not set; " in refusal(without_a_cluster(environ))
