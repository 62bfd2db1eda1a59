"""Which role each call requires. Pure: no I/O, no gRPC."""

from __future__ import annotations

import enum
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.rpcs import SERVICE

__all__ = ["LEAST_ROLES", "OPEN_SERVICES", "Role", "Tokens", "check"]


class Role(enum.IntEnum):
    """What the holder of a token may do. Each role includes the rights of the roles before it."""

    READER = 1
    """Pull, and see the status."""
    WORKER = 2
    """Push, and say goodbye."""
    CHIEF = 3
    """Initialize the center."""


# The least role for each call. A call that is not listed requires CHIEF.
LEAST_ROLES: Mapping[str, Role] = {
    f"/{SERVICE}/GetStatus": Role.READER,
    f"/{SERVICE}/Pull": Role.READER,
    f"/{SERVICE}/PushAndAverage": Role.WORKER,
    f"/{SERVICE}/Leave": Role.WORKER,
    f"/{SERVICE}/Join": Role.WORKER,
    f"/{SERVICE}/Initialize": Role.CHIEF,
    # Reflection reveals only what the published .proto contains.
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.READER,
}
# Orchestrators check health without a token; the answer is one word.
OPEN_SERVICES = ("/grpc.health.v1.Health/",)


@dataclass(frozen=True)
class Tokens:
    """The tokens that the server accepts.

    Args:
        roles: the role of each token.
    """

    roles: Mapping[str, Role]

    def role_of(self, token: str) -> Role | None:
        """The role of a token; None if it is unknown. Timing reveals nothing about a token."""
        found = None
        sent = token.encode("utf-8", "surrogateescape")
        for known, role in self.roles.items():
            if hmac.compare_digest(known.encode(), sent):
                found = role  # no early return: timing must not reveal which token matched
        return found


def check(tokens: Tokens, method: str, sent: Sequence[str]) -> ModelAverageError | None:
    """Returns the error that refuses the call, or None if the call may proceed.

    Args:
        tokens: the tokens that the server accepts.
        method: the call's full name, such as /package.Service/Method.
        sent: the tokens that the call carries. Anything but exactly one is refused.
    """
    if method.startswith(OPEN_SERVICES):
        return None
    if not sent:
        return refusal(
            Reason.TOKEN_INVALID,
            "the call carries no token, and this server requires one; give the client its token file (MA_TOKEN_FILE)",
        )
    role = tokens.role_of(sent[0]) if len(sent) == 1 else None
    if role is None:
        return refusal(
            Reason.TOKEN_INVALID,
            "the server does not know the token that the call carries; give the client the token in the file that the "
            "server was started with",
        )
    needed = LEAST_ROLES.get(method, Role.CHIEF)
    if role < needed:
        name = method.rpartition("/")[2]
        return refusal(
            Reason.ROLE_INSUFFICIENT,
            f"a {role.name.lower()}'s token may not call {name}; it takes a {needed.name.lower()}'s",
        )
    return None
