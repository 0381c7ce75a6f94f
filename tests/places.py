"""Folders that tests read from."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PICTURES = TESTS / "pictures"
SHARED = ROOT.parent / "shared" / "data"
"""Data that is not part of the project; tests that need it skip where it is absent."""
