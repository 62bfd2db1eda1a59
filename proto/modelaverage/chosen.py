"""What the chief chooses for a job, as text on the wire. Servers keep it and tell it with the center; a worker may name
what it expects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

from modelaverage.codecs import CODECS, RAW, codec_named
from modelaverage.errors import Reason
from modelaverage.names import printable
from modelaverage.outer import AVERAGE, outer_optimizer, text_of

__all__ = [
    "CHOICES",
    "COMPRESSIONS",
    "Choice",
    "Chosen",
    "NOTHING_CHOSEN",
    "NO_COMPRESSION",
    "codec_of",
    "compression_of",
]

NO_COMPRESSION = "none"
"""People's name for `raw`."""


@dataclass(frozen=True)
class Choice:
    """One thing to choose.

    Args:
        field: its field in `Chosen` and in messages.
        noun: for people.
        default: what is in force if the chief chooses nothing. Servers leave it empty.
        mismatch: the reason to refuse a call that names another one.
        default_shown: people's name for the default.
    """

    field: str
    noun: str
    default: str
    mismatch: Reason
    default_shown: str

    def shown(self, text: str) -> str:
        """A text as people write it."""
        return self.default_shown if text == self.default else text


CHOICES = (
    Choice("outer_optimizer", "outer optimizer", text_of(AVERAGE), Reason.OUTER_OPTIMIZER_MISMATCH, text_of(AVERAGE)),
    Choice("compression", "compression", RAW.name, Reason.COMPRESSION_MISMATCH, NO_COMPRESSION),
)


class _Message(Protocol):
    """A message with the fields of `Chosen`."""

    outer_optimizer: str
    compression: str


@dataclass(frozen=True)
class Chosen:
    """The choices for a job. An empty text names nothing.

    Args:
        outer_optimizer: such as ``sgd:lr=0.7,momentum=0.9,nesterov``.
        compression: the name of the codec.
    """

    outer_optimizer: str = ""
    compression: str = ""

    @classmethod
    def of(cls, message: _Message) -> Chosen:
        """The choices in a message."""
        return cls(message.outer_optimizer, message.compression)

    @property
    def texts(self) -> Mapping[str, str]:
        """By field, for a message."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def in_force(self) -> Chosen:
        """With the default for what is empty."""
        texts = self.texts
        return replace(self, **{c.field: texts[c.field] or c.default for c in CHOICES})

    @property
    def told(self) -> Chosen:
        """As servers tell it: empty where it is the default, the only one of older servers."""
        return replace(
            self, **{c.field: "" if self.texts[c.field] == c.default else self.texts[c.field] for c in CHOICES}
        )

    @property
    def normal(self) -> Chosen:
        """In the form that other texts can be compared with.

        Raises:
            ValueError: this version does not know the outer optimizer, or a setting is wrong.
            InvalidRequestError: CODEC_UNKNOWN.
        """
        outer = text_of(outer_optimizer(self.outer_optimizer)) if self.outer_optimizer else ""
        return Chosen(outer, codec_named(self.compression).name if self.compression else "")

    def differences(self, in_force: Chosen) -> Iterator[tuple[Choice, str, str]]:
        """Each choice that is named here and is not the one in force: the choice, and both texts, for people."""
        others = in_force.in_force.texts
        for choice in CHOICES:
            text = self.texts[choice.field]
            if text and text != others[choice.field]:
                yield choice, choice.shown(text), choice.shown(others[choice.field])


NOTHING_CHOSEN = Chosen()


def compression_of(codec: str) -> str:
    """People's name for what a codec does, as text for a terminal; the empty name is `raw`."""
    return NO_COMPRESSION if codec in ("", RAW.name) else printable(codec)


def codec_of(compression: str) -> str:
    """The codec for what a person writes. Raises ValueError unless there is one."""
    name = RAW.name if compression == NO_COMPRESSION else compression
    if name not in CODECS:
        raise ValueError(f"compression {compression[:40]!r} is not known here, only {', '.join(COMPRESSIONS)}")
    return name


COMPRESSIONS = tuple(map(compression_of, CODECS))
"""People's names for this version's codecs."""
