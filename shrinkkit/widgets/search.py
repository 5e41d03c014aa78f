"""Live view of a search: the front of what was tried grows, and a button ends it with the best so far."""

import threading
from pathlib import Path

from shrinkkit.core.search import SearchRecord
from shrinkkit.display.tables import Command, Several, Shown, Statement
from shrinkkit.report import search as show
from shrinkkit.widgets import browse, live
from shrinkkit.widgets.live import Live


class SearchMonitor:
    """Trial callback that shows the search, and ends it when its button is clicked or the file `stop` appears."""

    def __init__(self, stop: Path) -> None:
        """Show the button and an empty view."""
        from ipywidgets import Button, Layout

        self._file, self._stop = stop, threading.Event()
        button = Button(description="End the search", layout=Layout(width="auto"))
        button.on_click(lambda _: self._stop.set())
        live.show_controls(button, "a button that ends the search with the best so far")
        self._live = Live(Statement("No recipe has been tried yet."))

    def __call__(self, record: SearchRecord) -> bool:
        """Show the search so far and return whether to end it."""
        self._live.show(Several((record.shown(), show.front(record))))
        return self._stop.is_set() or self._file.exists()


def save(record: SearchRecord, folder: Path) -> Shown:
    """Write each recipe that was found to `folder` as YAML, and return the command that runs the best one again."""
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in record.recipes():
        (folder / f"{recipe.name}.yaml").write_text(browse.recipe_yaml(recipe.settings()), encoding="utf-8")
    if not record.found:
        return Statement("No recipe was found. Give the search more time.", tone="warning")
    first = folder / f"{record.recipes()[0].name}.yaml"
    return Command(
        f"shrinkkit run TASK --recipe {first} --target {record.target}", "To make and measure the boldest again:"
    )
