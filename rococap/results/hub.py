"""Pushes a published folder to a data set repository on the Hugging Face hub. Knows neither runs nor the database."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rococap import __version__
from rococap.data.hub import reason
from rococap.data.layout import MANIFEST
from rococap.errors import RococapError
from rococap.files import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
from rococap.results.manifest import as_options, is_another, is_ours, lost_splits


@dataclass(frozen=True, slots=True)
class Pushed:
    """The repository's address, and whether only its owner can read it."""

    url: str
    private: bool


def check_login() -> None:
    """Raises RococapError if the hub cannot be reached or the user is not logged in.

    Call it before an export that is to be pushed, so that hours of work do not end in a failed login.
    """
    from huggingface_hub import HfApi

    with _pushing("to the hub"):
        HfApi().whoami()


def push(folder: Path, repo: str, message: str) -> Pushed:
    """Uploads a folder in the format hf to a data set repository on the hub, with `message` as the commit message.

    A repository that does not exist is created, and is private. Shards of an earlier push are replaced.

    Raises RococapError if the hub cannot be reached or denies access, or if the repository holds files that rococap did
    not push, captions of another run, or a split that the folder lacks.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="rococap", library_version=__version__)
    with _pushing(repo, folder):
        repo = api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True).repo_id
        info = api.dataset_info(repo)
        names = {file.rfilename for file in info.siblings or []}
        if names - {".gitattributes"}:
            existing = _pushed_manifest(api, repo, info.sha) if MANIFEST in names else None
            _check_pushable(repo, existing, read_json(folder / MANIFEST) or {})
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            commit_message=message,
            delete_patterns="data/*.parquet",
        )
    return Pushed(f"{api.endpoint}/datasets/{repo}", bool(info.private))


def _pushed_manifest(api: "HfApi", repo: str, commit: str | None) -> dict[str, Any] | None:
    with TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo, MANIFEST, repo_type="dataset", revision=commit, cache_dir=cache)
        # A file of this name that is not JSON was written by another tool.
        with suppress(RococapError):
            return read_json(Path(path))
    return None


def _check_pushable(repo: str, existing: dict[str, Any] | None, new: dict[str, Any]) -> None:
    if not is_ours(existing):
        raise RococapError(
            f"{repo} holds a data set that rococap did not push, and was left unchanged. Give another name to --push."
        )
    if is_another(existing, new):
        raise RococapError(
            f"{repo} holds another export (run {existing.get('run')}, format {existing.get('format')}), and was left "
            "unchanged. Give another name to --push."
        )
    if others := lost_splits(existing, new):
        raise RococapError(
            f"{repo} also holds {', '.join(others)}, which this push would delete. Export all of its splits "
            f"({as_options(others, new)}), or give another name to --push."
        )


@contextmanager
def _pushing(repo: str, folder: Path | None = None) -> Iterator[None]:
    try:
        yield
    # huggingface_hub's errors share no base class: OSError, ValueError, its HTTP client's, RuntimeError from Xet.
    except Exception as error:
        message = str(error) if isinstance(error, RococapError) else _explained(error, repo)
        kept = f" The exported folder is complete: {folder}" if folder else ""
        raise RococapError(message + kept) from error


def _explained(error: Exception, repo: str) -> str:
    """Why the push failed and what to do about it, in one line."""
    from huggingface_hub import constants, errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.OfflineModeIsEnabled():
            return "Nothing can be pushed while HF_HUB_OFFLINE is set: unset it and run this again."
        case errors.LocalTokenNotFoundError():
            return "You are not logged in to the hub: run hf auth login with a write token, then run this again."
        case errors.HFValidationError():
            return f"{repo!r} is not a valid repository name: give --push OWNER/NAME."
    if status == 401:
        return "The hub rejected the token: run hf auth login or correct HF_TOKEN, then run this again."
    if status in (403, 404):
        return (
            f"You have no write access to {repo} on the hub: run hf auth login with a token that has, or give another "
            "name to --push."
        )
    return (
        f"The hub at {constants.ENDPOINT} cannot be reached ({reason(error)}): check the network, then run this again."
    )
