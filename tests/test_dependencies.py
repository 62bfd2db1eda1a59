"""pyproject.toml gives the accepted versions, constraints.txt the tested ones: the tested ones are accepted."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    parsed: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return parsed


def wanted() -> list[Requirement]:
    """What the project requires: to be built, to run, and for each of its extras."""
    toml = project()
    texts = [*toml["build-system"]["requires"], *toml["project"]["dependencies"]]
    texts += [text for extra in toml["project"]["optional-dependencies"].values() for text in extra]
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if requirement.name != toml["project"]["name"]]


def pins_on(environment: dict[str, str]) -> dict[str, list[Version]]:
    """By name, the versions that constraints.txt allows in this environment."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (exactly,) = pin.specifier
            assert exactly.operator == "==", line
            if pin.marker is None or pin.marker.evaluate(environment):
                found.setdefault(canonicalize_name(pin.name), []).append(Version(exactly.version))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_tested_is_what_the_project_asks_for(python: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    pins = pins_on(environment)
    assert {name: versions for name, versions in pins.items() if len(versions) != 1} == {}
    for requirement in wanted():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            pinned = pins.get(canonicalize_name(requirement.name))
            assert pinned is not None, f"{requirement.name} is in pyproject.toml and not in constraints.txt"
            assert pinned[0] in requirement.specifier, f"{pinned[0]} is not {requirement}"


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in wanted():
        assert {each.operator for each in requirement.specifier} & {">=", "=="}, str(requirement)
