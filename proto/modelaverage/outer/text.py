"""Outer optimizers as text, such as `sgd:lr=0.7,momentum=0.9,nesterov`: the form on the wire, in flags, in checkpoints
and in the status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields

from modelaverage.outer.base import OuterOptimizer, Setting

__all__ = ["MAX_TEXT_BYTES", "parse_outer", "text_of"]

MAX_TEXT_BYTES = 100
"""Headers have room for so much beside the longest manifest."""


def text_of(outer: OuterOptimizer) -> str:
    """The outer optimizer as text. All numbers are written, so that other versions' defaults do not matter; floats read
    back exactly. Raises ValueError if the text is too long."""
    written = [each for name, value in outer.settings.items() if (each := _written(name, value))]
    text = f"{outer.name}:{','.join(written)}" if written else outer.name
    if len(text.encode()) > MAX_TEXT_BYTES:
        raise ValueError(f"{text!a} has {len(text)} characters; at most {MAX_TEXT_BYTES}: write fewer digits")
    return text


def parse_outer(text: str, known: Mapping[str, type[OuterOptimizer]]) -> OuterOptimizer:
    """The outer optimizer that a text names.

    Args:
        text: NAME or NAME:SETTING=VALUE,...; a setting that is true or false may stand alone: true. Numbers of one
            setting are separated by slashes.
        known: the classes by name.

    Raises:
        ValueError: the text names no known optimizer, or a setting that it does not have, twice, or with a wrong value.
    """
    name, _, rest = text.partition(":")
    made = known.get(name)
    if made is None or len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise ValueError(f"outer optimizer {text[:MAX_TEXT_BYTES]!a} is not known here, only {', '.join(known)}")
    kinds = {field.name: field for field in fields(made)}
    settings = dict[str, Setting]()
    for part in rest.split(",") if rest else ():
        setting, is_given, value = part.partition("=")
        if setting not in kinds:
            have = ", ".join(kinds) or "none"
            raise ValueError(f"outer optimizer {name} has no setting {setting!a}; it has {have}")
        if setting in settings:
            raise ValueError(f"outer optimizer {text!a} names {setting} twice")
        settings[setting] = _read(f"{name}: {setting}", str(kinds[setting].type), value if is_given else None)
    lacking = [each.name for each in kinds.values() if each.default is MISSING and each.name not in settings]
    if lacking:
        raise ValueError(f"outer optimizer {text!a} needs {lacking[0]}, such as {name}:{lacking[0]}=0.1")
    return made(**settings)


def _written(name: str, value: Setting) -> str:
    if isinstance(value, bool):
        return name if value else ""
    if isinstance(value, tuple):
        return f"{name}={'/'.join(repr(float(each)) for each in value)}"
    return f"{name}={float(value)!r}"


def _read(what: str, kind: str, value: str | None) -> Setting:
    """A value as the setting's annotation says. Raises ValueError."""
    if kind == "bool":
        if value in (None, "true", "false"):
            return value != "false"
        raise ValueError(f"{what} is {value!a}; it must be true or false")
    try:
        numbers = tuple(float(each) for each in (value or "").split("/"))
    except ValueError:
        numbers = ()
    if kind == "float" and len(numbers) == 1:
        return numbers[0]
    if kind.startswith("tuple") and len(numbers) == kind.count("float"):
        return numbers
    wanted = "a number" if kind == "float" else f"{kind.count('float')} numbers with slashes between them"
    raise ValueError(f"{what} is {value or ''!a}; it must be {wanted}")
