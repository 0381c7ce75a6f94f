"""The report: one HTML file, its structure as parsed, and what a browser makes of it."""

from pathlib import Path

import pytest
from samples import fill
from sqlalchemy import Engine
from test_compare import caption, texts

from rococap.queue import Run
from rococap.report import report


@pytest.fixture
def run(database: Engine, tmp_path: Path) -> Run:
    return fill(database, tmp_path / "set", 5)


def test_a_report_is_one_file_that_names_no_other(database, run, tmp_path):
    caption(database, run, texts("Original caption 0.", "Another."))
    made = report(database, [], "train", tmp_path / "r.html")
    text = made.path.read_text("utf-8")
    assert (made.captions, made.pictures, made.unreadable, made.size) == (2, 2, 0, len(text.encode()))
    assert "://" not in text
