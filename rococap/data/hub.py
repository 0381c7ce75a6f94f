"""Data sets of the hub, in its own cache."""

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
    """The files of some splits, downloaded where they are not cached, and the README if it says which they are."""
    try:
        info = _ask(name, revision)
        if isinstance(info, Exception):
            root, paths = _from_cache(name, config, splits, revision, info)
        else:
            root, paths = _from_hub(name, config, splits, revision, info)
    except DatasetError:
        raise
    # Its errors have no base in common: OSError, ValueError, those of its HTTP client, RuntimeError from Xet.
    except Exception as error:
        raise DatasetError(_why(error, name, revision)) from error
    if lost := [path for path in paths if not (root / path).is_file()]:
        raise DatasetError(f"{root} lacks {lost[0]}, although it was downloaded: run this again.")
    return Dataset(full_name(name, config), root, root.name, config)


def _ask(name: str, revision: str | None) -> Any:
    """What the hub tells of a data set; its error, if the cache may do instead."""
    # Imported here, since it costs 0.3 s and a folder needs none of it.
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(name, revision=revision)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    # Those of its HTTP client differ by its version. Where the cache does not do either, the user is told this one.
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
    """What a whole cache holds. Raises the error of one that is not."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    root = Path(_fetch(name, revision, ["no file, but the folder"]))  # without a cache this tells why
    where = f"The data set {name} at {root.name}"
    found = layout.local(root, where)
    try:
        paths = _paths(found, where, config, splits)
    except DatasetError as lacking:
        raise LocalEntryNotFoundError(str(lacking)) from error
    # The files in a split's folder tell no total: the hub's own list of the commit, which is cached too, does.
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
    """The file in the hub's cache, without a word to the hub; a download that broke off is none. `kind` is "dataset"
    or "model".
    """
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repo, path, revision=revision, repo_type=kind)
    return file if isinstance(file, str) else None


def _why(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return (
                f"The data set {name} is gated: accept its terms at {constants.ENDPOINT}/datasets/{name}, "
                "log in with `hf auth login`, then run this again."
            )
        case errors.RepositoryNotFoundError() | errors.HFValidationError():
            return (
                f"There is no data set {name} on the hub, nor a folder of that name here, or you have no access: "
                "check the name, or log in with `hf auth login`."
            )
        case errors.RevisionNotFoundError():
            return (
                f"The data set {name} has no revision {revision}: "
                f"choose one of {constants.ENDPOINT}/datasets/{name}/commits."
            )
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, and the data set {name} is not whole in the cache {constants.HF_HUB_CACHE}: "
                "unset it and run this again, or give a folder."
            )
        case _ if _refused(error):
            return (
                f"The hub refuses access to the data set {name} ({reason(error)}): "
                "log in with `hf auth login`, with a token that may read it."
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"The hub at {constants.ENDPOINT} cannot be used ({reason(error)}), and the data set {name} is not "
                f"whole in the cache {constants.HF_HUB_CACHE}: check the network, then run this again; "
                "whole files are kept."
            )
        case OSError(errno=int(number)):
            full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            return (
                f"The data set {name} cannot be written to the cache {constants.HF_HUB_CACHE} "
                f"({os.strerror(number)}): {'free some space' if full else 'check the folder'}, or set HF_HOME to "
                "another disk, then run this again; whole files are kept."
            )
    return f"The download of {name} broke off ({reason(error)}): run this again; whole files are kept."


def _refused(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return any(
        isinstance(each, HfHubHTTPError) and each.response.status_code in (401, 403)
        for each in (error, error.__cause__)
    )


def reason(error: Exception) -> str:
    """One line, from where the trouble began."""
    origin = error.__cause__ or error
    return next(iter(str(origin).strip().splitlines()), type(origin).__name__)
