"""Settings and strategies of the property tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from modelaverage.manifest import DTYPES, Manifest, Variable

__all__ = ["fast", "manifests", "thorough"]

# Derandomized, so that a test that passes once always passes, on every machine.
fast = settings(derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(fast, max_examples=200)


FROZEN_DIGESTS = st.sampled_from([b"", b"digests1", b"digests2"])
"""What chiefs say of parameters that are not trained."""


def manifests(min_elements: int = 0) -> st.SearchStrategy[Manifest]:
    """Small manifests of all dtypes, with scalars and empty variables, cut into few or many fragments."""
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    kinds = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=5)
    return st.builds(
        lambda kinds, size_bytes, frozen_digests: Manifest(
            tuple(Variable(f"v{number}", dtype, shape) for number, (dtype, shape) in enumerate(kinds)),
            size_bytes,
            frozen_digests=frozen_digests,
        ),
        kinds,
        st.sampled_from([8, 16, 24, 64, 4096]),
        FROZEN_DIGESTS,
    ).filter(lambda manifest: sum(variable.size for variable in manifest.variables) >= min_elements)
