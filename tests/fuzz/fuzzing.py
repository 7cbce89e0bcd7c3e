"""How many inputs a fuzz test tries, and values that files and servers may hold.

    SAE_RAY_FUZZ_EXAMPLES=100000 .venv/bin/python -m pytest tests/fuzz

spreads so many inputs over all tests, drawn anew. Without it each run tries the same few thousand.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_IN_THE_SUITE = 3000
_ASKED = os.environ.get("SAE_RAY_FUZZ_EXAMPLES")


def tries(share: float) -> settings:
    """Settings of a test that tries this share of all inputs."""
    return settings(
        max_examples=max(10, int(int(_ASKED or _IN_THE_SUITE) * share)),
        derandomize=_ASKED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, 0.5]),
)
WORDS = st.one_of(
    st.sampled_from(["", "auto", "none", "topk", "k", "index", "..", "../x", "s3://b/p", "http://h/v1", "\0", "\x1b"]),
    st.text(max_size=20),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
# What JSON can hold, with the infinities, NaN and half surrogates that Python's reader lets through.
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)
