"""What a call names of the job's choices, and whether it is what the center has."""

from __future__ import annotations

from modelaverage.chosen import Chosen
from modelaverage.codecs import RAW, Codec
from modelaverage.errors import Reason, refusal
from modelaverage.outer import OuterOptimizer, text_of
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["check_named", "check_push_codec", "chosen_of", "named"]


def named(message: pb.InitializeHeader | pb.PullRequest) -> Chosen:
    """What a message names, in its normal form.

    Raises:
        InvalidRequestError: OUTER_OPTIMIZER_INVALID: this version does not know it, or a setting is wrong;
            CODEC_UNKNOWN.
    """
    try:
        return Chosen.of(message).normal
    except ValueError as error:
        raise refusal(Reason.OUTER_OPTIMIZER_INVALID, str(error)) from None


def chosen_of(outer: OuterOptimizer, codec: Codec) -> Chosen:
    """The choices of a center with these."""
    return Chosen(text_of(outer), codec.name)


def check_named(wanted: Chosen, in_force: Chosen) -> None:
    """Raises ConflictError (OUTER_OPTIMIZER_MISMATCH, COMPRESSION_MISMATCH) if a call names another one than the
    center has."""
    for choice, ours, theirs in wanted.differences(in_force):
        raise refusal(
            choice.mismatch,
            f"the center has the {choice.noun} {theirs}, and this call names {ours}; give all workers the same one, or "
            "leave it out",
        )


def check_push_codec(codec: Codec, in_force: Codec) -> None:
    """Raises InvalidRequestError (CODEC_UNKNOWN) unless a push in this codec is possible."""
    if codec not in (RAW, in_force):
        raise refusal(
            Reason.CODEC_UNKNOWN,
            f"the push is in codec {codec.name}, and the job has {in_force.name}; push in that one or raw",
        )
