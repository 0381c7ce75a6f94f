"""Errors that a user can act on. Every message names the next step."""


class RococapError(Exception):
    """An error that the user can act on; the command line prints it on one line and exits with code 1."""


class DatasetError(RococapError):
    """A data set, a shard or a download cannot be used as it is."""


class PictureError(RococapError):
    """One picture cannot be captioned: it fails alone, with `code`, and the rest of its batch goes on.

    The failure is permanent unless it is `transient`, in which case the picture is retried later. Codes are stable,
    because users group and retry failures by them: see `rococap failures`.
    """

    def __init__(self, code: str, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.transient = transient


class DatabaseError(RococapError):
    """A database cannot be opened, is not a rococap database, or has another schema version."""


class DatabaseUnavailable(DatabaseError):
    """A database is locked, full or unreachable for now: the same operation may succeed later.

    If a commit raises it, whether the transaction was committed is unknown.
    """


class RunError(RococapError):
    """A run does not exist, exists with another recipe or data set, or has no work of the kind asked for."""


class ModelError(RococapError):
    """A model cannot be loaded, or does not caption pictures."""


class ServerRefuses(ModelError):
    """A server refuses every request, whatever the picture. `reason` quotes the server."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class LeaseLost(RococapError):
    """The worker no longer holds the lease: nothing was written."""
