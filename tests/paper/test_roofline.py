"""The model of a pass on a GPU, against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from hamscale.paper.roofline import LAUNCH_SECONDS, MESSAGES, Gpu, by_kind, rates

GPU = Gpu("a", bandwidth=1e12, tf32=1e14, bf16=2e14)


def passes():
    """Two operations: of 1,000 bytes an edge, and of 2e6 FLOP an edge in bfloat16, beside weights of 500 bytes."""
    table = lambda n: pd.DataFrame(  # noqa: E731
        {"kind": ["gather", "product"], "bytes": [1000 * n, 500], "flop": [0, 2_000_000 * n], "short": [False, True]}
    )
    return (10, table(10)), (30, table(30))


def test_an_operation_takes_the_longer_of_its_bytes_and_its_products():
    table = rates(*passes(), GPU)
    n = table["messages"].to_numpy()
    assert np.array_equal(n, MESSAGES)
    seconds = 1e-9 * n + np.maximum(500e-12, 1e-8 * n)
    np.testing.assert_allclose(table["without_launches"], n / seconds, rtol=1e-12)
    launched = np.maximum(1e-9 * n, LAUNCH_SECONDS) + np.maximum(1e-8 * n, LAUNCH_SECONDS)
    np.testing.assert_allclose(table["messages_per_second"], n / launched, rtol=1e-12)


def test_what_does_not_grow_with_edges_is_not_counted_per_edge():
    table = by_kind(*passes()).set_index("kind")
    assert table.loc["gather"].tolist() == [1, 1000, 0]
    assert table.loc["product"].tolist() == [1, 0, 2_000_000]


def test_passes_that_differ_are_refused():
    small, (many, large) = passes()
    with pytest.raises(ValueError, match="other operations"):
        by_kind(small, (many, large.assign(kind=["product", "gather"])))
