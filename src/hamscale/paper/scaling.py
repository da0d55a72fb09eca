"""Model the time of a step on P ranks from exact counts of a partition and four measured constants.

The results are modelled, never measured. A rank's time is compute + pack + exchange + unpack: its edges over the message rate
at that number of edges; the bytes sent and received over the rates of packing and unpacking; and per exchange latency x
neighbours + max(bytes sent, received) / bandwidth. The step takes as long as the slowest rank.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    messages, messages_per_second: numbers of edges, ascending, and the rate of one layer's node and edge update at each of
    them; between them the time, not the rate, is interpolated; above the last the rate is constant. pack_bytes_s: rate of
    gathering rows into a send buffer. unpack_bytes_s: rate of copying received rows behind a rank's own features. latency_s:
    latency of a message. bandwidth_bytes_s: bandwidth of one rank's link in one direction. source: where the numbers come from.
    """

    name: str
    messages: tuple[float, ...]
    messages_per_second: tuple[float, ...]
    pack_bytes_s: float
    latency_s: float
    bandwidth_bytes_s: float
    source: str = ""
    unpack_bytes_s: float = np.inf

    def compute_s(self, edges: ArrayLike) -> np.ndarray:
        """Return the seconds of one layer."""
        edges = np.asarray(edges, float)
        known = np.array(self.messages) / np.array(self.messages_per_second)
        last = np.interp(edges, [0, *self.messages], [known[0], *known])
        return np.where(edges > self.messages[-1], edges / self.messages_per_second[-1], last)


def per_rank(counts: dict, machine: Machine, layers: int, embedding_bytes: int, exchanges: int | None = None) -> pd.DataFrame:
    """Return the seconds of one forward pass by rank: compute_s, pack_s, exchange_s, unpack_s.

    The table also has sent_bytes and received_bytes. counts: neighbours, sent, received, edges, (ranks,) each, as
    Partition.per_rank() gives them. exchanges: number of exchanges per pass, by default one per layer.
    """
    n = exchanges or layers
    sent, received = (np.asarray(counts[name], float) * embedding_bytes for name in ("sent", "received"))
    exchange = machine.latency_s * np.asarray(counts["neighbours"]) + np.maximum(sent, received) / machine.bandwidth_bytes_s
    return pd.DataFrame(
        {
            "sent_bytes": sent * n,
            "received_bytes": received * n,
            "compute_s": layers * machine.compute_s(counts["edges"]),
            "pack_s": n * sent / machine.pack_bytes_s,
            "exchange_s": n * exchange,
            "unpack_s": n * received / machine.unpack_bytes_s,
        }
    )


def step_seconds(ranks: pd.DataFrame) -> float:
    """Return the time of the slowest rank in seconds."""
    return float(ranks[["compute_s", "pack_s", "exchange_s", "unpack_s"]].sum(axis=1).max())


def efficiency(table: pd.DataFrame, mode: str) -> pd.Series:
    """Return the efficiency of rows (ranks, seconds) relative to the first one.

    It is t0 p0 / (t p) in the mode "strong" and t0 / t otherwise ("weak").
    """
    first = table.iloc[0]
    ratio = first["seconds"] / table["seconds"]
    return ratio * first["ranks"] / table["ranks"] if mode == "strong" else ratio
