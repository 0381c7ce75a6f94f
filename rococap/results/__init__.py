"""Captions out of the database into files, checkpoints and repositories, and back. Knows no engine and no scores."""
