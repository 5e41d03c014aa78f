"""YAML whose keys know their lines."""

import pytest

from shrinkkit.core import studies
from shrinkkit.core.studies import Source
from shrinkkit.errors import InvalidInput, nearest, options, shown_value


def load(folder, text):
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    return studies.load(folder / "my.yaml", shown="my.yaml")


def test_every_key_and_entry_knows_its_line_and_a_missing_one_that_of_its_section(tmp_path):
    source = load(tmp_path, "a:\n  b:\n    - 1\n    - 2\nc: 3\n")
    assert source.data == {"a": {"b": (1, 2)}, "c": 3}
    wheres = [source.where(key) for key in (("a",), ("a", "b"), ("a", "b", 1), ("a", "x"), ("c",), ())]
    assert wheres == ["my.yaml:1", "my.yaml:2", "my.yaml:4", "my.yaml:1", "my.yaml:5", "my.yaml:1"]


def test_scalars_are_those_of_yaml_1_2(tmp_path):
    source = load(tmp_path, "[a, b, c, d, e]: 1\nf: [1e-3, yes, true, null, 0x10, 012]\n1: one\n")
    assert source.data == {"f": (0.001, "yes", True, None, 16, 12), "1": "one"}
    assert source.problems == ["A key must be a word (my.yaml:1)."]


def test_settings_without_a_file_have_no_place():
    assert Source({"a": 1}).where(("a",)) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n---\nb: 2", "but found another document"),
        ("a:\n\t- 1", r"cannot start any token \(my\.yaml:2\)"),
        ("a: \x01", "not YAML"),
    ],
)
def test_what_is_not_one_yaml_document_is_invalid(tmp_path, text, expected):
    with pytest.raises(InvalidInput, match=expected):
        load(tmp_path, text)


def test_a_tag_runs_nothing_and_is_a_problem(tmp_path):
    source = load(tmp_path, "a: !!python/name:os.system 1")
    assert source.data == {"a": None}
    assert "cannot be read" in source.problems[0]


def test_a_list_that_holds_itself_is_a_problem_and_no_endless_loop(tmp_path):
    assert "nested deeper" in load(tmp_path, "a: &x [*x]").problems[0]


def test_nearest_suggests_only_what_is_close():
    assert nearest("Float61", ["float16", "bfloat16"]) == " Did you mean `float16`?"
    assert nearest("zebra", ["float16", "bfloat16"]) == ""


def test_options_reads_as_a_sentence_part():
    assert [options(words) for words in ((), ("a",), ("a", "b"), ("a", "b", "c"))] == [
        *("nothing", "a", "a or b", "a, b or c")
    ]


def test_a_shown_value_reads_as_in_the_file_and_stays_short():
    values = (None, True, "a", (1, 2), {"a": 1}, "x" * 200)
    assert [shown_value(value) for value in values[:5]] == ["nothing", "true", "'a'", "[1, 2]", "a section (a)"]
    assert len(shown_value(values[5])) == 80
