"""A page on paper: a PDF with pages, or an error that names the remedy."""

import shutil

import pytest

from shrinkkit.errors import Unsupported
from shrinkkit.report import export


def test_a_missing_browser_is_an_error_that_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match=r"print it to a PDF there, or install Chromium"):
        export.pdf(tmp_path / "page.html", tmp_path / "page.pdf")


@pytest.mark.parametrize("left", [b"", b"%PDF-1.4 cut off", b"<html>"])
def test_a_browser_that_leaves_no_pdf_is_an_error(tmp_path, monkeypatch, left):
    # A program that behaves like a browser which fails: it writes `left` where it should print, and complains.
    fake = tmp_path / "chromium"
    (tmp_path / "left").write_bytes(left)
    copy = f'for a; do case "$a" in --print-to-pdf=*) {shutil.which("cp")} {tmp_path}/left "${{a#*=}}";; esac; done'
    fake.write_text(f"#!/bin/sh\n{copy}\necho no display >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="status 3: no display"):
        export.pdf(tmp_path / "page.html", tmp_path / "page.pdf")
    assert not (tmp_path / "page.pdf").exists()


@pytest.mark.browser
def test_a_page_is_printed_and_its_pages_are_counted(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<p>one</p><p style="break-before: page">two</p>')
    export.pdf(page, tmp_path / "page.pdf")
    assert export.pages(tmp_path / "page.pdf") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "page.pdf"]
