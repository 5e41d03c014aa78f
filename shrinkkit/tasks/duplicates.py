"""Duplicate and near-duplicate examples, between splits and within one."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shrinkkit.tasks.modules import Example, raw_bytes

NEAR = 1e-3
"""Examples whose values differ by less than this fraction of their spread over the data are near duplicates."""
NEAR_FEW, FEW = 1e-5, 16
"""The same for examples of fewer numbers than `FEW`, whose neighbours are close by chance."""

_POSITIONS, _PROJECTED, _PROJECTIONS = 64, 4096, 16
_DIRECTIONS, _WINDOW = 4, 8


class Sketches:
    """A hash of each example, and a few numbers that near duplicates share: 400 bytes an example, O(n log n)."""

    def __init__(self, example: Example) -> None:
        """Prepare for examples of the shapes of `example`, a batch."""
        self.splits: list[str] = []
        self.hashes: list[bytes] = []
        self._others: list[bytes] = []
        self._numbers: list[NDArray[np.float32]] = []
        self.values = sum(x[0].numel() for x in example if x.is_floating_point())
        draw = np.random.default_rng(0)
        self._raw = np.sort(draw.permutation(self.values)[:_POSITIONS])
        self._chosen = np.sort(draw.permutation(self.values)[:_PROJECTED])
        many = self.values > _POSITIONS
        self._matrix = draw.standard_normal((len(self._chosen), _PROJECTIONS * many)).astype(np.float32)

    def add(self, split: str, inputs: Sequence[torch.Tensor]) -> None:
        """Add one example of `split`."""
        self.splits.append(split)
        self.hashes.append(hashlib.sha256(b"".join(map(raw_bytes, inputs))).digest())
        others = [raw_bytes(x) for x in inputs if not x.is_floating_point()]
        self._others.append(hashlib.sha256(b"".join(others)).digest()[:8])
        floats = [x.detach().float().flatten().numpy() for x in inputs if x.is_floating_point()]
        flat = np.concatenate(floats) if floats else np.zeros(0, np.float32)
        flat = flat if len(flat) == self.values else np.resize(flat, self.values)
        with np.errstate(all="ignore"):
            projected = flat[self._chosen] @ self._matrix
        self._numbers.append(np.concatenate([flat[self._raw], projected]))

    def equal(self) -> Counter[tuple[str, str]]:
        """Return the number of equal examples by pair of splits."""
        owner: dict[bytes, str] = {}
        shared: Counter[tuple[str, str]] = Counter()
        for split, digest in dict.fromkeys(zip(self.splits, self.hashes, strict=True)):
            first = owner.setdefault(digest, split)
            shared[first, split] += first != split
        return +shared

    def near(self) -> Counter[tuple[str, str]]:
        """Return the number of examples of the second split near one of the first, by pair of splits.

        For examples of few numbers, a pair counts only if half of its smaller split is near the other.
        """
        sizes = Counter(self.splits)
        seen = {(self.splits[min(i, j)], max(i, j)) for i, j in self._pairs() if self.splits[i] != self.splits[j]}
        shared = Counter((first, self.splits[other]) for first, other in seen)
        least = 0.5 if self.values < FEW else 0.0
        return Counter({pair: n for pair, n in shared.items() if n >= least * min(map(sizes.__getitem__, pair))})

    def repeats(self, split: str) -> int:
        """Return the number of examples of `split` that are duplicates or near duplicates of an earlier one."""
        places = {i: place for place, i in enumerate(i for i, name in enumerate(self.splits) if name == split)}
        first: dict[bytes, int] = {}
        pairs = [(first.setdefault(self.hashes[i], i), i) for i in places] + [*self._pairs()]
        alike = [(places[i], places[j]) for i, j in pairs if i in places and j in places]
        rows, columns = zip(*alike, strict=True)
        graph = coo_array((np.ones(len(alike)), (rows, columns)), shape=(len(places), len(places)))
        return len(places) - int(connected_components(graph, directed=False)[0])

    def _pairs(self) -> set[tuple[int, int]]:
        """Return pairs of examples whose sketches are nearer to each other than `NEAR`."""
        table = np.asarray(self._numbers, np.float64)
        if not self.values or len(table) < 2:
            return set()
        table = np.nan_to_num(table, posinf=0.0, neginf=0.0)
        table -= np.median(table, axis=0)
        # A few outliers must not make all others look alike.
        kept = np.sort(np.abs(table), axis=0)[: -max(1, len(table) // 100)]
        spread = np.sqrt(np.mean(kept**2, axis=0))
        varied = spread[spread > 0]
        if not varied.size:
            return set()
        # A number that is constant but for noise must not be magnified.
        table /= np.maximum(spread, 1e-2 * np.median(varied))
        others = np.frombuffer(b"".join(self._others), np.uint64)
        limit = NEAR_FEW if self.values < FEW else NEAR
        pairs: set[tuple[int, int]] = set()
        for direction in np.random.default_rng(1).standard_normal((_DIRECTIONS, table.shape[1])):
            order = np.argsort(table @ direction, kind="stable")
            for shift in range(1, min(_WINDOW, len(order) - 1) + 1):
                left, right = order[:-shift], order[shift:]
                distance = np.sqrt(np.mean((table[left] - table[right]) ** 2, axis=1))
                close = (distance <= limit) & (others[left] == others[right])
                pairs |= set(zip(left[close].tolist(), right[close].tolist(), strict=True))
        return pairs
