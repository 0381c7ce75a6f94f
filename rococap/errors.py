"""Errors that a user can act on. Every message names the next step."""


class RococapError(Exception):
    """Something a user can act on; the command line prints it in one line and exits with code 1."""


class DatasetError(RococapError):
    """A data set, a shard or a download that cannot be used as it is."""


class PictureError(RococapError):
    """One picture that cannot be captioned: it fails alone, with `code`, and never its batch.

    For ever, unless it is `transient`: then it is tried again later. Codes are stable, since people group and retry by
    them: see `rococap failures`.
    """

    def __init__(self, code: str, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.transient = transient


class DatabaseError(RococapError):
    """A database that cannot be opened or is locked, is not ours, or has another schema."""


class DatabaseUnavailable(DatabaseError):
    """A database that is locked, full or away for now: the same may succeed later.

    Raised at a commit, it leaves open whether that happened.
    """


class RunError(RococapError):
    """A run that does not exist, or that exists with another recipe or data set."""


class ModelError(RococapError):
    """A model that cannot be loaded, or that does not caption pictures."""


class ServerRefuses(ModelError):
    """A server that refuses whatever it is asked, which is no picture's fault. `reason` quotes it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class LeaseLost(RococapError):
    """The lease is no longer this worker's: nothing was written."""
