"""A data connection that breaks in the middle of its bytes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ma_client.transports.data_socket import DataSocket

__all__ = ["break_after"]


def break_after(patch: pytest.MonkeyPatch, direction: str, after_bytes: int) -> None:
    """From now on, connections of this process break once they have moved ``after_bytes`` in a direction, "send" or
    "receive"."""
    left = {"bytes": after_bytes}
    send, receive = DataSocket.send, DataSocket.receive

    def cut_send(self: DataSocket, parts: Iterable[bytes | memoryview]) -> None:
        data = b"".join(parts)
        if len(data) > left["bytes"]:
            send(self, [data[: left["bytes"]]])
            self.break_off()
        left["bytes"] -= len(data)
        send(self, [data])

    def cut_receive(self: DataSocket, room: memoryview) -> None:
        if len(room) > left["bytes"]:
            receive(self, room[: left["bytes"]])
            self.break_off()
        left["bytes"] -= len(room)
        receive(self, room)

    patch.setattr(DataSocket, direction, cut_send if direction == "send" else cut_receive)
