"""What people say of captions and make of them: verdicts, edits and reader studies.

Every act is a row with its reader and time; no row is ever changed or removed, and the machine's captions stay as they
are. Functions take a connection, inside the caller's transaction, and lock the run, so that of two people who edit one
caption the second is told. Knows no scores and no pages.
"""

from rococap.review.edits import (
    Act,
    Change,
    Replaced,
    Replacement,
    Seen,
    changes,
    edit,
    list_acts,
    replace_all,
    seen_now,
    undo,
    undo_act,
)
from rococap.review.exchange import Imported, export_reviews, import_reviews
from rococap.review.history import Caption, caption_of, counts, history
from rococap.review.records import ERRORS, VERDICTS, Conflict, Edit, Review
from rococap.review.verdicts import add_review

__all__ = [
    "ERRORS",
    "VERDICTS",
    "Act",
    "Caption",
    "Change",
    "Conflict",
    "Edit",
    "Imported",
    "Replaced",
    "Replacement",
    "Review",
    "Seen",
    "add_review",
    "caption_of",
    "changes",
    "counts",
    "edit",
    "export_reviews",
    "history",
    "import_reviews",
    "list_acts",
    "replace_all",
    "seen_now",
    "undo",
    "undo_act",
]
