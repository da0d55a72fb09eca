"""The cost model by hand."""

import numpy as np
import pandas as pd
import pytest

from hamscale.paper.scaling import Machine, efficiency, per_rank, step_seconds

MACHINE = Machine("m", (100, 1000), (1e3, 1e4), pack_bytes_s=1e6, latency_s=1e-3, bandwidth_bytes_s=1e5)


def test_time_of_a_rank_is_compute_pack_and_exchange():
    counts = {"neighbours": [2, 1], "sent": [10, 20], "received": [30, 5], "edges": [1000, 2000]}
    table = per_rank(counts, MACHINE, layers=3, embedding_bytes=100)
    np.testing.assert_allclose(table["compute_s"], [3 * 0.1, 3 * 0.2])
    np.testing.assert_allclose(table["pack_s"], [3 * 1000 / 1e6, 3 * 2000 / 1e6])
    np.testing.assert_allclose(table["exchange_s"], [3 * (2e-3 + 3000 / 1e5), 3 * (1e-3 + 2000 / 1e5)])
    assert step_seconds(table) == pytest.approx(0.6 + 0.006 + 0.063)
    np.testing.assert_allclose(table["sent_bytes"], [3000, 6000])


def test_exchanges_may_be_other_than_one_per_layer():
    counts = {"neighbours": [2], "sent": [10], "received": [30], "edges": [1000]}
    one, two = (per_rank(counts, MACHINE, 3, 100, n) for n in (3, 6))
    assert two["exchange_s"][0] == pytest.approx(2 * one["exchange_s"][0])
    assert two["compute_s"][0] == one["compute_s"][0]


def test_few_messages_take_the_time_of_the_fewest_measured_and_many_the_last_rate():
    np.testing.assert_allclose(MACHINE.compute_s([10, 100, 1000, 5000]), [0.1, 0.1, 0.1, 0.5])


def test_efficiency():
    table = pd.DataFrame({"ranks": [1, 2, 4], "seconds": [8.0, 5.0, 4.0]})
    np.testing.assert_allclose(efficiency(table, "strong"), [1, 0.8, 0.5])
    np.testing.assert_allclose(efficiency(table, "weak"), [1, 1.6, 2])
