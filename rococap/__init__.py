"""rococap captions radiology pictures through a crash-safe work queue."""

__version__ = "0.1.0"
