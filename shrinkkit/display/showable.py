"""What every object can do with itself: show itself in a notebook and a terminal, become a dict or a data frame."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shrinkkit.display.tables import Shown, facts

if TYPE_CHECKING:
    import pandas as pd


class Rich:
    """A base for dataclasses: `shown` is what a notebook and a terminal display, `to_dict` and `to_frame` convert."""

    def shown(self) -> Shown:
        """Return the table or sentence that stands for it."""
        pairs = [(name.replace("_", " "), text(value)) for name, value in flat(self.to_dict()).items()]
        return facts(type(self).__name__, pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that it holds as plain dicts, lists, numbers and texts, in the order of its fields."""
        found: dict[str, Any] = plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})  # type: ignore[arg-type]
        return found

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of its data frame: one, without its lists of records, unless a class says otherwise."""
        return [flat(self.to_dict())]

    def to_frame(self) -> "pd.DataFrame":
        """Return it as a data frame for analysis; what a row is stands at each class, where it is not the object."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def __repr__(self) -> str:
        """Return it as plain text."""
        return repr(self.shown())

    def _repr_html_(self) -> str:
        return self.shown()._repr_html_()

    def _repr_markdown_(self) -> str:
        return self.shown().markdown()


def plain(value: Any) -> Any:
    """Return a value with dataclasses and settings as dicts and tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def flat(found: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a dict without dicts in it: `speedup.low` names what was in `speedup`. Lists of dicts are left out."""
    row: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(one, (dict, list)) for one in value)):
            row[f"{prefix}{name}"] = value
    return row


def text(value: Any) -> str:
    """Return a plain value as a person reads it, '' for what is not there; of a long list, how long it is."""
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        return ", ".join(map(text, value)) if len(value) <= 8 else f"{len(value):,} values"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
