"""Pictures: sound SVG in the page's own colours, the same bytes every time, with words that stand in for them."""

import re
from xml.etree import ElementTree

import pytest

from shrinkkit.display import picture
from shrinkkit.display.picture import COLOURS, INK


def drawn(colour=COLOURS[0]):
    with picture.canvas(3, 2) as figure:
        axes = figure.subplots()
        axes.plot([0, 1.23456789], [1, 0], color=colour, marker="o")
        axes.set_title("1.23456 ms & more", color=INK)
        return picture.picture(figure, "A line that falls from 1 to 0 & ends.", "It falls.")


def test_a_picture_is_sound_xml_whose_label_is_its_text():
    root = ElementTree.fromstring(drawn().svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "A line that falls from 1 to 0 & ends."
    assert root.get("width") is None


def test_a_picture_is_a_figure_with_its_caption_and_words_elsewhere():
    made = drawn()
    assert "<figcaption>It falls.</figcaption>" in made.html()
    assert made.alt in made.markdown()
    assert repr(made) == f"[picture: {made.alt}]"


@pytest.mark.parametrize("index", range(len(COLOURS)))
def test_colours_are_variables_of_the_page(index):
    svg = drawn(COLOURS[index]).svg
    assert f"var(--sk-c{index}, {COLOURS[index]})" in svg
    assert "var(--sk-ink" in svg
    assert INK not in svg


def test_coordinates_are_rounded_and_texts_are_not():
    svg = drawn().svg
    assert "1.23456 ms" in svg
    assert not re.search(r'\bd="[^"]*\d\.\d{3}', svg)


def test_the_same_drawing_gives_the_same_bytes_and_another_one_other_ids():
    ids = [set(re.findall(r'\bid="([^"]+)"', drawn(colour).svg)) for colour in COLOURS[:2]]
    assert drawn().svg == drawn().svg
    assert ids[0]
    assert not ids[0] & ids[1]


def test_a_picture_holds_nothing_that_no_browser_draws():
    svg = drawn().svg
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    assert set(re.findall(r'\bid="([^"]+)"', svg)) == named
    assert not re.search(r"<g>\s*</g>", svg)
    assert "DejaVu" not in svg


def test_letters_are_of_one_size_in_wide_and_narrow_pictures():
    widths = {}
    for inches in (9.2, 4.6):
        with picture.canvas(inches, 2) as figure:
            figure.subplots()
            widths[inches] = re.search(r"--sk-width: (\d+)rem", picture.picture(figure, "alt", "caption").svg)[1]
    assert widths == {9.2: "66", 4.6: "33"}
