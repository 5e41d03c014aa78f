"""Results to walk through: the examples that a variant lost, one by one, and the variants that are worth a choice."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrinkkit.core.measurement import Accuracy, Lost
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, INK, MARKERS, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Column, Command, Several, Shown, Statement, Table, facts
from shrinkkit.errors import InvalidInput
from shrinkkit.report import figures
from shrinkkit.report.predictions import Strip
from shrinkkit.results import pareto
from shrinkkit.results.table import Results, Row, recipe_of
from shrinkkit.widgets import live
from shrinkkit.widgets.live import Live

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_POINTS = """
export default {
  render({ model, el }) {
    el.innerHTML = model.get("svg");
    el.querySelectorAll('[id*="-point-"]').forEach((point) => {
      const index = Number(point.id.split("-point-")[1]);
      const choose = () => { model.set("chosen", index); model.save_changes(); };
      point.setAttribute("tabindex", "0");
      point.setAttribute("role", "button");
      point.setAttribute("aria-label", model.get("names")[index]);
      point.style.cursor = "pointer";
      point.addEventListener("click", choose);
      point.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
      });
    });
  },
};
"""


def lost(found: Mapping[str, Accuracy]) -> None:
    """Show the examples that each variant answers worse than the baseline, one at a time, behind two controls.

    Args:
        found: Accuracies on one target by variant; the baseline itself is passed over.
    """
    from ipywidgets import BoundedIntText, Dropdown

    examples = {name: one.lost for name, one in found.items() if one.difference and one.lost}
    if not examples:
        Live(Statement("No variant lost an example, so there is none to look at."))
        return
    most = max(map(len, examples.values()))
    live.explore(
        lambda variant, example: _example(examples[variant], variant, example),
        variant=Dropdown(options=list(examples), description="variant"),
        example=BoundedIntText(1, min=1, max=most, description="example"),
    )


def front(found: Results) -> None:
    """Show which variants no other one beats; one that is chosen, by a click or by name, shows its recipe to be saved.

    Args:
        found: A run; the machine that made it is the one whose figures count.
    """
    from ipywidgets import Dropdown

    best = pareto.front(_own(found))
    if not best:
        Live(Statement("No variant has a timing that may be quoted, so there is nothing to choose from."))
        return
    names = [_label(row) for row in best]
    choice = Dropdown(options=list(zip(names, range(len(best)), strict=True)), description="variant")
    drawn = drawing(found)
    points = _clickable(drawn.svg, names, choice)
    live.show_controls(points, "a picture whose points can be chosen", static=drawn)
    live.explore(lambda chosen: _chosen(found, best, chosen), chosen=choice)
    live.on_request(
        "Save as YAML",
        lambda: save(found, best[choice.value], Path()),
        before=Statement("A recipe that is saved can be run again: shrinkkit run my_task.py --recipe FILE."),
    )


def save(found: Results, row: Row, folder: Path) -> Command:
    """Write the recipe of a row's variant to a YAML file of its name and return the command that runs it.

    Args:
        found: The run that the row is of.
        row: Whose recipe it is.
        folder: Where the file goes.

    Raises:
        InvalidInput: The row is the baseline, or there is such a file already.
    """
    path = folder / f"{row.variant}.yaml"
    if not recipe_of(found, row.variant):
        raise InvalidInput(f"{row.variant} is the model as it was, which has no recipe. Choose another variant.")
    if path.exists():
        raise InvalidInput(f"{path} is there already, and nothing is overwritten. Move it, or give it another name.")
    path.write_text(_yaml(found, row), encoding="utf-8")
    task = found.study.task if found.study else found.task
    return Command(
        f"shrinkkit run {task} --recipe {path}", f"Saved. To run it again, from {path.resolve().parent.name}:"
    )


def drawing(found: Results) -> Picture:
    """Return speed-up and change of accuracy of every variant, those that no other one beats filled and named."""
    best = pareto.front(_own(found))
    names = [row.variant for row in best]
    rest = [
        row for row in _own(found) if row not in best and row.speedup_today and row.difference and not row.intermediate
    ]
    scale = 100 if found.is_fraction else 1
    with canvas(9.2, 3.8) as figure:
        axes = figure.subplots()
        for row in rest:
            axes.scatter(
                [_speed(row)], [scale * _change(row)], s=26, facecolors="none", edgecolors=FAINT, linewidths=1.4
            )
        for i, row in enumerate(best):
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.scatter([_speed(row)], [scale * _change(row)], s=90, gid=f"point-{i}", **style)
        _name_points(axes, best, scale)
        figures.speed_axis(axes, [_speed(row) for row in (*best, *rest)])
        axes.set_ylabel(f"change of {found.metric}{', points' if found.is_fraction else ''}")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.grid(color=FAINT)
        axes.margins(y=0.3)
        said = "; ".join(f"{_label(row)}: {_figures(found, row)}" for row in best)
        count = formats.counted(len(set(names)), "variant")
        caption = f"Filled and named: {count} that no other beats in speed, accuracy and size together."
        return picture(figure, f"Variants that no other one beats. {said}.", caption)


def _name_points(axes: "Axes", rows: Sequence[Row], scale: float) -> None:
    for i, row in enumerate(rows):
        offset: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 9 if i % 2 else -25), "ha": "center"}
        axes.annotate(
            f"{row.variant}\n{row.place.target}",
            (_speed(row), scale * _change(row)),
            fontsize=8,
            **offset,
        )


def _own(found: Results) -> tuple[Row, ...]:
    return found.of(found.machines[0]).rows


def _label(row: Row) -> str:
    return f"{row.variant} on {row.place.target}"


def _speed(row: Row) -> float:
    return row.speedup_today.value if row.speedup_today else 1.0


def _change(row: Row) -> float:
    return row.difference.value if row.difference else 0.0


def _figures(found: Results, row: Row) -> str:
    change = formats.change(_change(row), is_fraction=found.is_fraction)
    return f"{formats.times(_speed(row))}, {change}, {formats.size(row.size_bytes or 0)}"


def _clickable(svg: str, names: Sequence[str], choice: Any) -> Any:
    """Return a widget that shows a picture; choosing one of its points sets `choice` to the point's number."""
    import anywidget
    import traitlets

    class Points(anywidget.AnyWidget):
        _esm = _POINTS
        svg = traitlets.Unicode().tag(sync=True)
        names: Any = traitlets.List().tag(sync=True)
        chosen = traitlets.Int(-1).tag(sync=True)

    points = Points(svg=svg, names=list(names))
    points.observe(lambda change: setattr(choice, "value", change["new"]), names="chosen")
    return points


def _chosen(found: Results, best: Sequence[Row], index: int) -> Several:
    row = best[index]
    rows = tuple(
        (
            Cell(one.variant, "chosen" if one == row else "", "good" if one == row else ""),
            Cell(str(one.place.target)),
            Cell(formats.times(_speed(one)), formats.interval(one.speedup_today) if one.speedup_today else ""),
            Cell(formats.change(_change(one), is_fraction=found.is_fraction)),
            Cell(formats.size(one.size_bytes or 0)),
        )
        for one in best
    )
    columns = (
        Column("variant"),
        Column("target"),
        Column("vs PyTorch today", True),
        Column("change", True),
        Column("on disk", True),
    )
    table = Table("Variants that no other one beats", columns, rows, folded=False)
    if not recipe_of(found, row.variant):
        return Several((table, Statement(f"{row.variant} is the model as it was; it has no recipe.")))
    return Several((table, Command(_yaml(found, row).rstrip(), f"The recipe of {row.variant}:")))


def _yaml(found: Results, row: Row) -> str:
    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump({name: _plain(section) for name, section in recipe_of(found, row.variant).items()}, text)
    return text.getvalue()


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}


def _example(examples: Sequence[Lost], variant: str, number: int) -> Shown:
    if number > len(examples):
        few = formats.counted(len(examples), "example")
        return Statement(f"{variant} shows {few} that it lost; there is no number {number}.", tone="warning")
    one = examples[number - 1]
    caption = f"{variant}, {number} of {formats.counted(len(examples), 'lost example')}"
    pairs = [
        ("number in the test split", str(one.index)),
        ("right answer", one.wanted),
        ("the original's answer", one.before),
        (f"the answer of {variant}", one.after),
        ("score before and after", f"{one.score_before:.3g} and {one.score_after:.3g}"),
    ]
    parts: list[Shown] = [Strip(caption, variant, (one,))] if one.png else []
    return Several((*parts, facts(f"Example {one.index}" if one.png else caption, pairs)))
