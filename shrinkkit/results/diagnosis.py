"""Causes why a variant is slower, or less fast than its reduction of work suggests, from its per-layer latency."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import LayerTime
from shrinkkit.core.variant import LayerAudit
from shrinkkit.display import formats

NOTABLE = 0.1
"""Fraction of a variant's latency from which on a part of it is named."""
EXCESS, LONGER = 0.05, 1.1
"""A part that takes longer is named if it adds this fraction of the latency, and a layer if by this factor."""
BLOCKS = (8, 16)
"""Channels that kernels for vectors of 256 and 512 bits compute at a time."""

_NAMED = 3
_ZEROS, _CONTRADICTION = 0.3, 1.25
_Causes = Iterator[tuple[float, str]]
"""Sentences, each with the ms that it is about."""


def slow_down(
    baseline: Sequence[LayerTime],
    variant: Sequence[LayerTime],
    audit: Sequence[LayerAudit],
    *,
    runtime: str,
    denormals: int,
    speedup: Estimate,
    verdict: str,
) -> tuple[str, ...]:
    """Return the causes of a slow variant in sentences, the largest first; empty if the times show none.

    `runtime` is that of both files, `speedup` and `verdict` are those of their paired timing.
    """
    if verdict == "too noisy" or not total_ms(baseline) or not total_ms(variant):
        return ()
    pair = _Pair(baseline, variant, {row.layer: row for row in audit}, runtime, speedup)
    causes = [*_conversions(pair), *_in_float(pair)]
    if not (warning := _contradiction(pair)):
        causes += [*_slower(pair), *_zeros(pair), *_between(pair)]
    sentences = [sentence for _, sentence in sorted(causes, key=lambda cause: -cause[0])]
    if denormals:
        count = f"{denormals:,} denormal numbers"
        sentences.append(f"Weights and layer outputs contain {count}, which are several times slower on some CPUs.")
    return (*sentences, *warning)


def total_ms(times: Sequence[LayerTime]) -> float:
    """Return the sum of operator times."""
    return sum(time.ms for time in times)


@dataclass(frozen=True)
class _Pair:
    """The times of two files, and the layer report between them."""

    baseline: Sequence[LayerTime]
    variant: Sequence[LayerTime]
    audit: Mapping[str, LayerAudit]
    runtime: str
    speedup: Estimate

    @property
    def scale(self) -> float:
        """Divisor of the variant's times where their sum exceeds what the paired timing allows."""
        return max(1.0, self.speedup.value / (total_ms(self.baseline) / self.total))

    @property
    def total(self) -> float:
        return total_ms(self.variant)

    @property
    def after(self) -> dict[str, float]:
        """Time of each layer of the audit in the variant, without conversions."""
        return self._by_layer(self.variant)

    @property
    def before(self) -> dict[str, float]:
        """The same in the baseline; a layer that was fused into the one before it counts there."""
        before, after = self._by_layer(self.baseline), self.after
        kept: Iterator[str] = accumulate(before, lambda last, name: name if name in after else last)
        return _sums(zip(kept, before.values(), strict=True))

    def _by_layer(self, times: Sequence[LayerTime]) -> dict[str, float]:
        return _sums((time.layer, time.ms) for time in times if time.layer in self.audit and not time.converts)

    def outside(self, times: Sequence[LayerTime]) -> list[LayerTime]:
        """Operators in no layer of the audit, without conversions."""
        return [time for time in times if time.layer not in self.audit and not time.converts]

    def runs_as(self, layer: str) -> str:
        """Number format in which the runtime computes `layer`, '' if unknown."""
        precision = self.audit[layer].precision.get(self.runtime)
        return precision.runs_as if precision else ""


def _sums(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, ms in times:
        sums[name] += ms
    return sums


def _conversions(pair: _Pair) -> _Causes:
    converting = [time for time in pair.variant if time.converts]
    ms, before = total_ms(converting), total_ms([time for time in pair.baseline if time.converts])
    if ms >= NOTABLE * pair.total and ms > LONGER * before:
        text = f"Conversions of number formats and memory layouts take {_of(ms, pair)}, {_ms(before)} in the baseline"
        yield ms - before, f"{text}: {_operators(converting)}."


def _slower(pair: _Pair) -> _Causes:
    """Yield layers that take longer than before, though no layer of a variant has more work."""
    before, after = pair.before, pair.after
    excess = {name: after[name] / pair.scale - before[name] for name in after if name in before}
    partial = [name for name in excess if _has_partial_blocks(pair.audit[name]) and excess[name] >= 0]
    least = EXCESS * pair.total / max(1, len(after))
    longer = [n for n in excess if n not in partial and excess[n] > max(least, (LONGER - 1) * before[n])]
    for names, kind in ((partial, _PARTIAL), (longer, "longer than before, with no more work")):
        names.sort(key=lambda name: -excess[name])
        more, taken = sum(excess[name] for name in names), sum(after[name] for name in names)
        if more >= EXCESS * pair.total or (names is partial and taken >= NOTABLE * pair.total):
            details = "; ".join(_compared(name, before[name], after[name], pair) for name in names[:_NAMED])
            rest = f"; and {formats.counted(len(names) - _NAMED, 'more layer')}" if len(names) > _NAMED else ""
            which = "This layer takes" if len(names) == 1 else f"These {len(names)} layers take"
            yield more, f"{which} {kind}: {details}{rest}."


_PARTIAL = (
    "no less time with fewer channels, because kernels compute blocks of 8 or 16 channels and the last block is now "
    "partly empty; the next multiple need not cost more"
)


def _has_partial_blocks(row: LayerAudit) -> bool:
    """Return whether a layer lost channels so that they no longer fill whole blocks."""
    now, before = row.channels or 0, row.channels_before or 0
    return now < before and any(now % block and not before % block for block in BLOCKS)


def _compared(name: str, before: float, after: float, pair: _Pair) -> str:
    row = pair.audit[name]
    pruned = row.lost_channels
    now, was = (f" with {row.channels} channels", f" with {row.channels_before}") if pruned else ("", "")
    runs_as = pair.runs_as(name)
    number_format = f" in {runs_as}" if runs_as not in ("", "float32") else ""
    return f"{name} takes {_ms(after)}{number_format}{now}, {_ms(before)} before{was}"


def _in_float(pair: _Pair) -> _Causes:
    """Yield reasons why layers of an int8 variant run in float."""
    if not any(pair.runs_as(name) == "int8" for name in pair.audit):
        return
    floats = {name: ms for name, ms in pair.after.items() if pair.runs_as(name) not in ("", "int8", "folded")}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in sorted(floats, key=lambda name: -floats[name]):
        reasons[pair.audit[name].precision[pair.runtime].why].append(name)
    for reason, names in reasons.items():
        ms = sum(floats[name] for name in names)
        if ms >= NOTABLE * pair.total:
            verbs = ("runs", "takes") if len(names) == 1 else ("run", "take")
            layers = f"{formats.counted(len(names), 'layer')} of an int8 variant {verbs[0]} in {pair.runs_as(names[0])}"
            yield ms, f"{layers} and {verbs[1]} {_of(ms, pair)}: {_listed(names)}{f' ({reason})' if reason else ''}."


def _zeros(pair: _Pair) -> _Causes:
    rows = [row for row in pair.audit.values() if row.zeroed >= _ZEROS and row.channels == row.channels_before]
    names = [row.layer for row in rows if row.layer in pair.after and row.layer in pair.before]
    ms, before = sum(pair.after[name] for name in names), sum(pair.before[name] for name in names)
    if ms >= NOTABLE * pair.total and ms >= before / LONGER:
        weights = sum(row.parameters for row in rows)
        fraction = sum(row.zeroed * row.parameters for row in rows) / weights if weights else rows[0].zeroed
        text = f"{formats.percent(fraction)} of the weights of {formats.counted(len(names), 'layer')} are zero, but the"
        yield ms, f"{text} kernels are dense: these layers take {_ms(ms)}, {_ms(before)} before."


def _between(pair: _Pair) -> _Causes:
    """Yield operators outside the layers if they take longer than before."""
    outside, known = pair.outside(pair.variant), pair.outside(pair.baseline)
    ms, before = total_ms(outside), total_ms(known)
    if ms >= NOTABLE * pair.total and ms / pair.scale - before >= EXCESS * pair.total:
        new = [time for time in outside if time.operator not in {old.operator for old in known}]
        added = f"; new: {_operators(new)}" if total_ms(new) >= EXCESS * pair.total else ""
        yield ms - before, f"Operators outside the layers take {_of(ms, pair)}, {_ms(before)} before{added}."


def _contradiction(pair: _Pair) -> list[str]:
    """Return a warning where the layers' times are too far from the paired timing to compare them."""
    by_layers = total_ms(pair.baseline) / pair.total
    if abs(math.log(by_layers / pair.speedup.value)) < math.log(_CONTRADICTION):
        return []
    before = _ms(total_ms(pair.baseline))
    text = f"Layer times add up to {_ms(pair.total)}, {before} before: {formats.times(by_layers)},"
    rest = f"not the {formats.times(pair.speedup.value)} of the paired timing, so they are not compared. The difference"
    return [f"{text} {rest} is spent between operators, or other processes disturbed one of the two."]


def _of(ms: float, pair: _Pair) -> str:
    """Return a time and the total: `0.31 ms of 1.2 ms (26.0 %)`."""
    return f"{_ms(ms)} of {_ms(pair.total)} ({formats.percent(ms / pair.total)})"


def _ms(value: float) -> str:
    return formats.milliseconds(value) if value >= 0.001 else "0 ms"


def _operators(times: Sequence[LayerTime]) -> str:
    sums = _sums((time.operator, time.ms) for time in times)
    return _listed([f"{name} {_ms(sums[name])}" for name in sorted(sums, key=lambda name: -sums[name])])


def _listed(names: Sequence[str]) -> str:
    rest = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
