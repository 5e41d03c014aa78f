"""Browse results: regressions example by example, and Pareto-optimal variants with their recipes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shrinkkit.core.measurement import Accuracy, Regression
from shrinkkit.core.recipe import BASELINE
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.picture import Picture, Strip
from shrinkkit.display.showable import plain
from shrinkkit.display.tables import Cell, Command, Several, Shown, Statement, Table, facts
from shrinkkit.errors import InvalidInput
from shrinkkit.report import accuracy, figures, show
from shrinkkit.results.results import Results, Row, pareto_front
from shrinkkit.widgets import live
from shrinkkit.widgets.live import Live


def lost(accuracies: Mapping[str, Accuracy]) -> None:
    """Show the examples that each variant predicts worse than the baseline, one at a time, behind two controls."""
    from ipywidgets import BoundedIntText, Dropdown

    compared = {name: accuracy.worst_regressions for name, accuracy in accuracies.items() if accuracy.difference}
    examples = {name: regressions for name, regressions in compared.items() if regressions}
    if not examples:
        Live(Statement("No regressions: no variant predicts an example worse than the baseline."))
        return
    live.explore(
        lambda variant, example: _example(examples[variant], variant, example),
        variant=Dropdown(options=list(examples), description="variant"),
        example=BoundedIntText(1, min=1, max=max(map(len, examples.values())), description="example"),
    )


def front(results: Results) -> None:
    """Show the Pareto-optimal variants; the recipe of the one chosen by click or name can be saved."""
    from ipywidgets import Dropdown

    best = pareto_front(_own(results))
    if not best:
        Live(Several((Statement("No conclusive timing yet, so no variant is Pareto-optimal."), so_far(results))))
        return
    names = [f"{row.variant} on {row.place.target}" for row in best]
    choice = Dropdown(options=[(name, i) for i, name in enumerate(names)], description="variant")
    chart = drawing(results)
    live.show_controls(_clickable(chart.svg, names, choice), "a chart with selectable points", static=chart)
    live.explore(lambda chosen: _chosen(results, best, chosen), chosen=choice)
    live.on_request(
        "Save as YAML",
        lambda: save(results, best[choice.value], Path()),
        before=Statement("A saved recipe can be run again: shrinkkit run my_task.py --recipe FILE."),
    )


def so_far(results: Results) -> Table:
    """Return size, MACs, change of score and speed of every variant, as far as they are known."""
    rows: list[tables.Row] = []
    for name, variant in results.variants.items():
        size = cells.size(min((file.size_bytes for file in variant.files), default=None))
        unmeasured: tables.Row = {"target": "not measured", "vs PyTorch": "", "file size": size}
        own = [show.objectives(row, results) for row in results.rows if (row.variant, row.state) == (name, "measured")]
        counts = {"parameters": cells.count(variant.parameters), "MACs": cells.count(variant.macs)}
        model: tables.Row = {"variant": name, **counts}
        rows += [{**model, **figures} for figures in own or [unmeasured]]
    return tables.table("Results so far", rows, text=("target",), folded=False)


def save(results: Results, row: Row, folder: Path) -> Command:
    """Write the recipe of a row's variant to `folder` as `<variant>.yaml` and return the command that runs it."""
    path = folder / f"{row.variant}.yaml"
    if row.variant == BASELINE:
        raise InvalidInput(f"{row.variant} is the original model, which has no recipe. Choose another variant.")
    if path.exists():
        raise InvalidInput(f"{path} already exists and is not overwritten. Move or rename it.")
    path.write_text(recipe_yaml(results.recipe(row.variant)), encoding="utf-8")
    task = results.study.task if results.study else results.task
    return Command(f"shrinkkit run {task} --recipe {path}", f"Saved in {path.resolve().parent}. To run it again:")


def drawing(results: Results) -> Picture:
    """Return speed-up and change of accuracy of every variant, the Pareto-optimal ones numbered."""
    rows = _own(results)
    best = pareto_front(rows)
    others = [row for row in rows if row not in best and row.speedup_today and row.difference and not row.intermediate]
    return figures.pareto(results.name, best, others, metric=results.metric_title, is_fraction=results.is_fraction)


def _own(results: Results) -> tuple[Row, ...]:
    """Return the rows of the machine that made the run."""
    return results.of(results.machines[0]).rows


def _clickable(svg: str, names: Sequence[str], choice: Any) -> Any:
    """Return a widget that shows a picture; a click on one of its points sets `choice` to the point's number."""
    points = live.scripted("points.js", svg=svg, names=list(names), chosen=-1)
    points.observe(lambda change: setattr(choice, "value", change["new"]), names="chosen")
    return points


def _chosen(results: Results, best: Sequence[Row], index: int) -> Several:
    row = best[index]
    rows: list[tables.Row] = []
    for i, one in enumerate(best, 1):
        name = Cell(f"{i}. {one.variant}", "chosen", "good") if one == row else f"{i}. {one.variant}"
        rows.append({"variant": name, **show.objectives(one, results)})
    table = tables.table("Pareto-optimal variants; numbers refer to the chart", rows, text=("target",), folded=False)
    if row.variant == BASELINE:
        return Several((table, Statement(f"{row.variant} is the original model and has no recipe.")))
    return Several((table, Command(recipe_yaml(results.recipe(row.variant)).rstrip(), f"Recipe of {row.variant}:")))


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """Return plain settings of a recipe as YAML."""
    from ruamel.yaml import YAML

    text, yaml = io.StringIO(), YAML()
    yaml.default_flow_style = False
    yaml.dump(plain(recipe), text)
    return text.getvalue()


def _example(examples: Sequence[Regression], variant: str, number: int) -> Shown:
    count = len(examples)
    if number > count:
        return Statement(f"{variant} has {formats.counted(count, 'regression')}, got {number}.", tone="warning")
    one = examples[number - 1]
    caption = f"{variant}, regression {number} of {count}"
    pairs = [
        ("index in the test split", str(one.index)),
        ("target", one.label),
        ("prediction of the original", one.before),
        (f"prediction of {variant}", one.after),
        ("score before and after", f"{one.score_before:.3g} and {one.score_after:.3g}"),
    ]
    parts: list[Shown] = [Strip(caption, (accuracy.image([(one, variant)]),))] if one.png else []
    return Several((*parts, facts(f"Example {one.index}" if one.png else caption, pairs)))
