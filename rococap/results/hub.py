"""Pushing a folder to a data set of the Hugging Face hub."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rococap import __version__
from rococap.data.hub import reason
from rococap.errors import RococapError
from rococap.files import read_json
from rococap.results.manifest import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi
from rococap.results.manifest import as_options, is_another, is_ours, lost_splits


@dataclass(frozen=True, slots=True)
class Pushed:
    url: str
    private: bool


def check_login() -> None:
    """Raises RococapError if the hub is away or does not know who is asking: before work is done for it."""
    from huggingface_hub import HfApi

    with _pushing("to the hub"):
        HfApi().whoami()


def push(folder: Path, repo: str, message: str) -> Pushed:
    """Uploads a folder of the format hf to a data set of the hub. A new one is made, and is private; of an old one,
    the shards that an earlier push left there are removed.

    Raises RococapError if the hub refuses or is away, or if the repository holds what rococap did not push, another
    run's captions, or a split that the folder lacks.
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
            there = _pushed_manifest(api, repo, info.sha) if MANIFEST in names else None
            _check_pushable(repo, there, read_json(folder / MANIFEST) or {})
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
        # What is no manifest at all is another tool's.
        with suppress(RococapError):
            return read_json(Path(path))
    return None


def _check_pushable(repo: str, there: dict[str, Any] | None, new: dict[str, Any]) -> None:
    if not is_ours(there):
        raise RococapError(
            f"{repo} holds a data set that rococap did not push, and is left as it is: --push a new name."
        )
    if is_another(there, new):
        raise RococapError(
            f"{repo} holds another export (run {there.get('run')}, format {there.get('format')}), and is left as it "
            "is: --push a new name."
        )
    if others := lost_splits(there, new):
        raise RococapError(
            f"{repo} also holds {', '.join(others)}, which would be lost: export every split that it is to hold "
            f"({as_options(others, new)}), or --push a new name."
        )


@contextmanager
def _pushing(repo: str, folder: Path | None = None) -> Iterator[None]:
    try:
        yield
    # Its errors have no base in common: OSError, ValueError, those of its HTTP client, RuntimeError from Xet.
    except Exception as error:
        why_not = str(error) if isinstance(error, RococapError) else _why_not(error, repo)
        whole = f" The folder is whole: {folder}" if folder else ""
        raise RococapError(why_not + whole) from error


def _why_not(error: Exception, repo: str) -> str:
    from huggingface_hub import constants, errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, and nothing can be pushed: unset it and run this again."
        case errors.LocalTokenNotFoundError():
            return "You are not logged in to the hub: hf auth login, with a token that may write, then run this again."
        case errors.HFValidationError():
            return f"{repo!r} names no repository: give --push OWNER/NAME."
    if status == 401:
        return "The hub does not know this token: hf auth login, or correct HF_TOKEN, then run this again."
    if status in (403, 404):
        return f"You may not write to {repo} on the hub: hf auth login with a token that may, or --push another name."
    return f"The hub at {constants.ENDPOINT} cannot be used ({reason(error)}): check the network, then run this again."
