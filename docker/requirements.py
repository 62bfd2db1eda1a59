"""Prints the requirements of the project and of the extras named as arguments, one per line, from pyproject.toml."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = list(project["dependencies"])
names = sys.argv[1:]
while names:
    for requirement in extras[names.pop()]:
        own = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
        if own is None:
            wanted.append(requirement)
        else:
            names.extend(own[1].split(","))
print(*wanted, sep="\n")
