"""Credentials, and a server that asks for them."""

from __future__ import annotations

import pytest

from tests.certificates import Authority
from tests.conftest import StartServer
from tests.security.guarded import TOKENS, Files, Guarded


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("secrets")
    for role, token in TOKENS.items():
        (directory / role.name).write_text(f"{token}\n")
    authority, stranger = Authority(directory), Authority(directory, "stranger")
    return Files(directory, authority, stranger, authority.sign("server"), authority.sign("client"))


@pytest.fixture
def guarded(start_server: StartServer, files: Files) -> Guarded:
    return Guarded(start_server(1, security=files.of_server), files)
