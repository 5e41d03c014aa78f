"""Which damaged studies, recipes and records have their readers raise an error that is not deliberate?

Exits with 1 if a reader raised anything but a `ShrinkkitError`.

    python tests/benchmarks/fuzz.py --seconds 60 --seed 0
"""

import argparse
import collections
import copy
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import examples

from shrinkkit.core import evidence, robustness, store, studies
from shrinkkit.core.measurement import TargetRecord
from shrinkkit.core.robustness import RobustnessRecord
from shrinkkit.core.run_folder import Status
from shrinkkit.core.variant import Variant
from shrinkkit.errors import ShrinkkitError
from shrinkkit.report import robustness as chapter
from shrinkkit.results import results, verdict

BUNDLED = Path(studies.__file__).parents[1] / "tasks" / "bundled"
ODD = (
    *(None, True, False, 0, 1, -1, 2, 5, 9, 0.5, -0.5, 1e308, -1e308, 1e-320, 2**63, 10**40),
    *("", " ", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "nan", "1e400", "cpu/torch", "baseline", "x" * 5000),
    *([], {}, [None], [[]], {"x": 1}, [1, 2], {"": None}),
)
"""Values that a file may hold where another is expected."""
TOKENS = (
    b"{ } [ ] : , - & * ! | > ' \" % @ ` # ? ~ \t \r\n \x00 \xff \xef\xbb\xbf &a *a << !!python/object: "
    b".nan .inf 1e400 null true"
).split(b" ")


def damaged(data, draw):
    """Return JSON with up to three values replaced, removed, exchanged or doubled."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        # Most values of a record are samples; a level is drawn first, so that its other fields are hit as often.
        parent, value = None, data
        while isinstance(value, (dict, list)) and value and (parent is None or draw.random() < 0.8):
            key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
            parent, value = value, value[key]
        if parent is None:
            return draw.choice(ODD)
        how = draw.random()
        if how < 0.15 and isinstance(parent, dict):
            del parent[key]
        elif how < 0.3 and isinstance(parent, list):
            parent[key:key] = draw.choice(([], [parent[key]] * 2))
        elif how < 0.45 and isinstance(value, (int, float)) and not isinstance(value, bool):
            parent[key] = draw.choice((-value, value * 1e6, value + 1, float(value), int(min(max(value, -1e9), 1e9))))
        else:
            parent[key] = copy.deepcopy(draw.choice(ODD))
    return data


def mangled(text, draw):
    """Return bytes with up to four of them changed, removed, doubled or exchanged for tokens of the format."""
    text = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(text) + 1), draw.choice((1, 1, 2, 8, 40))
        how = draw.random()
        if how < 0.3:
            text[at : at + 1] = bytes([draw.randrange(256)])
        elif how < 0.5:
            del text[at : at + length]
        elif how < 0.65:
            text[at:at] = text[at : at + length] * draw.choice((1, 2, 50))
        else:
            text[at:at] = draw.choice(TOKENS)
    return bytes(text)


def read_folder(run):
    """Read a run folder as a report does."""
    loaded = results.load(run)
    verdict.decide(loaded).shown()
    chapter.chapter(loaded)
    loaded.shown()


def read_robustness(path):
    """Read a record of robustness, and make its chapter."""
    record = robustness.derive(store.read(path, RobustnessRecord))
    robustness.verdicts(record, 0.02)
    robustness.damaged_classes(record, 0.02)
    chapter.of_record(record)


def main():
    """Try damaged inputs until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, counts, errors = random.Random(options.seed), collections.Counter(), {}
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = examples.write_run(folder / "run")
        record = examples.robustness_record(["baseline", "static-int8", "float16"])
        robust = run / "robustness" / record.machine / "cpu-torch.json"
        store.write(robust, record)
        variant = run / "variants" / "static-int8" / "variant.json"
        measured = next((run / "measurements").glob("*/*.json"))
        texts = [
            path.read_bytes() for kind in ("studies", "recipes") for path in sorted((BUNDLED / kind).glob("*.yaml"))
        ]
        readers = {
            "study": (folder / "s.yaml", studies.read_study, texts),
            "recipe": (folder / "r.yaml", studies.read_recipe, texts),
            "variant": (variant, lambda path: store.read(path, Variant), None),
            "measurement": (measured, lambda path: evidence.derive(store.read(path, TargetRecord)), None),
            "robustness": (robust, read_robustness, None),
            "status": (run / "status.json", lambda path: store.read(path, Status), None),
            "folder": (None, lambda _: read_folder(run), None),
        }
        records = {
            path: path.read_bytes() for path in (variant, measured, robust, run / "status.json", run / "study.json")
        }
        trees = {path: json.loads(text) for path, text in records.items()}
        while time.monotonic() < end:
            # A folder takes a hundred times as long as a file.
            (kind,) = draw.choices(list(readers), [1.0, 1.0, 1.0, 0.1, 0.3, 1.0, 0.05])
            path, read, sources = readers[kind]
            path = path or draw.choice(list(records))
            if sources or draw.random() < 0.3:
                content = mangled(draw.choice(sources) if sources else records[path], draw)
            else:
                content = json.dumps(damaged(trees[path], draw)).encode()
            path.write_bytes(content)
            counts[kind] += 1
            try:
                read(path)
            except ShrinkkitError:
                counts[f"{kind} refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                place = traceback.extract_tb(error.__traceback__)
                own = [frame for frame in place if "shrinkkit" in frame.filename] or place
                key = f"{kind}: {type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
                errors.setdefault(
                    key,
                    (
                        str(error)[:200],
                        content[:200] if len(content) < 3000 else difference(records.get(path, b""), content),
                    ),
                )
            if path in records:
                path.write_bytes(records[path])
    for kind in readers:
        print(f"{kind:12s} {counts[kind]:7,d} inputs, {counts[f'{kind} refused']:7,d} refused")
    for key, (text, content) in errors.items():
        print(f"\n{key}: {text}\n  {content!r}")
    print(f"\n{sum(counts[kind] for kind in readers):,} inputs, {len(errors)} kinds of errors that are not deliberate")
    sys.exit(1 if errors else 0)


def difference(before, after):
    """Return the part of `after` in which a damaged record differs, as JSON if it is some."""
    try:
        first, second = json.loads(before), json.loads(after)
    except (ValueError, RecursionError):
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        return after[max(0, at - 60) : at + 60]
    return differences(first, second)[:400]


def differences(before, after, path=""):
    """Return where two trees of JSON differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        parts = (differences(before.get(k, "-"), after.get(k, "-"), f"{path}.{k}") for k in {**before, **after})
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        parts = (differences(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(before, after, strict=True)))
    else:
        return (
            ""
            if before == after and type(before) is type(after)
            else f"{path}: {str(before)[:60]} -> {str(after)[:60]}; "
        )
    return "".join(parts)


if __name__ == "__main__":
    main()
