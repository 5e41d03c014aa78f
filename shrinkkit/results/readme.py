"""A model card as Markdown for people: what it is, what was measured, what to know, and code that loads each file."""

from collections.abc import Sequence

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.recipe import described
from shrinkkit.core.run_folder import CARD
from shrinkkit.core.target import Target
from shrinkkit.core.variant import WITH_VNNI, ModelFile, Port
from shrinkkit.display import formats
from shrinkkit.results.modelcard import Card, Figures, Precision
from shrinkkit.runtimes import snippets


def text(card: Card, *, is_fraction: bool) -> str:
    """Return a card as Markdown: what it is, what was measured, what to know, and code that loads each file.

    Args:
        card: What is to be told.
        is_fraction: Whether every score lies in [0, 1], so that per cent make sense.
    """
    parts = [
        f"# {card.name}\n",
        _what(card),
        "## Measured\n",
        _measured(card, is_fraction),
        "## Know before use\n",
        "".join(f"- {one}\n" for one in _warnings(card)),
        "## Load it\n",
        "Each block runs in this folder, without shrinkkit and without the class of the model, with the settings that "
        f"the file is measured with. Where a shape says `batch`, any size will do. `{CARD}` says all of this for "
        "programs. `shrinkkit verify .` tells on another machine whether the files are whole, hold nothing that "
        "would run as they are opened, and give the outputs that they must. Run it first on files of unknown origin.\n",
        *(_file(card, file) for file in card.files),
    ]
    return "\n".join(parts)


def _what(card: Card) -> str:
    done = [f"`{name}`" + (f" ({settings})" if settings else "") for name, settings in described(card.recipe)]
    made = f" Made from the variant `{card.source}`." if card.source and card.source != "baseline" else ""
    how = f"compressed: {'; '.join(done)}." if done else "as it was trained, in its own precision."
    audit = card.audit
    counts = [f"{formats.count(card.parameters)} parameters", f"{formats.count(card.macs)} MACs an example"]
    counts += [f"{formats.percent(card.sparsity)} of the weights zero"] if card.sparsity else []
    counts += [f"{audit.pruned} of {audit.layers} layers with fewer channels"] if audit.pruned else []
    lines = [f"The model of the task `{card.task}`, {how}{made}", "", f"{', '.join(counts)}.", ""]
    for runtime, kinds in card.audit.precision.items():
        lines += [f"- {runtime} computes {'; '.join(_kind(kind) for kind in kinds)}."]
    return "\n".join([*lines, ""])


def _kind(kind: Precision) -> str:
    reasons = [reason if count == kind.layers else f"{reason}: {count}" for reason, count in kind.why.items()]
    how = kind.runs_as if kind.runs_as == "folded" else f"in {kind.runs_as}"
    return f"{formats.counted(kind.layers, 'layer')} {how}" + (f" ({', '.join(reasons)})" if reasons else "")


_HEAD = ("target", "machine", "score", "change", "a call, p50", "against FP32 there", "against PyTorch today", "memory")


def _measured(card: Card, is_fraction: bool) -> str:
    rows = [_cells(one, is_fraction) for one in card.figures if one.state == "measured"]
    if not rows:
        return "Nothing yet.\n"
    lines = [_HEAD, ("---",) * len(_HEAD), *rows]
    metric = card.figures[0].metric
    note = (
        f"Score: {metric}. Brackets hold 95 % intervals; the change is against the baseline on the same examples. "
        "Speed is against the unchanged model on the same target, and against it in torch on the same device. "
        "Memory is the peak above what the runtime itself holds."
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}\n"


def _cells(one: Figures, is_fraction: bool) -> tuple[str, ...]:
    change = formats.change(one.difference.value, is_fraction=is_fraction) if one.difference else ""
    batch = f", batch {one.batch_size}" if one.batch_size else ""
    return (
        one.target,
        f"{one.machine}, {formats.counted(one.threads or 0, 'thread')}{batch}",
        _with_interval(formats.score(one.accuracy.value, is_fraction=is_fraction), one.accuracy, is_fraction)
        if one.accuracy
        else "",
        _with_interval(change, one.difference, is_fraction) if one.difference else "",
        formats.milliseconds(one.p50_ms) if one.p50_ms is not None else "",
        speed(one.speedup, one.verdict),
        speed(one.speedup_today, one.verdict_today),
        formats.size(one.peak_memory_bytes) if one.peak_memory_bytes is not None else "",
    )


def _with_interval(text: str, estimate: Estimate, is_fraction: bool) -> str:
    return f"{text} {formats.interval(estimate, is_fraction=is_fraction)}"


def speed(ratio: Estimate | None, verdict: str) -> str:
    """Return a speed-up with its interval as far as its verdict allows it to be quoted, '' where there is none."""
    if ratio is None:
        return ""
    if verdict == "too noisy":
        return "too noisy to tell"
    text = f"{formats.times(ratio.value)} {formats.interval(ratio)}"
    return text if verdict in ("faster", "slower") else f"{text}, {verdict}"


def _warnings(card: Card) -> tuple[str, ...]:
    found = [
        f"On {one.target} ({one.machine}) int8 accumulators saturate in {', '.join(one.saturated)}: the outputs are "
        "less accurate than the model intends, and differ on processors with VNNI."
        for one in card.figures
        if one.saturated
    ]
    if limited := [file.runtime for file in card.files if file.exact_on == WITH_VNNI]:
        found.append(
            f"{', '.join(limited)}: int8 accumulators may saturate on x86 processors without VNNI, without an error. "
            "Make the variant again on such a processor, or run `shrinkkit verify` there."
        )
    found += [f"No file for {runtime}: {reason}" for runtime, reason in card.refusals.items()]
    found += [f"{one.target}: {one.state}: {one.reason}" for one in card.figures if one.state in ("failed", "not run")]
    found += [f"{one.target}: {note}" for one in card.figures for note in one.notes]
    return (*found, *card.notes) or ("Nothing out of the ordinary was found.",)


def _file(card: Card, file: ModelFile) -> str:
    targets = [Target.parse(one.target) for one in card.figures]
    devices = dict.fromkeys(["cpu", *(target.device for target in targets if target.runtime == file.runtime)])
    beside = f", which needs {', '.join(f'`{path}`' for path in file.beside)} beside it" if file.beside else ""
    exact = f" Its int8 arithmetic is exact on {file.exact_on}." if file.exact_on else ""
    lines = [
        f"### `{file.path}` with {file.runtime}\n",
        f"{file.format}, {formats.size(file.size_bytes)}{beside}. In: {_ports(file.inputs)}. "
        f"Out: {_ports(file.outputs)}. SHA-256 `{file.sha256[:16]}…`; loaded back from disk it was "
        f"{file.max_relative_error:.1e} of the largest output away from the model in memory.{exact}\n",
    ]
    for device in devices:
        lines += [f"On {device}:\n"] * (len(devices) > 1)
        lines += [f"```python\n{snippets.code(file, card.settings[file.runtime], device=device)}```\n"]
    return "\n".join(lines)


def _ports(ports: Sequence[Port]) -> str:
    return ", ".join(f"`{snippets.described(port)}`" for port in ports)
