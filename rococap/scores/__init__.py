"""Compares generated captions with the originals and with each other: scores, tables, reports.

Reads what is stored in the database; knows nothing of engines or workers.
"""
