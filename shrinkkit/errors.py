"""The errors that shrinkkit raises on purpose.

Each message names the rule, the value that broke it, and the remedy. Whoever catches
`ShrinkkitError` catches all of them; anything else that escapes is a defect.
"""


class ShrinkkitError(Exception):
    """Base of every error that shrinkkit raises on purpose."""


class InvalidInput(ShrinkkitError, ValueError):
    """An argument, a parameter, or a line of a recipe or study is not allowed."""


class InvalidTask(ShrinkkitError):
    """A task's model, data, score or loss breaks a rule that every step relies on."""


class NothingToPrune(ShrinkkitError):
    """No layer is left to prune, or pruning as asked would remove nothing."""


class Unsupported(ShrinkkitError):
    """The technique cannot be had on this runtime or for this model; nothing falls back."""


class NothingChanged(ShrinkkitError):
    """A recipe ran to its end and left the model as it was."""


class UnfairComparison(ShrinkkitError):
    """Two measurements differ in more than the treatment, so their ratio means nothing."""


class ModelFileError(ShrinkkitError):
    """A model file is missing, damaged, or does not compute what it was made from."""


class StepFailed(ShrinkkitError):
    """A notebook of a run failed, died, or ran out of time."""


def brief(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
