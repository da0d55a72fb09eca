"""Time of a step on P ranks from exact counts of a partition and four measured constants. What comes out is modelled, never measured.

A rank's time is compute + pack + exchange + unpack: its edges over the message rate at that number of edges; bytes sent and received
over the rates of packing and unpacking; and per exchange latency x neighbours + max(bytes sent, received) / bandwidth. The step takes
what the slowest rank takes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    messages, messages_per_second: numbers of edges and the rate of one layer's node and edge update at each, ascending; between
    them the time, not the rate, is interpolated; above the last the rate stays. pack_bytes_s: gathering rows into a send buffer.
    unpack_bytes_s: copying what was received behind the own features; latency_s: per message. bandwidth_bytes_s: of one rank's link,
    one way. source: where they are from.
    """

    name: str
    messages: tuple[float, ...]
    messages_per_second: tuple[float, ...]
    pack_bytes_s: float
    latency_s: float
    bandwidth_bytes_s: float
    source: str = ""
    unpack_bytes_s: float = np.inf

    def compute_s(self, edges) -> np.ndarray:
        """Seconds of one layer."""
        edges = np.asarray(edges, float)
        known = np.array(self.messages) / np.array(self.messages_per_second)
        last = np.interp(edges, [0, *self.messages], [known[0], *known])
        return np.where(edges > self.messages[-1], edges / self.messages_per_second[-1], last)


def per_rank(counts: dict, machine: Machine, layers: int, embedding_bytes: int, exchanges: int | None = None) -> pd.DataFrame:
    """Seconds of one forward pass by rank: compute_s, pack_s, exchange_s, unpack_s.

    counts: neighbours, sent, received, edges, (ranks,) each, as Partition.per_rank() gives them. exchanges: per pass, default one
    per layer.
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
    """Of the slowest rank."""
    return float(ranks[["compute_s", "pack_s", "exchange_s", "unpack_s"]].sum(axis=1).max())


def efficiency(table: pd.DataFrame, mode: str) -> pd.Series:
    """Of rows (ranks, seconds), against the first: strong, t0 p0 / (t p); weak, t0 / t."""
    first = table.iloc[0]
    ratio = first["seconds"] / table["seconds"]
    return ratio * first["ranks"] / table["ranks"] if mode == "strong" else ratio
