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
from rococap.review.forms import Answers, Form, Scale, read_form
from rococap.review.history import Caption, Reviewed, caption_of, counts, history
from rococap.review.outcomes import Table, heading_of, open_studies, outcome, results_of, tables_of
from rococap.review.records import ERRORS, VERDICTS, Conflict, Edit, Review, checked_name
from rococap.review.studies import (
    Progress,
    Reading,
    Shown,
    Study,
    Unblinding,
    get_study,
    item,
    join,
    list_studies,
    new_study,
    next_item,
    progress,
    rate,
    readings,
    run_for_pictures,
    unblind,
)
from rococap.review.verdicts import add_review

__all__ = [
    "ERRORS",
    "VERDICTS",
    "Act",
    "Answers",
    "Caption",
    "Change",
    "Conflict",
    "Edit",
    "Form",
    "Imported",
    "Progress",
    "Reading",
    "Replaced",
    "Replacement",
    "Review",
    "Reviewed",
    "Scale",
    "Seen",
    "Shown",
    "Study",
    "Table",
    "Unblinding",
    "add_review",
    "caption_of",
    "changes",
    "checked_name",
    "counts",
    "edit",
    "export_reviews",
    "get_study",
    "heading_of",
    "history",
    "import_reviews",
    "item",
    "join",
    "list_acts",
    "list_studies",
    "new_study",
    "next_item",
    "open_studies",
    "outcome",
    "progress",
    "rate",
    "read_form",
    "readings",
    "replace_all",
    "results_of",
    "run_for_pictures",
    "seen_now",
    "tables_of",
    "unblind",
    "undo",
    "undo_act",
]
