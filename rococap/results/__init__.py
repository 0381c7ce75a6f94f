"""Moves captions between the database and files: exports, checkpoint segments, published folders, the Hugging Face hub.

Knows nothing of engines or scores.
"""
