"""Examples that equal others, or all but equal them: between splits, and within one."""

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
"""Examples whose values differ by less than this share of their spread over the data are near duplicates."""
NEAR_FEW, FEW = 1e-5, 16
"""The same for examples of fewer numbers than the second, whose neighbours are close by chance."""

_POSITIONS, _PROJECTED, _PROJECTIONS = 64, 4096, 16
_DIRECTIONS, _WINDOW = 4, 8


class Sketches:
    """What is kept of each example of a task: a hash, and a few numbers that near duplicates share.

    It holds about 400 bytes an example, and compares n of them in n log n.
    """

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
        """Take note of one example of `split`."""
        self.splits.append(split)
        self.hashes.append(hashlib.sha256(b"".join(map(raw_bytes, inputs))).digest())
        others = [raw_bytes(x) for x in inputs if not x.is_floating_point()]
        self._others.append(hashlib.sha256(b"".join(others)).digest()[:8])
        floats = [x.detach().float().flatten().numpy() for x in inputs if x.is_floating_point()]
        flat = np.concatenate(floats) if floats else np.zeros(0, np.float32)
        with np.errstate(all="ignore"):
            projected = flat[self._chosen] @ self._matrix
        self._numbers.append(np.concatenate([flat[self._raw], projected]))

    def equal(self) -> Counter[tuple[str, str]]:
        """Return how many examples are the same in two splits, by the names of both, the first in order first."""
        owner: dict[bytes, str] = {}
        shared: Counter[tuple[str, str]] = Counter()
        for split, digest in dict.fromkeys(zip(self.splits, self.hashes, strict=True)):
            first = owner.setdefault(digest, split)
            shared[first, split] += first != split
        return +shared

    def near(self) -> Counter[tuple[str, str]]:
        """Return how many examples of the second split are near duplicates of one in the first, by both names.

        Of examples of few numbers, two splits count only if half of the smaller one is near the other.
        """
        sizes = Counter(self.splits)
        seen = {(self.splits[min(i, j)], max(i, j)) for i, j in self._pairs() if self.splits[i] != self.splits[j]}
        shared = Counter((first, self.splits[other]) for first, other in seen)
        least = 0.5 if self.values < FEW else 0.0
        return Counter({pair: n for pair, n in shared.items() if n >= least * min(map(sizes.__getitem__, pair))})

    def repeats(self, split: str) -> int:
        """Return how many examples of `split` equal an earlier one of it, or all but equal it."""
        own = {i: place for place, i in enumerate(i for i, name in enumerate(self.splits) if name == split)}
        first: dict[bytes, int] = {}
        pairs = [(first.setdefault(self.hashes[i], i), i) for i in own] + [*self._pairs()]
        alike = [(own[i], own[j]) for i, j in pairs if i in own and j in own]
        rows, columns = zip(*alike, strict=True)
        graph = coo_array((np.ones(len(alike)), (rows, columns)), shape=(len(own), len(own)))
        return len(own) - int(connected_components(graph, directed=False)[0])

    def _pairs(self) -> set[tuple[int, int]]:
        """Return pairs of examples that are nearer to each other than `NEAR`, as their sketches tell."""
        table = np.asarray(self._numbers, np.float64)
        if not self.values or len(table) < 2:
            return set()
        table = np.nan_to_num(table, posinf=0.0, neginf=0.0)
        table -= np.median(table, axis=0)
        # An example or two far off must not make all others look alike.
        kept = np.sort(np.abs(table), axis=0)[: -max(1, len(table) // 100)]
        spread = np.sqrt(np.mean(kept**2, axis=0))
        varied = spread[spread > 0]
        if not varied.size:
            return set()
        # A number that is the same everywhere but for noise is not to be magnified.
        table /= np.maximum(spread, 1e-2 * np.median(varied))
        others = np.frombuffer(b"".join(self._others), np.uint64)
        limit = NEAR_FEW if self.values < FEW else NEAR
        found: set[tuple[int, int]] = set()
        for direction in np.random.default_rng(1).standard_normal((_DIRECTIONS, table.shape[1])):
            order = np.argsort(table @ direction, kind="stable")
            for shift in range(1, min(_WINDOW, len(order) - 1) + 1):
                left, right = order[:-shift], order[shift:]
                distance = np.sqrt(np.mean((table[left] - table[right]) ** 2, axis=1))
                close = (distance <= limit) & (others[left] == others[right])
                found |= set(zip(left[close].tolist(), right[close].tolist(), strict=True))
        return found
