"""Captions against the originals and against each other: scores, tables, reports."""
