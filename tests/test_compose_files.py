"""docker/compose*.yaml without an engine: the programs accept their commands, and everything they name exists."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

import pytest
import yaml

from ps_server.__main__ import _parser as server_parser
from ps_worker.__main__ import _parser as worker_parser
from tests.compose import FOLDER

FILES = ["compose.yaml", "compose.tls.yaml"]


def composed(name: str) -> dict[str, Any]:
    """The file, with every ${NAME:-default} as its default."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return found


def parser_of(service: str) -> argparse.ArgumentParser:
    return worker_parser() if service == "worker" else server_parser()


@pytest.mark.parametrize("name", FILES)
def test_the_programs_take_the_commands_of_a_compose_file(name: str) -> None:
    services = composed(name)["services"]
    assert {"ps", "ps-1", "worker"} <= services.keys()
    for service in ("ps", "ps-1", "worker"):
        if "command" in services[service]:
            parser_of(service).parse_args(shlex.split(services[service]["command"]))
    for service in ("ps", "ps-1"):
        start, program, *command = services[service]["healthcheck"]["test"]
        assert (start, program) == ("CMD", "ps-server")
        server_parser().parse_args(command)


def test_the_page_that_a_server_prints_is_the_one_that_is_published() -> None:
    published = {service: composed("compose.yaml")["services"][service]["ports"] for service in ("ps", "ps-1")}
    for name in FILES:
        for service, ports in published.items():
            command = shlex.split(composed(name)["services"][service]["command"])
            port = server_parser().parse_args(command).page_bind.rpartition(":")[2]
            assert ports == [f"127.0.0.1:{port}:{port}"]


@pytest.mark.parametrize("name", FILES)
def test_volumes_secrets_and_files_that_a_compose_file_names_are_there(name: str) -> None:
    file = composed(name)
    for service in file["services"].values():
        assert set(service.get("secrets", ())) <= file.get("secrets", {}).keys()
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in file["volumes"] or (FOLDER / source).exists(), source
        if "build" in service:
            assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
