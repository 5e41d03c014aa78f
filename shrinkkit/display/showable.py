"""Objects that show themselves in a notebook and a terminal, and become a dict or a data frame."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shrinkkit.display.tables import Shown, facts
from shrinkkit.errors import require

if TYPE_CHECKING:
    import pandas as pd


class Rich:
    """A base for dataclasses: `shown` is what a notebook and a terminal display, `to_dict` and `to_frame` convert."""

    def shown(self) -> Shown:
        """Return its table or sentence."""
        pairs = [(name.replace("_", " "), text(value)) for name, value in flat(self.to_dict()).items()]
        return facts(type(self).__name__, pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain dicts, lists, numbers and strings."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: plain(getattr(self, f.name)) for f in fields}

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of its data frame: one, without its lists of records, unless a class overrides it."""
        return [flat(self.to_dict())]

    def to_frame(self) -> "pd.DataFrame":
        """Return it as a data frame; a class whose rows are parts of it says so."""
        return require("pandas", extra="frames", purpose="`to_frame`").DataFrame(self._rows())

    def __repr__(self) -> str:
        return repr(self.shown())

    def _repr_html_(self) -> str:
        return self.shown()._repr_html_()

    def _repr_markdown_(self) -> str:
        return self.shown().markdown()


def plain(value: Any) -> Any:
    """Return a value with dataclasses and settings as dicts and tuples as lists, recursively."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a dict without nested dicts, by keys like `speedup.low`; lists of dicts are left out."""
    row: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value)):
            row[f"{prefix}{name}"] = value
    return row


def text(value: Any) -> str:
    """Return a plain value for people, '' for None and [], and the length of a long list."""
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        return ", ".join(map(text, value)) if len(value) <= 8 else f"{len(value):,} values"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
