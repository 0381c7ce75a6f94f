"""Downloads data sets from the Hugging Face hub into the hub's own cache. Reads neither rows nor pictures."""

import errno
import os
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from rococap.data import layout
from rococap.data.layout import Layout
from rococap.data.places import Dataset, full_name
from rococap.errors import DatasetError

README = "README.md"
ANY = "*.parquet"


def download(name: str, config: str, splits: Sequence[str], revision: str | None) -> Dataset:
    """Downloads the Parquet files of some splits unless they are cached, and the README if it lists them.

    Makes do with the cache if the hub cannot be reached. Raises DatasetError with the reason and the next step.
    """
    try:
        info = _ask(name, revision)
        if isinstance(info, Exception):
            root, paths = _from_cache(name, config, splits, revision, info)
        else:
            root, paths = _from_hub(name, config, splits, revision, info)
    except DatasetError:
        raise
    # The hub's errors share no base class: OSError, ValueError, those of its HTTP client, RuntimeError from Xet.
    except Exception as error:
        raise DatasetError(_why(error, name, revision)) from error
    if missing := [path for path in paths if not (root / path).is_file()]:
        raise DatasetError(f"{root} lacks {missing[0]}, although it was downloaded: run this again.")
    return Dataset(full_name(name, config), root, root.name, config)


def _ask(name: str, revision: str | None) -> Any:
    """Returns the hub's description of a data set, or the error if the cache may serve instead."""
    # Imported here because the import takes 0.3 s, and a local folder does not need it.
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(name, revision=revision)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    # The HTTP client's errors depend on its version. If the cache cannot serve either, this error is the one reported.
    except Exception as error:
        return error


def _from_hub(name: str, config: str, splits: Sequence[str], revision: str | None, info: Any) -> tuple[Path, list[str]]:
    listing = [file.rfilename for file in info.siblings or ()]
    where = f"The data set {name} at {info.sha}"
    readme = ""
    if README in listing and "configs" in (info.card_data or {}):
        readme = (Path(_fetch(name, revision, [README])) / README).read_text(encoding="utf-8")
    paths = _paths(_layout(where, listing, readme), where, config, splits)
    return Path(_fetch(name, revision, paths)), paths


def _from_cache(
    name: str, config: str, splits: Sequence[str], revision: str | None, error: Exception
) -> tuple[Path, list[str]]:
    """Returns the snapshot folder and the paths of splits that are cached. Raises LocalEntryNotFoundError otherwise."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    root = Path(_fetch(name, revision, ["no file, but the folder"]))  # raises if nothing is cached
    where = f"The data set {name} at {root.name}"
    found = layout.local(root, where)
    try:
        paths = _paths(found, where, config, splits)
    except DatasetError as incomplete:
        raise LocalEntryNotFoundError(str(incomplete)) from error
    # Names in a split's folder state no total, but the hub's list of the commit's files, which is cached too, does.
    folders = {path.rpartition("/")[0] for path in paths}
    of_split = [f"{folder}/{ANY}" for folder in folders if layout.split_named(folder.rpartition("/")[2])]
    return Path(_fetch(name, revision, [*of_split, *paths])), paths


def _layout(where: str, listing: Sequence[str], readme: str) -> Layout:
    parquet = [path for path in listing if not path.lower().endswith(layout.CAPTIONS)]
    return layout.read(parquet, where, readme, again="Choose another revision: --dataset-revision REV")


def _paths(found: Layout, where: str, config: str, splits: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for split in splits:
        if not (of_split := found.files_of(split, config)):
            raise DatasetError(
                f"{where} has no Parquet files for the split {split!r}: choose another split or revision, or give a "
                f"folder.{found.hints(split)}"
            )
        paths += of_split
    return paths


def _fetch(name: str, revision: str | None, paths: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download

    patterns = [escape(path.removesuffix(ANY)) + (ANY if path.endswith(ANY) else "") for path in paths]
    return snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)


def cached(repo: str, path: str, revision: str, kind: str) -> str | None:
    """Returns the path of a file in the hub's cache, or None unless it was downloaded completely. Makes no request.

    `kind` is "dataset" or "model".
    """
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repo, path, revision=revision, repo_type=kind)
    return file if isinstance(file, str) else None


def _why(error: Exception, name: str, revision: str | None) -> str:
    """Explains in one line why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return (
                f"The data set {name} is gated: accept its terms at {constants.ENDPOINT}/datasets/{name}, "
                "log in with `hf auth login`, then run this again."
            )
        case errors.RepositoryNotFoundError() | errors.HFValidationError():
            return (
                f"There is no data set {name} on the hub that you have access to, nor a folder of that name here: "
                "check the name, or log in with `hf auth login`."
            )
        case errors.RevisionNotFoundError():
            return (
                f"The data set {name} has no revision {revision}: "
                f"choose one of {constants.ENDPOINT}/datasets/{name}/commits."
            )
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, and the data set {name} is not complete in the cache "
                f"{constants.HF_HUB_CACHE}: unset it and run this again, or give a folder."
            )
        case _ if _refused(error):
            return (
                f"The hub refuses access to the data set {name} ({reason(error)}): "
                "log in with `hf auth login` and a token that may read it."
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"The hub at {constants.ENDPOINT} cannot be used ({reason(error)}), and the data set {name} is not "
                f"complete in the cache {constants.HF_HUB_CACHE}: check the network, then run this again; "
                "complete files are kept."
            )
        case OSError(errno=int(number)):
            full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            return (
                f"The data set {name} cannot be written to the cache {constants.HF_HUB_CACHE} "
                f"({os.strerror(number)}): {'free some space' if full else 'check the folder'}, or set HF_HOME to "
                "another disk, then run this again; complete files are kept."
            )
    return f"The download of {name} failed ({reason(error)}): run this again; complete files are kept."


def _refused(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return any(
        isinstance(each, HfHubHTTPError) and each.response.status_code in (401, 403)
        for each in (error, error.__cause__)
    )


def reason(error: Exception) -> str:
    """The first line of the error's cause, or of the error itself if it has none."""
    root_cause = error.__cause__ or error
    return next(iter(str(root_cause).strip().splitlines()), type(root_cause).__name__)
