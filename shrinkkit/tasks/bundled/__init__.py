"""Bundled tasks on real data, recipes, studies, and the template of a user's task."""

from pathlib import Path

TASKS = {
    "digits-cnn": "residual CNN with BatchNorm, 1x32x32 images",
    "digits-lstm": "LSTM, GRU and Linear over the 32 rows of an image",
    "digits-transformer": "attention over the 64 patches of an image",
}
"""Bundled tasks with a description; all classify scikit-learn's handwritten digits."""

TEMPLATE = Path(__file__).with_name("my_task.py")
"""The file that `shrinkkit new` copies."""
