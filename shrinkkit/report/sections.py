"""The parts of a report that go through the places one by one: what was lost, where time goes, what running costs."""

from collections.abc import Callable
from dataclasses import replace

from shrinkkit.core.measurement import TargetRecord
from shrinkkit.display.tables import Heading, Several, Shown, Statement
from shrinkkit.report import deployment as costs
from shrinkkit.report import predictions, profile
from shrinkkit.results.table import Results


def lost(found: Results) -> Several:
    """Return, for each target, the examples that each variant lost, and the scores by class."""

    def parts(record: TargetRecord) -> tuple[Shown, ...]:
        judged = {m.variant: m.accuracy for m in record.measurements if m.accuracy}
        return predictions.lost(judged), predictions.classes(judged)

    return _by_target(found, parts, "No variant was judged.")


def time(found: Results) -> Several:
    """Return, for each target, the time by layer of each variant, and what explains a slow-down."""
    return _by_target(found, lambda record: (profile.layers(record, found.variants),), "Nothing was timed.")


def deployment(found: Results) -> Several:
    """Return, for each target, slow calls, memory, and other batch sizes and numbers of threads."""
    return _by_target(
        found,
        lambda record: (costs.tails(record), costs.memory(record), costs.throughput(record)),
        "No target was measured.",
    )


def _by_target(found: Results, parts: Callable[[TargetRecord], tuple[Shown, ...]], nothing: str) -> Several:
    shown: list[Shown] = []
    for target, record in found.measured.items():
        where = found.where(target)
        shown += [Heading(where), *parts(replace(record, target=where))]
    return Several(tuple(shown) or (Statement(nothing, tone="warning"),))
