"""Addresses: what is valid, and that every command and function refuses an invalid one at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ma_client import ParameterServerSession
from ma_client.cluster.spec import ClusterError, ClusterSpec
from modelaverage.addresses import Address, parse, split
from modelaverage.errors import InvalidRequestError
from ps_server.__main__ import main as ps_server
from ps_worker.__main__ import main as ps_worker

GOOD = {
    "ps:2222": Address("ps", 2222),
    "10.0.0.1:1": Address("10.0.0.1", 1),
    "my_host.example.:65535": Address("my_host.example.", 65535),
    "[::1]:2222": Address("::1", 2222),
    "unix:/tmp/ps.sock": Address(path="/tmp/ps.sock"),
    "unix:ps.sock": Address(path="ps.sock"),
}
# By address: what is wrong with it, and what to write instead.
BAD = {
    "http://ps:2222": ("begins with 'http://'", "write ps:2222"),
    "grpc://ps:2222/": ("begins with 'grpc://'", "write ps:2222"),
    "https://ps/center": ("begins with 'https://'", "write ps:2222"),
    "dns:///ps:2222": ("begins with 'dns:///'", "write ps:2222"),
    "tcp://[::1]:5": ("begins with 'tcp://'", "write [::1]:5"),
    "ps:2222/center": ("there is a path in it, '/center'", "write ps:2222"),
    "ps": ("it has no port", "write ps:2222"),
    "ps:": ("it has no port", "write ps:2222"),
    "8222": ("it has no host", "write 127.0.0.1:8222"),
    "[::1]": ("it has no port", "write [::1]:2222"),
    ":2222": ("it has no host", "write 127.0.0.1:2222"),
    "ps:0": ("port '0' is not a number from 1 to 65535", "such as 127.0.0.1:2222"),
    "ps:99999": ("port '99999' is not a number from 1 to 65535", "such as 127.0.0.1:2222"),
    "ps:http": ("port 'http' is not a number", "such as 127.0.0.1:2222"),
    "ps:-1": ("port '-1' is not a number", "such as 127.0.0.1:2222"),
    "::1": ("an IPv6 address needs brackets", "write [::1]:2222"),
    "::1:2222": ("an IPv6 address needs brackets", "write [::1]:2222"),
    "2001:db8::7:4000": ("an IPv6 address needs brackets", "write [2001:db8::7]:4000"),
    "a:b:c": ("more than one colon", "such as 127.0.0.1:2222"),
    "[ps]:2222": ("'ps' is not an IPv6 address", "such as 127.0.0.1:2222"),
    "me@ps:2222": ("'@'", "such as 127.0.0.1:2222"),
    "": ("it is empty", "such as 127.0.0.1:2222"),
    "ps :2222": ("there is a space in it", "such as 127.0.0.1:2222"),
    "unix:": ("it has no path", "such as unix:/tmp/ps.sock"),
}


@pytest.mark.parametrize("text", GOOD)
def test_a_host_with_a_port_is_an_address_and_so_is_a_path(text: str) -> None:
    assert parse(text) == GOOD[text]
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_address_is_named_with_what_is_wrong_and_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match="is not") as raised:
        parse(text)
    words = str(raised.value)
    assert words.startswith(f"{text!r} is not "), words
    assert all(part in words for part in BAD[text]), words
    assert "\n" not in words


def test_a_server_may_listen_on_any_free_port_and_a_client_cannot_ask_for_one() -> None:
    assert parse("127.0.0.1:0", to_listen=True) == Address("127.0.0.1", 0)
    with pytest.raises(ValueError, match="from 0 to 65535"):
        parse("127.0.0.1:65536", to_listen=True)


@pytest.mark.parametrize("text", ["a:1,,b:2", "a:1,", ",a:1"])
def test_an_address_is_not_missing_between_two_commas(text: str) -> None:
    assert split("a:1, b:2") == ("a:1", "b:2")
    with pytest.raises(ValueError, match="missing between two commas, or at an end"):
        split(text)


# Everything that takes an address. Each is given one, and returns or prints what is wrong with it.


def _session(text: str) -> None:
    ParameterServerSession([text], worker_id="a")


def _tf_config(text: str) -> None:
    cluster = {"ps": [text], "worker": ["w:1"]}
    ClusterSpec.from_env({"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}})})


def _environment(text: str) -> None:
    ClusterSpec.from_env({"MA_PS_HOSTS": text, "MA_NUM_WORKERS": "1", "MA_TASK_INDEX": "0"})


def _spec(text: str) -> None:
    ClusterSpec((text,), 1, 0)


FUNCTIONS: list[tuple[Callable[[str], None], type[Exception]]] = [
    (_session, InvalidRequestError),
    (_tf_config, ClusterError),
    (_environment, ClusterError),
    (_spec, ClusterError),
]
COMMANDS = {
    "status": (ps_server, ("status", "ADDRESS", "--timeout-s", "60")),
    "status of several": (ps_server, ("status", "127.0.0.1:1", "ADDRESS", "--timeout-s", "60")),
    "watch": (ps_server, ("status", "--watch", "1", "ADDRESS")),
    "export": (ps_server, ("export", "ADDRESS", "OUT", "--timeout-s", "60")),
    "serve": (ps_server, ("serve", "--num-workers", "1", "--bind", "ADDRESS")),
    "metrics": (ps_server, ("serve", "--num-workers", "1", "--bind", "127.0.0.1:0", "--metrics-bind", "ADDRESS")),
    "run": (ps_worker, ("run", "--ps-hosts", "ADDRESS", "--num-workers", "1", "--task-index", "0", __file__)),
}
ODD = ["http://ps:2222", "ps:2222/x", "ps", "ps:99999", "::1", "ps:2222 x"]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(("function", "error"), FUNCTIONS)
def test_a_function_refuses_what_is_no_address_at_once(
    function: Callable[[str], None], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match="is not HOST:PORT") as raised:
        function(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_what_is_no_address_in_one_line(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, command = COMMANDS[name]
    words = {"ADDRESS": text, "OUT": str(tmp_path / "out.safetensors")}
    try:
        code = main([words.get(word, word) for word in command])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code not in (0, None)
    assert f"{text!r} is not HOST:PORT" in said
    assert said.count("\n") == 1
