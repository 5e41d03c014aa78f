"""Why a variant is slower, or less fast than its work suggests: sentences with figures, from its times by layer.

Nothing is said that the figures do not carry, so there may be nothing to say.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import LayerTime
from shrinkkit.core.variant import LayerAudit
from shrinkkit.display import formats

NOTABLE = 0.1
"""Share of a variant's time from which a part of it is worth a sentence."""
EXCESS, LONGER = 0.05, 1.1
"""What must be added to a variant's time, as a share of it, and by what factor a part must take longer, to be told."""
BLOCKS = (8, 16)
"""Channels that kernels for vectors of 256 and 512 bits compute at a time."""

_NAMED = 3
_ZEROS = 0.3
_CONTRADICTION = 1.25


def hottest(times: Sequence[LayerTime], *, count: int = 5) -> tuple[tuple[str, float], ...]:
    """Return the layers that take most of the time, each with its share of it, the largest first.

    Args:
        times: Of one model file.
        count: Layers to return at most; what belongs to no layer is not among them.
    """
    of = _by_layer(times, lambda one: bool(one.layer))
    total = _sum(times) or 1.0
    return tuple((name, of[name] / total) for name in sorted(of, key=lambda name: -of[name])[:count])


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
    """Return what explains that a variant is slower, or less fast than its work suggests; what takes most comes first.

    Args:
        baseline: Times of the baseline's file on the target.
        variant: Times of the variant's.
        audit: What happened to each layer of the variant.
        runtime: Whose precision in the audit counts: `torch` or `onnxruntime`.
        denormals: Denormal numbers found in the variant's file.
        speedup: What the paired timing of the two says.
        verdict: Of that timing. Of one that is `too noisy` nothing is said, since there is nothing to explain.
    """
    if verdict == "too noisy" or not _sum(baseline) or not _sum(variant):
        return ()
    pair = _Pair(baseline, variant, {row.layer: row for row in audit}, runtime, speedup)
    found = [*_conversions(pair), *_in_float(pair)]
    if not (warning := _contradiction(pair)):
        found += [*_slower(pair), *_zeros(pair), *_between(pair)]
    sentences = [sentence for _, sentence in sorted(found, key=lambda one: -one[0])]
    return (*sentences, *_denormal(denormals), *warning)


@dataclass(frozen=True)
class _Pair:
    """The times of two files, and what happened to the layers between them."""

    baseline: Sequence[LayerTime]
    variant: Sequence[LayerTime]
    audit: Mapping[str, LayerAudit]
    runtime: str
    speedup: Estimate

    @property
    def scale(self) -> float:
        """What the variant's times are divided by where they claim more time, beside the baseline's, than it took."""
        return max(1.0, self.speedup.value / (_sum(self.baseline) / self.total))

    @property
    def total(self) -> float:
        return _sum(self.variant)

    @property
    def after(self) -> dict[str, float]:
        """Time of each layer of the audit in the variant, without conversions."""
        return _by_layer(self.variant, lambda one: one.layer in self.audit and not one.converts)

    @property
    def before(self) -> dict[str, float]:
        """The same in the baseline; a layer that became part of the one before it counts there."""
        found: dict[str, float] = {}
        last, after = "", self.after
        for name, ms in _by_layer(self.baseline, lambda one: one.layer in self.audit and not one.converts).items():
            last = name if name in after or not last else last
            found[last] = found.get(last, 0.0) + ms
        return found

    def runs_as(self, layer: str) -> str:
        """How the runtime computes `layer`, '' if the audit does not tell."""
        precision = self.audit[layer].precision.get(self.runtime)
        return precision.runs_as if precision else ""


_Found = list[tuple[float, str]]
"""Sentences, each with the ms that it is about."""


def _conversions(pair: _Pair) -> _Found:
    spent = [one for one in pair.variant if one.converts]
    ms, before = _sum(spent), _sum([one for one in pair.baseline if one.converts])
    if ms < NOTABLE * pair.total or ms <= LONGER * before:
        return []
    of = _by_operator(spent)
    return [
        (
            ms - before,
            f"Converting numbers between formats or memory layouts takes {_of(ms, pair)}, {_ms(before)} before: "
            f"{_listed(of)}.",
        )
    ]


def _slower(pair: _Pair) -> _Found:
    """Return what is to be said of layers that take longer than before, though no layer of a variant has more work."""
    before, after = pair.before, pair.after
    excess = {name: after[name] / pair.scale - before[name] for name in after if name in before}
    odd = [name for name in excess if _is_odd(pair.audit[name]) and excess[name] >= 0]
    least = EXCESS * pair.total / max(1, len(after))
    longer = [n for n in excess if n not in odd and excess[n] > max(least, (LONGER - 1) * before[n])]
    found: _Found = []
    for names, kind in ((odd, _ODD), (longer, _LONGER)):
        names.sort(key=lambda name: -excess[name])
        more, taken = sum(excess[name] for name in names), sum(after[name] for name in names)
        if more >= EXCESS * pair.total or (names is odd and taken >= NOTABLE * pair.total):
            said = "; ".join(_compared(name, before[name], after[name], pair) for name in names[:_NAMED])
            rest = f"; and {formats.counted(len(names) - _NAMED, 'more layer')}" if len(names) > _NAMED else ""
            which = "This layer takes" if len(names) == 1 else f"These {len(names)} layers take"
            found.append((more, f"{which} {kind}: {said}{rest}."))
    return found


_LONGER = "longer than before, with no more work to do"
_ODD = (
    "no less time with fewer channels, which no longer fill whole blocks of 8 or 16, in which kernels compute, so that "
    "the next multiple need not cost more"
)


def _is_odd(row: LayerAudit) -> bool:
    """Return whether a layer lost channels so that they no longer fill whole blocks."""
    if row.channels is None or row.channels_before is None or row.channels >= row.channels_before:
        return False
    return any(row.channels % block and not row.channels_before % block for block in BLOCKS)


def _compared(name: str, before: float, after: float, pair: _Pair) -> str:
    row = pair.audit[name]
    lost = row.lost_channels
    channels = f" with {row.channels} channels" if lost else ""
    had = f" with {row.channels_before}" if lost else ""
    runs_as = pair.runs_as(name)
    format = f" in {runs_as}" if runs_as not in ("", "float32") else ""
    return f"{name} takes {_ms(after)}{format}{channels}, {_ms(before)} before{had}"


def _in_float(pair: _Pair) -> _Found:
    """Return why layers run in float although the recipe asked for int8, as it did if any of them runs in it."""
    if not any(pair.runs_as(name) == "int8" for name in pair.audit):
        return []
    left = {name: ms for name, ms in pair.after.items() if pair.runs_as(name) not in ("", "int8", "folded")}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in sorted(left, key=lambda name: -left[name]):
        reasons[pair.audit[name].precision[pair.runtime].why].append(name)
    return [
        (
            ms,
            f"{formats.counted(len(names), 'layer')} of an int8 variant {'runs' if len(names) == 1 else 'run'} in "
            f"{pair.runs_as(names[0])} and {'takes' if len(names) == 1 else 'take'} {_of(ms, pair)}: {_names(names)}"
            + (f" ({why})." if why else "."),
        )
        for why, names in reasons.items()
        if (ms := sum(left[name] for name in names)) >= NOTABLE * pair.total
    ]


def _zeros(pair: _Pair) -> _Found:
    rows = [row for row in pair.audit.values() if row.zeroed >= _ZEROS and row.channels == row.channels_before]
    names = [row.layer for row in rows if row.layer in pair.after and row.layer in pair.before]
    ms, before = sum(pair.after[name] for name in names), sum(pair.before[name] for name in names)
    if ms < NOTABLE * pair.total or ms < before / LONGER:
        return []
    weights = sum(row.parameters for row in rows)
    share = sum(row.zeroed * row.parameters for row in rows) / weights if weights else rows[0].zeroed
    return [
        (
            ms,
            f"{formats.percent(share)} of the weights of {formats.counted(len(names), 'layer')} are zero and save no "
            f"work: together they take {_ms(ms)}, {_ms(before)} before, since the kernels are dense.",
        )
    ]


def _between(pair: _Pair) -> _Found:
    """Return what is to be said of operators in no layer with weights, if they take longer than before."""
    outside = [one for one in pair.variant if one.layer not in pair.audit and not one.converts]
    known = [one for one in pair.baseline if one.layer not in pair.audit and not one.converts]
    ms, before = _sum(outside), _sum(known)
    if ms < NOTABLE * pair.total or ms / pair.scale - before < EXCESS * pair.total:
        return []
    new = _by_operator([one for one in outside if one.operator not in {old.operator for old in known}])
    added = (
        f"; not there before as operators of their own: {_listed(new)}"
        if sum(new.values()) >= EXCESS * pair.total
        else ""
    )
    return [(ms - before, f"Operators outside the layers take {_of(ms, pair)}, {_ms(before)} before{added}.")]


def _denormal(count: int) -> list[str]:
    if not count:
        return []
    numbers = "1 number" if count == 1 else f"{count:,} numbers"
    return [
        f"{numbers} among weights and layers' outputs {'is' if count == 1 else 'are'} denormal, too small for full "
        "precision; some processors are several times slower at calculating with such numbers."
    ]


def _contradiction(pair: _Pair) -> list[str]:
    """Return a warning where the layers' times are too far from what the paired timing found to compare them."""
    by_layers = _sum(pair.baseline) / pair.total
    if abs(math.log(by_layers / pair.speedup.value)) < math.log(_CONTRADICTION):
        return []
    return [
        f"The times by layer add up to {_ms(pair.total)}, {_ms(_sum(pair.baseline))} before, which makes "
        f"{formats.times(by_layers)} and not the {formats.times(pair.speedup.value)} of the paired timing, so they are "
        "not compared here: the rest lies between the operators, or something disturbed one of the two."
    ]


def _sum(times: Sequence[LayerTime]) -> float:
    return sum(one.ms for one in times)


def _by_layer(times: Sequence[LayerTime], wanted: Callable[[LayerTime], bool]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for one in times:
        if wanted(one):
            found[one.layer] += one.ms
    return dict(found)


def _by_operator(times: Sequence[LayerTime]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for one in times:
        found[one.operator] += one.ms
    return dict(found)


def _of(ms: float, pair: _Pair) -> str:
    """Return a time beside the whole: `0.31 ms of 1.2 ms (26.0 %)`."""
    return f"{_ms(ms)} of {_ms(pair.total)} ({formats.percent(ms / pair.total)})"


def _ms(value: float) -> str:
    return formats.milliseconds(value) if value >= 0.001 else "0 ms"


def _listed(of: Mapping[str, float]) -> str:
    """Return the operators that take most, with their times."""
    most = sorted(of, key=lambda name: -of[name])
    rest = f", and {len(most) - _NAMED} more" if len(most) > _NAMED else ""
    return ", ".join(f"{name} {_ms(of[name])}" for name in most[:_NAMED]) + rest


def _names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
