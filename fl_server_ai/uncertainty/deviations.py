"""Low-rank SWAG across clients: from everybody's deviations to K columns of one covariance, block by block.

Per client a column is w - mean at some step (arXiv:1902.02476); D D^T / (columns - 1) is their covariance.
The clients' mixture has the covariance C C^T, exactly, for the columns

    within   sqrt(s_k / (K_k - 1)) D_k   of each client that sent deviations, s_k its share of their samples
    between  sqrt(w_k) (mean_k - mean)   of every client, w_k its share of all samples

and `variance` says which of the two are in C, as for the diagonal. Up to `rank` columns are kept as they are. Of more
the `rank` directions with the largest variance are: C U, with U the first eigenvectors of C^T C, which is the
nearest matrix of that rank. That needs no seed, does not depend on the order of the clients but by rounding, and C is
never in memory: two passes over blocks of numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_server_ai.aggregation.statistics import is_statistic

Array = np.ndarray[Any, Any]
BLOCK = 1 << 20  # float64 numbers of all columns together


@dataclass(frozen=True)
class Client:
    """Arrays by tensor name, perhaps memory-mapped: `mean` of shape (n,), `columns` of (K_k, n) or None."""

    num_examples: float
    mean: Mapping[str, Array]
    columns: Mapping[str, Array] | None

    def rank(self, name: str) -> int:
        return 0 if self.columns is None else len(self.columns[name])


class LowRank:
    """K columns, scaled so that D D^T / (K - 1) is the mixture's covariance, or as near to it as K allows.

    At least one client must have sent deviations. `kept` is the share of the spread (the trace of the
    covariance, without BatchNorm's statistics) that the columns hold; `given` how many there were.
    """

    def __init__(
        self, clients: Sequence[Client], names: Sequence[str], *, rank: int, variance: str
    ) -> None:
        self._clients = clients
        self._between = variance != "within" and len(clients) > 1  # one is where the mean is
        total = sum(client.num_examples for client in clients)
        senders = sum(client.num_examples for client in clients if client.columns is not None)
        self._shares = [client.num_examples / total for client in clients]
        self._within = [
            client.num_examples / senders
            if client.columns is not None and variance != "between"
            else 0.0
            for client in clients
        ]
        self.given = sum(c.rank(names[0]) for c, w in zip(clients, self._within, strict=True) if w)
        self.given += len(clients) if self._between else 0
        self.columns = max(2, min(self.given, rank))
        self.kept = 1.0
        if not self.given:  # the spread between clients, and only one of them
            self.given = 1
        self._mix = np.eye(self.given, self.columns)
        if self.given > self.columns:
            self._reduce(names)
        self._mix *= np.sqrt(self.columns - 1)

    def blocks(self, name: str) -> Iterator[tuple[int, Array]]:
        """Of one tensor: where each block starts, and its columns, float64 of shape (columns, block)."""
        for start, raw in self._raw(name):
            yield start, self._mix.T @ raw

    def _reduce(self, names: Sequence[str]) -> None:
        gram = np.zeros((self.given, self.given))
        for name in names:
            if not is_statistic(name):  # never drawn
                for _, raw in self._raw(name):
                    gram += raw @ raw.T
        values, vectors = np.linalg.eigh(gram)
        first = vectors[:, ::-1][:, : self.columns]
        # Eigenvectors have no sign of their own.
        first = first * np.sign(first[np.abs(first).argmax(axis=0), np.arange(self.columns)])
        self._mix = first
        spread = float(values.sum())
        if spread > 0:
            self.kept = min(1.0, float(values[::-1][: self.columns].sum()) / spread)

    def _raw(self, name: str) -> Iterator[tuple[int, Array]]:
        size = self._clients[0].mean[name].shape[0]
        step = max(1, BLOCK // self.given)
        for start in range(0, size, step):
            yield start, self._block(name, slice(start, min(start + step, size)))

    def _block(self, name: str, part: slice) -> Array:
        raw = np.zeros((self.given, part.stop - part.start))
        row = 0
        for client, share in zip(self._clients, self._within, strict=True):
            if share and client.columns is not None:
                own = client.columns[name][:, part]
                np.multiply(own, np.sqrt(share / (len(own) - 1)), out=raw[row : row + len(own)])
                row += len(own)
        if self._between:
            means = raw[row:]
            for place, client in enumerate(self._clients):
                means[place] = client.mean[name][part]
            means -= np.asarray(self._shares) @ means
            means *= np.sqrt(self._shares)[:, None]
        return raw
