"""The memory that a server may have is the least of the machine's and its control groups'."""

from __future__ import annotations

from pathlib import Path

import pytest

from ps_server.machine.memory_limit import default_max_model_bytes, memory_bytes

MACHINE = 64 << 30
GIB = 1 << 30
# The number that version 1 reports if there is no limit.
BOUNDLESS = 9223372036854771712

V2_MOUNT = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 20 0:29 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
# A container with the host's group names: only its own group is mounted.
V1_OWN_MOUNT = "33 20 0:29 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory"
HYBRID = "31 20 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw"
OTHER_V1 = "32 20 0:28 / /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids"
ELSEWHERE = "30 20 0:26 / /mnt/with\\040space rw - cgroup2 none rw"


@pytest.mark.parametrize(
    ("group", "mounts", "files", "expected"),
    [
        pytest.param("0::/", [V2_MOUNT], {"memory.max": f"{GIB}"}, GIB, id="v2: a container sees its own as the top"),
        pytest.param("0::/", [V2_MOUNT], {"memory.max": "max"}, MACHINE, id="v2: no limit"),
        pytest.param(
            "0::/a/b", [V2_MOUNT], {"a/memory.max": f"{GIB}", "a/b/memory.max": "max"}, GIB, id="v2: parent's"
        ),
        pytest.param("0::/a/b", [V2_MOUNT], {"a/memory.max": "9", "a/b/memory.max": f"{GIB}"}, 9, id="v2: the least"),
        pytest.param("0::/a", [V2_MOUNT], {"b/memory.max": "9"}, MACHINE, id="v2: another group's counts not"),
        pytest.param("0::/", [V2_MOUNT], {"memory.max": f"{MACHINE * 2}"}, MACHINE, id="v2: more than there is"),
        pytest.param("0::/../x", [V2_MOUNT], {"memory.max": f"{GIB}"}, GIB, id="v2: moved out of sight"),
        pytest.param("0::/docker/abc", [V2_MOUNT], {"memory.max": f"{GIB}"}, GIB, id="v2: a name of the host's"),
        pytest.param("0::/", [], {"memory.max": f"{GIB}"}, GIB, id="v2: no table of mounts"),
        pytest.param("0::/", [ELSEWHERE], {"/mnt/with space/memory.max": f"{GIB}"}, GIB, id="v2: mounted elsewhere"),
        pytest.param("4:memory:/", [V1_MOUNT], {"memory/memory.limit_in_bytes": f"{GIB}"}, GIB, id="v1"),
        pytest.param(
            "4:memory:/", [V1_MOUNT], {"memory/memory.limit_in_bytes": f"{BOUNDLESS}"}, MACHINE, id="v1: no limit"
        ),
        pytest.param(
            "11:cpuset:/x\n4:hugetlb,memory:/docker/abc\n0::/x",
            [OTHER_V1, V1_OWN_MOUNT],
            {"memory/memory.limit_in_bytes": f"{GIB}"},
            GIB,
            id="v1: its own group mounted",
        ),
        pytest.param(
            "4:memory:/a/b\n0::/z",
            [V1_MOUNT, HYBRID],
            {"memory/a/memory.limit_in_bytes": f"{GIB}", "memory/a/b/memory.limit_in_bytes": f"{BOUNDLESS}"},
            GIB,
            id="v1 beside v2: the parent's",
        ),
        pytest.param("", [], {}, MACHINE, id="no control groups"),
        pytest.param("nonsense\n::\n:", ["x - y"], {"memory.max": "-1"}, MACHINE, id="nonsense"),
    ],
)
def test_the_limit_of_the_control_group_counts(
    tmp_path: Path, group: str, mounts: list[str], files: dict[str, str], expected: int
) -> None:
    own = tmp_path / "proc/self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(group + "\n")
    (own / "mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    for name, text in files.items():
        path = tmp_path / name[1:] if name.startswith("/") else tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert memory_bytes(tmp_path, MACHINE) == expected
    assert default_max_model_bytes(tmp_path, MACHINE) == expected // 3


def test_without_limits_the_memory_is_the_machines(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) >= memory_bytes() > 0
