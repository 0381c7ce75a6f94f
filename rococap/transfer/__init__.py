"""Databases into one another: `merge` combines those of parts, `copy` moves one to another place.

Rows are read and written by what `tables.metadata` says, so that a column that is added later travels too.
"""

from rococap.transfer.copy import copy
from rococap.transfer.merge import is_export, merge, open_source
from rococap.transfer.work import Merged

__all__ = ["Merged", "copy", "is_export", "merge", "open_source"]
