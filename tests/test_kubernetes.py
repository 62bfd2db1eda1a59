"""docker/kubernetes/: what Kubernetes' own schemas say of the manifests, and whether their parts fit together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ps_server.__main__ import _parser as server_parser
from ps_server.machine.memory_limit import default_max_model_bytes
from ps_worker.__main__ import _parser as worker_parser

FOLDER = Path(__file__).parents[1] / "docker/kubernetes"
KUSTOMIZATIONS = ["base", "overlays/shards", "overlays/tls"]
VERSIONS = ["1.31", kubernetes_validate.latest_version()]

Manifest = dict[str, Any]


def built(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize` makes of a folder, as far as the manifests need it: resources, and JSON patches."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    manifests: list[Manifest] = []
    for name in kustomization["resources"]:
        path = folder / name
        manifests += built(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        (target,) = (m for m in manifests if is_target(m, patch["target"]))
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            apply(target, **operation)
    return manifests


def is_target(manifest: Manifest, target: Manifest) -> bool:
    return bool(manifest["kind"] == target["kind"] and manifest["metadata"]["name"] == target["name"])


def apply(manifest: Any, op: str, path: str, value: Any) -> None:
    """One operation of RFC 6902."""
    *parents, last = path.strip("/").split("/")
    for key in parents:
        manifest = manifest[int(key)] if isinstance(manifest, list) else manifest[key]
    if isinstance(manifest, list):
        assert (op, last) == ("add", "-")
        manifest.append(copy.deepcopy(value))
    else:
        assert op == "add" or last in manifest, f"there is no {path} to replace"
        manifest[last] = copy.deepcopy(value)


def the(manifests: list[Manifest], kind: str, name: str) -> Any:
    return next(m for m in manifests if is_target(m, {"kind": kind, "name": name}))


def container(manifest: Any) -> Any:
    return manifest["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kubernetes_accepts_every_manifest(name: str, version: str) -> None:
    manifests = built(FOLDER / name)
    assert {m["kind"] for m in manifests} == {"ConfigMap", "Service", "StatefulSet", "Job", "NetworkPolicy"}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def without_a_service_name(manifests: list[Manifest]) -> Manifest:
    statefulset = the(manifests, "StatefulSet", "ps")
    del statefulset["spec"]["selector"]
    return statefulset  # type: ignore[no-any-return]


def with_a_number_in_words(manifests: list[Manifest]) -> Manifest:
    job = the(manifests, "Job", "train")
    job["spec"]["completions"] = "two"
    return job  # type: ignore[no-any-return]


def with_a_misspelt_field(manifests: list[Manifest]) -> Manifest:
    statefulset = the(manifests, "StatefulSet", "ps")
    container(statefulset)["readinesProbe"] = container(statefulset).pop("readinessProbe")
    return statefulset  # type: ignore[no-any-return]


def with_a_number_in_the_config(manifests: list[Manifest]) -> Manifest:
    config = the(manifests, "ConfigMap", "modelaverage")
    config["data"]["MA_NUM_WORKERS"] = 2
    return config  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "broken",
    [without_a_service_name, with_a_number_in_words, with_a_misspelt_field, with_a_number_in_the_config],
)
def test_a_broken_manifest_is_rejected(broken: Callable[[list[Manifest]], Manifest]) -> None:
    manifest = broken(built(FOLDER / "base"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_workers_servers_and_the_network_policy_fit_together(name: str) -> None:
    manifests = built(FOLDER / name)
    config = the(manifests, "ConfigMap", "modelaverage")["data"]
    job, statefulset = the(manifests, "Job", "train"), the(manifests, "StatefulSet", "ps")
    assert str(job["spec"]["completions"]) == str(job["spec"]["parallelism"]) == config["MA_NUM_WORKERS"]
    service = the(manifests, "Service", statefulset["spec"]["serviceName"])
    servers = [f"ps-{index}.{service['metadata']['name']}:2222" for index in range(statefulset["spec"]["replicas"])]
    assert config["MA_PS_HOSTS"].split(",") == servers
    pods = statefulset["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == statefulset["spec"]["selector"]["matchLabels"] == pods
    policy = the(manifests, "NetworkPolicy", "ps")["spec"]
    assert policy["podSelector"]["matchLabels"] == pods
    (source,) = policy["ingress"][0]["from"]
    assert source["podSelector"]["matchLabels"] == job["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_commands_take_the_arguments_of_the_manifests(name: str) -> None:
    manifests = built(FOLDER / name)
    server = container(the(manifests, "StatefulSet", "ps"))
    arguments = [argument.replace("$(MA_NUM_WORKERS)", "2") for argument in server["args"]]
    assert server_parser().parse_args(arguments).num_workers == 2
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "exec" in server[probe]:
            command, *arguments = server[probe]["exec"]["command"]
            assert command == "ps-server"
            server_parser().parse_args(arguments)
    worker_parser().parse_args(container(the(manifests, "Job", "train"))["args"])


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_nothing_runs_as_root_or_writes_outside_its_volumes(name: str) -> None:
    manifests = built(FOLDER / name)
    for workload in (the(manifests, "Job", "train"), the(manifests, "StatefulSet", "ps")):
        assert workload["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
        locked = container(workload)["securityContext"]
        assert locked["readOnlyRootFilesystem"]
        assert not locked["allowPrivilegeEscalation"]
        assert locked["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_largest_model_that_a_server_takes_fits_its_limits(name: str, tmp_path: Path) -> None:
    statefulset = the(built(FOLDER / name), "StatefulSet", "ps")
    arguments = container(statefulset)["args"]
    assert not any(argument.startswith("--max-model-bytes") for argument in arguments), "it follows from the limit"
    limit_bytes = int(container(statefulset)["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit_bytes}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    largest_bytes = default_max_model_bytes(tmp_path, machine_bytes=1 << 40)
    assert 2 * largest_bytes + (200 << 20) <= limit_bytes
    (claim,) = statefulset["spec"]["volumeClaimTemplates"]
    disk_bytes = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) << 30
    assert 4 * largest_bytes <= disk_bytes
