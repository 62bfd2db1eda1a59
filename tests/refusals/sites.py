"""Every call in the server's core as a place where the machine may refuse: a probe is compiled before each.

`install` has to come before these modules are imported, so this runs in a process of its own.
"""

from __future__ import annotations

import ast
import builtins
import errno
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

__all__ = ["ERRORS", "MODULES", "PROBE", "Probe", "Site", "install"]

MODULES = (
    "modelaverage.runtime.shared_memory",
    "ps_server.flow.call",
    "ps_server.center.buffers",
    "ps_server.center.center",
    "modelaverage.outer.sgd",
    "ps_server.center.state",
    "ps_server.center.sums",
    "modelaverage.codecs.base",
    "modelaverage.codecs.changes",
    "modelaverage.codecs.blocks",
    "modelaverage.codecs.raw",
    "ps_server.checkpoints.reading",
    "ps_server.checkpoints.fields",
    "ps_server.checkpoints.files",
    "ps_server.checkpoints.home",
    "ps_server.transports.data_port",
    "ps_server.transports.data_lane",
    "ps_server.transports.arriving",
    "ps_server.checkpoints.disk_wait",
    "ps_server.flow.job",
    "ps_server.checkpoints.keeper",
    "ps_server.flow.part",
    "ps_server.machine.reserve",
    "ps_server.rules.round",
    "ps_server.checkpoints.safetensors_file",
    "ps_server.flow.sender",
    "ps_server.machine.threads",
    "ps_server.checkpoints.writer_process",
)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "EMFILE": lambda: OSError(errno.EMFILE, "Too many open files"),
    "ENOMEM": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "MemoryError": MemoryError,
    "no thread": lambda: RuntimeError("can't start new thread"),
    "ENOSPC": lambda: OSError(errno.ENOSPC, "No space left on device"),
}
_NAME = "__may_be_refused__"


@dataclass(frozen=True)
class Site:
    """One call in the source."""

    module: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}:{self.column} {self.text}"


class Probe:
    """Counts how often each site is reached, and refuses one of them once.

    Attributes:
        sites: all, by number.
        hits: by site, since `arm`.
        refused: whether it has happened.
    """

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.hits = Counter[int]()
        self.refused = False
        self._target: tuple[int, int] | None = None
        self._error: Callable[[], BaseException] = MemoryError
        self._on = False

    def arm(self, site: int | None, hit: int = 1, error: str = "MemoryError") -> None:
        """Starts counting; the ``hit``-th time that ``site`` is reached, it fails. None: only counts."""
        self.hits.clear()
        self.refused, self._on = False, True
        self._target, self._error = None if site is None else (site, hit), ERRORS[error]

    def disarm(self) -> None:
        """Stops counting and refusing."""
        self._on = False

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Exempts what happens in this context, as if it happened in another process."""
        was_on, self._on = self._on, False
        try:
            yield
        finally:
            self._on = was_on

    def __call__(self, site: int) -> None:
        if not self._on:
            return
        self.hits[site] += 1
        if not self.refused and self._target == (site, self.hits[site]):
            self.refused = True
            raise self._error()


PROBE = Probe()


class _WithProbes(ast.NodeTransformer):
    def __init__(self, module: str) -> None:
        self._module = module

    def visit_Call(self, node: ast.Call) -> ast.AST:
        text = ast.unparse(node.func)
        self.generic_visit(node)
        PROBE.sites.append(Site(self._module, node.lineno, node.col_offset, text))
        probe = ast.Call(ast.Name(_NAME, ast.Load()), [ast.Constant(len(PROBE.sites) - 1)], [])
        both = ast.Tuple([probe, node], ast.Load())
        return ast.copy_location(ast.Subscript(both, ast.Constant(1), ast.Load()), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        tree = _WithProbes(fullname).visit(ast.parse(self.get_data(path)))
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec")
        return code


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin)
        return spec


def install() -> None:
    """Has these modules imported with probes."""
    loaded = sorted(sys.modules.keys() & set(MODULES))
    assert not loaded, f"{loaded} came too early"
    any_builtins: Any = builtins
    setattr(any_builtins, _NAME, PROBE)
    sys.meta_path.insert(0, _Finder())
