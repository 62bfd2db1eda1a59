"""Where the parts of a model go, and how they are joined again: properties over random models, and examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client.job.assembly import Assembly
from modelaverage import wire
from modelaverage.errors import ConflictError, InvalidRequestError, Reason
from modelaverage.manifest import DTYPES, MAX_FRAGMENTS, Manifest, Part, Shard, Variable
from modelaverage.placement import PLACEMENTS, assemble, default_fragment_size_bytes, gather, place
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.strategies import FROZEN_DIGESTS

JOB = b"the job's 16 by."
OTHER_JOB = b"another job's..."
MODELS = st.builds(
    lambda shapes, size, frozen_digests: Manifest(
        tuple(Variable(f"v{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)),
        8 * size,
        frozen_digests=frozen_digests,
    ),
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=7
    ),
    st.integers(1, 12),
    FROZEN_DIGESTS,
)
COUNTS = st.integers(1, 9)


def addresses(count: int) -> list[str]:
    return [f"ps{index}:2222" for index in range(count)]


def whole_bytes(manifest: Manifest) -> list[memoryview]:
    """Different bytes everywhere."""
    rng = np.random.default_rng(0)
    return [memoryview(rng.bytes(variable.size_bytes)) for variable in manifest.variables]


@given(MODELS, COUNTS, st.sampled_from(PLACEMENTS))
def test_the_shards_of_a_model_make_that_model(manifest: Manifest, count: int, placement: str) -> None:
    shards = place(manifest, count, placement, JOB)
    assert len(shards) == count
    assert assemble(shards, addresses(count)) == manifest


@given(MODELS, COUNTS, st.sampled_from(PLACEMENTS))
def test_what_is_cut_for_the_shards_and_gathered_again_is_what_it_was(
    manifest: Manifest, count: int, placement: str
) -> None:
    assembly = Assembly(place(manifest, count, placement, JOB), addresses(count))
    values = whole_bytes(manifest)
    arrays = [
        {
            variable.name: np.frombuffer(part, DTYPES[variable.dtype]).reshape(variable.shape)
            for variable, part in zip(shard.variables, parts, strict=True)
        }
        for shard, parts in zip(assembly.shards, assembly.cut(values), strict=True)
    ]
    gathered = gather(assembly.manifest, arrays)
    assert [array.tobytes() for array in gathered.values()] == [bytes(value) for value in values]
    assert [array.shape for array in gathered.values()] == [variable.shape for variable in manifest.variables]


@given(MODELS, COUNTS, st.sampled_from(PLACEMENTS), st.data())
def test_a_center_that_arrives_in_the_stagings_is_the_whole_model(
    manifest: Manifest, count: int, placement: str, data: st.DataObject
) -> None:
    assembly = Assembly(place(manifest, count, placement, JOB), addresses(count))
    values = whole_bytes(manifest)
    parts = assembly.cut(values)
    # Some shards' centers lie in shared memory instead.
    elsewhere = [data.draw(st.booleans()) for _ in range(count)]
    lent: list[dict[str, np.ndarray] | None] = [None] * count
    for index, (shard, staging) in enumerate(zip(assembly.shards, assembly.stagings, strict=True)):
        if elsewhere[index]:
            lent[index] = {
                variable.name: np.frombuffer(part, DTYPES[variable.dtype]).reshape(variable.shape)
                for variable, part in zip(shard.variables, parts[index], strict=True)
            }
            continue
        for number in range(shard.fragment_count):
            staging.receive(number, memoryview(b"".join(shard.fragment_parts(number, parts[index]))))
        staging.check_complete()
    center = assembly.join(lent)
    assert list(center) == [variable.name for variable in manifest.variables]
    for variable, value in zip(manifest.variables, values, strict=True):
        assert center[variable.name].tobytes() == bytes(value)
        assert center[variable.name].shape == variable.shape


@given(MODELS, COUNTS)
def test_balanced_shards_are_contiguous_fragments_whose_numbers_differ_by_one_at_most(
    manifest: Manifest, count: int
) -> None:
    shards = place(manifest, count, "balanced", JOB)
    counts = [shard.fragment_count for shard in shards]
    assert sum(counts) == manifest.fragment_count
    assert max(counts) - min(counts) <= 1
    # The shards' flat buffers, one after the other, are the model's.
    values = whole_bytes(manifest)
    assembly = Assembly(shards, addresses(count))
    buffers = [
        b"".join(b"".join(shard.fragment_parts(number, parts)) for number in range(shard.fragment_count))
        for shard, parts in zip(shards, assembly.cut(values), strict=True)
    ]
    padded = b"".join(buffer + bytes(-len(buffer) % 8) for buffer in buffers)
    flat = b"".join(b"".join(manifest.fragment_parts(number, values)) for number in range(manifest.fragment_count))
    assert padded[: len(flat)] == flat


@given(MODELS, COUNTS)
def test_round_robin_puts_variable_i_on_shard_i_modulo_their_number(manifest: Manifest, count: int) -> None:
    shards = place(manifest, count, "round_robin", JOB)
    for index, shard in enumerate(shards):
        names = [variable.name for variable in shard.variables]
        expected = [v.name for i, v in enumerate(manifest.variables) if i % count == index]
        assert names == (expected if count > 1 else [v.name for v in manifest.variables])


def test_round_robin_puts_v_and_w_where_the_original_puts_them() -> None:
    manifest = Manifest((Variable("v", "float32", (2,)), Variable("w", "float32", ())))
    v, w = place(manifest, 2, "round_robin", JOB)
    assert ([x.name for x in v.variables], [x.name for x in w.variables]) == (["v"], ["w"])


def test_balanced_splits_a_large_variable() -> None:
    manifest = Manifest((Variable("w", "float32", (5, 4)),), 16)
    first, second = place(manifest, 2, "balanced", JOB)
    assert first.variables == (Variable("w", "float32", (8,), Part(0, 0, (5, 4))),)
    assert second.variables == (Variable("w", "float32", (12,), Part(0, 8, (5, 4))),)
    assert second.shard == Shard(1, 2, JOB)
    assert str(second.variables[0]) == "elements 8 to 19 of float32[5, 4]"


@given(MODELS, COUNTS, st.sampled_from(PLACEMENTS))
def test_every_shards_manifest_crosses_the_wire_unchanged(manifest: Manifest, count: int, placement: str) -> None:
    for shard in place(manifest, count, placement, JOB):
        data = wire.manifest_to_message(shard).SerializeToString()
        assert wire.manifest_from_message(wire.parse(pb.Manifest, data)) == shard


@given(MODELS, st.integers(2, 9))
def test_shards_of_one_model_have_different_ids(manifest: Manifest, count: int) -> None:
    ids = {shard.id for job in (JOB, OTHER_JOB) for shard in place(manifest, count, "balanced", job)}
    assert len(ids) == 2 * count


MODEL = Manifest((Variable("v", "float32", (40,)), Variable("w", "float64", (3,))), 16)


def shards(count: int, job: bytes = JOB, placement: str = "balanced") -> Sequence[Manifest]:
    return place(MODEL, count, placement, job)


@pytest.mark.parametrize(
    ("manifests", "named"),
    [
        (shards(3)[:2], ["ps0:2222", "shard 0 of 3", "2 addresses"]),
        (shards(3)[:1], ["ps0:2222", "shard 0 of 3", "1 address"]),
        ((shards(2)[1], shards(2)[0]), ["ps0:2222", "shard 1 of 2", "number 0", "order"]),
        ((shards(2)[0], shards(2, OTHER_JOB)[1]), ["ps1:2222", JOB.hex()[:8], OTHER_JOB.hex()[:8]]),
        ((shards(2)[0], MODEL), ["ps1:2222", "whole model", "2 addresses"]),
        ((MODEL, shards(2)[1]), ["ps0:2222", "whole model"]),
        ((shards(2)[0], shards(2, JOB, "round_robin")[1]), ["'v'", "from 24 on"]),
    ],
)
def test_servers_that_do_not_belong_together_are_refused_by_name(
    manifests: Sequence[Manifest], named: list[str]
) -> None:
    with pytest.raises(ConflictError) as refused:
        assemble(manifests, addresses(len(manifests)))
    assert refused.value.reason is Reason.MANIFEST_MISMATCH
    for part in named:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "shard"),
    [
        (Variable("w", "float32", (4,)), Shard(0, 2, JOB)),
        (Variable("w", "float32", (4,), Part(0, 0, (4,))), None),
    ],
)
def test_parts_and_shards_go_together(variable: Variable, shard: Shard | None) -> None:
    with pytest.raises(InvalidRequestError, match="part"):
        Manifest((variable,), 8, shard)


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((4,), Part(0, 1, (4,))),
        ((4,), Part(0, 0, (3,))),
        ((0,), Part(0, 0, (3,))),
        ((2, 2), Part(0, 0, (2, 4))),
        ((2,), Part(0, -1, (4,))),
        ((2,), Part(0, 0, (-2,))),
    ],
)
def test_what_is_no_part_of_the_whole_is_refused(shape: tuple[int, ...], part: Part) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        Variable("w", "float32", shape, part)
    assert refused.value.reason is Reason.MANIFEST_INVALID
    assert "'w'" in str(refused.value)


def test_parts_come_in_ascending_order() -> None:
    variables = tuple(Variable(name, "float32", (), Part(1, 0, ())) for name in "vw")
    with pytest.raises(InvalidRequestError, match="number 1, after 1"):
        Manifest(variables, 8, Shard(0, 2, JOB))


@pytest.mark.parametrize(
    ("index", "count", "job"), [(2, 2, JOB), (-1, 2, JOB), (0, 4097, JOB), (0, 0, JOB), (0, 2, b"")]
)
def test_an_impossible_shard_is_refused(index: int, count: int, job: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        Shard(index, count, job)


def test_an_unknown_placement_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"'best'.*balanced, round_robin"):
        place(MODEL, 2, "best", JOB)


@given(st.integers(0, 2**50), st.integers(1, 64))
def test_the_default_fragment_size_fits_any_model_and_feeds_every_shard(size_bytes: int, count: int) -> None:
    fragment = default_fragment_size_bytes(size_bytes, count)
    assert fragment % 8 == 0
    if count > 1:
        assert size_bytes <= fragment * MAX_FRAGMENTS
        assert size_bytes < 8 * count * 2 or size_bytes / fragment > count / 2
