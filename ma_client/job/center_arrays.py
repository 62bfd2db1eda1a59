"""The center as its user sees it, arrays by name, and as the servers do, cut into shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ma_client.job.all_servers import AllServers
from ma_client.job.assembly import Assembly
from ma_client.job.naming import check_has, check_same
from ma_client.job.one_server import known_codec
from ma_client.values.raw import bytes_of, same_bytes
from ma_client.values.reused import ReusedMemory
from ma_client.values.same import PushedBytes, SameArrays
from ma_client.values.trees import Paths, as_arrays, nest, paths_of
from modelaverage import wire
from modelaverage.chosen import Chosen
from modelaverage.errors import ConflictError, InvalidRequestError, NotInitializedError, Reason
from modelaverage.manifest import Manifest, Variable, dtype_name, first_difference
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["CenterArrays", "variables_of"]

_Array = NDArray[Any]


@dataclass(frozen=True)
class _Prepared:
    """Arrays that are pushed in every round, cut for the servers of an assembly; views of their memory."""

    assembly: Assembly
    paths: Paths
    values: Sequence[PushedBytes]


class CenterArrays:
    """The center of one job, in one session. What comes back is nested as what was given last.

    Args:
        servers: all servers of the job.
        addresses: of the servers, to name them in errors.
    """

    def __init__(self, servers: AllServers, addresses: Sequence[str]) -> None:
        self._servers = servers
        self._addresses = addresses
        self._assembly: Assembly | None = None
        self._copies = ReusedMemory()
        self._paths: Paths = {}

    def flat(self, tree: Mapping[str, Any]) -> dict[str, _Array]:
        """The arrays by the center's names; from now on, what comes back is nested as they are."""
        self._paths = paths_of(tree)
        return as_arrays(tree, self._paths)

    @property
    def frozen_digests(self) -> bytes:
        """See `Manifest`; empty before there is a center."""
        return b"" if self._assembly is None else self._assembly.manifest.frozen_digests

    def take(self, assembly: Assembly) -> None:
        """This is the center from now on."""
        self._assembly = assembly

    def adopt(self, headers: Sequence[pb.CenterHeader], expected: Mapping[str, _Array] | None) -> int:
        """These are the centers of the servers from now on; returns how many workers a round waits for.

        Raises:
            ConflictError: they do not belong together, or are not what is expected.
        """
        manifests = [wire.manifest_from_message(header.manifest) for header in headers]
        assembly = self._assembly
        if assembly is None or list(assembly.shards) != manifests:
            assembly = Assembly(manifests, self._addresses)
        if expected is not None:
            _in_order(expected, assembly.manifest)
        for header, address in zip(headers, self._addresses, strict=True):
            if header.num_workers != headers[0].num_workers:
                raise ConflictError(
                    f"the parameter server at {address} was started with --num-workers {header.num_workers}, that at "
                    f"{self._addresses[0]} with {headers[0].num_workers}"
                )
        check_same([Chosen.of(header) for header in headers], self._addresses)
        for header, server, address in zip(headers, self._servers, self._addresses, strict=True):
            check_has(server.named, Chosen.of(header), address)
        for server, staging, header in zip(self._servers, assembly.stagings, headers, strict=True):
            server.adopt(staging, header.manifest_id, known_codec(header.compression))
        self._assembly = assembly
        return headers[0].num_workers

    def cut(
        self, variables: Mapping[str, Any], untouched: Collection[str], snapshot: bool = False
    ) -> list[tuple[Sequence[memoryview], Sequence[int]]]:
        """For each server: the bytes of its variables, and which of them are untouched.

        Args:
            variables: local variables with the center's names, dtypes and shapes, in any order.
            untouched: names of those that are as they came from the center.
            snapshot: copy the variables.

        Raises:
            NotInitializedError: this session has not seen the center yet.
            ConflictError: the variables do not fit the center.
            InvalidRequestError: ``untouched`` has a name that the center has not.
        """
        assembly = self._assembly
        if assembly is None:
            raise NotInitializedError("pull the center (or initialize it) before the push", Reason.NOT_INITIALIZED)
        values = self._values(assembly, variables, snapshot)
        unknown = set(untouched) - assembly.numbers.keys()
        if unknown:
            raise InvalidRequestError(f"untouched names {min(unknown)!r}, which is not a center variable")
        untouched_numbers = assembly.cut_numbers({assembly.numbers[name] for name in untouched})
        return list(zip(values, untouched_numbers, strict=True))

    def _values(self, assembly: Assembly, variables: Mapping[str, Any], snapshot: bool) -> Sequence[PushedBytes]:
        """For each server, the bytes of its variables. Raises ConflictError, as `cut`."""
        ready = variables.prepared if isinstance(variables, SameArrays) and not snapshot else None
        if isinstance(ready, _Prepared) and ready.assembly is assembly:
            self._paths = ready.paths
            return ready.values
        arrays = _in_order(self.flat(variables), assembly.manifest)
        # An array from a result that was not copied lies where the average is about to arrive.
        copied = snapshot or any(assembly.overlaps(array) for array in arrays.values())
        if copied:
            arrays = {n: array.copy() if snapshot or assembly.overlaps(array) else array for n, array in arrays.items()}
        values = [PushedBytes(each) for each in assembly.cut([bytes_of(array) for array in arrays.values()])]
        if isinstance(variables, SameArrays) and not copied and variables.bytes is not None:
            variables.prepared = _Prepared(assembly, self._paths, values)
        return values

    def untouched_by_all(self, outcomes: Sequence[pb.PushOutcome]) -> frozenset[str]:
        """Names of the variables that no contributor of a round had changed."""
        assembly = self._known()
        kept = assembly.join_numbers([outcome.untouched_variables for outcome in outcomes])
        return frozenset(assembly.manifest.variables[number].name for number in kept)

    def read(self, copy: bool) -> Mapping[str, Any]:
        """The center that came last, by name. ``copy`` False: read-only views of where it lies."""
        assembly = self._known()
        arrays = assembly.join([server.elsewhere for server in self._servers])
        if not copy:
            self._copies.forget()
        else:
            here = {name: array for name, array in arrays.items() if assembly.overlaps(array)}
            arrays = {**arrays, **self._copies.copies(here)} if here else arrays
        return nest(arrays, self._paths) if self._paths.keys() == arrays.keys() else arrays

    def unchanged(self, variables: Mapping[str, Any], base_step: int | None) -> frozenset[str]:
        """Names of the variables that hold exactly the bytes of the center of ``base_step``; none of them if that
        center is no longer here."""
        assembly = self._assembly
        if not variables or assembly is None or any(step != base_step for step in self._servers.steps):
            return frozenset()
        if not self._is_here():
            return frozenset()
        arrays = as_arrays(variables, paths_of(variables))
        center = assembly.join([server.lent_center for server in self._servers])
        same = frozenset(name for name, array in arrays.items() if name in center and same_bytes(array, center[name]))
        # Shared memory may have been written over during the comparison.
        return same if self._is_here() else frozenset()

    def _is_here(self) -> bool:
        return all(server.holds_center for server in self._servers)

    def _known(self) -> Assembly:
        assert self._assembly is not None
        return self._assembly


def variables_of(arrays: Mapping[str, _Array]) -> tuple[Variable, ...]:
    """What a manifest says of these arrays."""
    return tuple(Variable(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items())


def _in_order(arrays: Mapping[str, _Array], manifest: Manifest) -> dict[str, _Array]:
    """The arrays in manifest order. Raises ConflictError, naming the first variable that does not fit."""
    known = {variable.name: variable for variable in manifest.variables}
    ordered = {name: arrays[name] for name in known if name in arrays}
    if len(ordered) == len(known) == len(arrays) and all(_fits(ordered[name], known[name]) for name in known):
        return ordered
    ordered.update(arrays)
    difference = first_difference(variables_of(ordered), manifest.variables, "here", "in the center")
    if difference is not None:
        raise ConflictError(f"{difference}; give all workers the same model", Reason.MANIFEST_MISMATCH)
    return ordered


def _fits(array: _Array, variable: Variable) -> bool:
    return array.shape == variable.shape and dtype_name(array.dtype) == variable.dtype
