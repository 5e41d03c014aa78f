"""A task by its text, `hf:PATH?data=FILE`: a Hugging Face model, and a file or a folder of data."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shrinkkit.core.recipe import hub_parts
from shrinkkit.errors import InvalidInput, brief
from shrinkkit.tasks.adapters import from_transformers
from shrinkkit.tasks.task import Task

_IMAGES = frozenset(".png .jpg .jpeg .bmp .gif .webp .tif .tiff".split())


def from_text(text: str) -> Task:
    """Return the task of a text `hf:PATH?data=FILE`; see `hub_parts`, and `from_transformers` for the errors."""
    model, file = hub_parts(text)
    if not file:
        raise InvalidInput(f"`task` must name its data, got {text!r}. Write `hf:PATH?data=FILE`, or add `--data FILE`.")
    if model.startswith((".", os.sep)) and not os.path.isdir(model):
        raise InvalidInput(f"`task` names the model {model}, but there is no such folder. Save it there or correct it.")
    return from_transformers(model, read(Path(file)))


def files(text: str) -> set[Path]:
    """Return the files of the model and of the data that a text `hf:PATH?data=FILE` names; none of the hub's."""
    paths = [path for part in map(Path, hub_parts(text)) for path in (part.rglob("*") if part.is_dir() else [part])]
    return {path.absolute() for path in paths if path.is_file()}


def read(path: Path) -> Any:
    """Return the rows of a file: a mapping of columns each.

    A line of a `.txt` file is a text; `.csv`, `.jsonl` and `.npz` files have columns. Images in a folder are labelled
    by `metadata.csv` with the column `file_name`, or by the folders in it that hold them; both may be absent.
    """
    try:
        if path.is_dir():
            return _image_rows(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                columns = {name: arrays[name] for name in arrays.files}
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as lines:
            readers: dict[str, Callable[[], list[Any]]] = {
                ".txt": lambda: [{"text": line.strip()} for line in lines if line.strip()],
                ".csv": lambda: list(csv.DictReader(lines)),
                ".jsonl": lambda: [json.loads(line) for line in lines if line.strip()],
            }
            if path.suffix in readers:
                return readers[path.suffix]()
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidInput(f"The data {path} cannot be read: {brief(error)}. Correct the path or the file.") from error
    raise InvalidInput(f"The data must be a .txt, .csv, .jsonl or .npz file, or a folder of images, got {str(path)!r}.")


def _image_rows(folder: Path) -> list[dict[str, Any]]:
    table = folder / "metadata.csv"
    if table.is_file():
        return [{**row, "image": folder / row.get("file_name", "")} for row in read(table)]
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    is_labelled = all(path.parent != folder for path in images)
    return [{"image": path} | ({"label": path.parent.name} if is_labelled else {}) for path in images]
