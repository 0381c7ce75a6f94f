"""Finds out which configurations and splits a data set has, and in which files, from file names and the README.

Opens no data file. The same rules apply to a local folder and to the file list of a repository on the hub. If the YAML
header of README.md lists Parquet files (`configs:`), it decides; otherwise the names do:

- `{split}-000NN-of-000MM.parquet`, also `NAME-{split}-…` and with `_`, `{split}.parquet`, or any file in `{split}/`;
- in `data/`, which takes precedence, at the top level, or in a folder named after the configuration.

A split is recognised by every name that Hugging Face's datasets knows for it, in upper or lower case.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rococap.errors import DatasetError

SPLITS = ("train", "validation", "test")

ALIASES = {
    "train": ("train", "training"),
    # First comes the name in the files of Zenodo and ImageCLEF, although the split is called validation.
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DEFAULT = "default"
"""Hugging Face's name for a configuration that has none."""
RESULTS = "results_medical"
"""The folder of our own exports, which must never be taken for data."""
MANIFEST = "rococap.json"
"""The file that marks a folder filled by `export`."""

PARQUET = ".parquet"
CAPTIONS = "_captions.csv"
MAX_DEPTH = 3
"""How many levels of folders below the root may hold shards: data, a configuration, a split."""
NAMES_IN_A_MESSAGE = 5

_SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
_WORDS = "|".join(sorted(_SPLIT_OF, key=len, reverse=True))
_NUMBER = r"(?P<number>\d+)(?:[-_]of[-_](?P<total>\d+)(?:[-_][0-9a-f]+)?)?"
_OF_SPLIT = re.compile(rf"(?P<name>.+[-_. ])?(?P<split>{_WORDS})(?:[-_.]?{_NUMBER})?", re.IGNORECASE)
_OF_NO_SPLIT = re.compile(r"(?P<name>.*?)(?P<number>\d+)(?:[-_]of[-_](?P<total>\d+))?.*", re.IGNORECASE)
_UNKNOWN = re.compile(r".*?(?P<rest>[-_]\d+[-_]of[-_]\d+.*)", re.IGNORECASE)
_PARTIAL = re.compile(rf"partial-(?P<split>{_WORDS})", re.IGNORECASE)
_EXPORTED = ("medical_captions_", "checkpoint_", "scores_", "compare_")

_IN_DATA, _AT_THE_TOP, _CSV, _IN_DEFAULT = range(4)


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a split. `number` and `total` are as spelled in its name, or ""; `template` is the name around them.

    Files of one split that differ in `set` do not belong together; only the sets with the lowest `rank` are considered.
    """

    path: str
    config: str
    split: str
    rank: int
    set: str
    number: str = ""
    total: str = ""
    template: str = ""
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a data set by configuration and split; `unknown` lists the paths whose names give no split.

    Messages call the data set `where`, and give the advice `again` about missing shards.
    """

    where: str
    files: Sequence[_File]
    unknown: Sequence[str]
    again: str
    default: str = ""

    def files_of(self, split: str, config: str = "") -> tuple[str, ...]:
        """Returns the paths of a split's files in data set order, or () if there is no such split.

        Raises DatasetError if a configuration has to be chosen, if a shard is missing, or if there are several sets of
        files.
        """
        return self._choose(split, self._chosen(config))

    def splits(self, config: str = "") -> list[str]:
        """Lists the splits of a configuration that `files_of` finds, or would find if no shard were missing."""
        found = {file.split for file in self.files if file.config == self._chosen(config) and not file.is_partial}
        return [split for split in SPLITS if split in found]

    def hints(self, split: str) -> str:
        """Explains the absence of a split: which configurations have it, and which files could be renamed to it."""
        configs = _listed(config for config in self._configs() if config and self._has(config, split))
        hint = f" It is in the configuration {configs}: choose it with --config." if configs else ""
        if self.unknown:
            hint += (
                f" The name of {_listed(self.unknown)} gives no split: to use "
                f"{'them' if len(self.unknown) > 1 else 'it'} as {split}, rename "
                f"{'each, the first' if len(self.unknown) > 1 else 'it'} to {renamed(self.unknown[0], split)}."
            )
        return hint

    def _configs(self) -> list[str]:
        return sorted({file.config for file in self.files})

    def _has(self, config: str, split: str) -> bool:
        return any((file.config, file.split) == (config, split) for file in self.files)

    def _chosen(self, config: str) -> str:
        configs = self._configs()
        if config in (DEFAULT, self.default):
            config = ""
        if config and config not in configs:
            named = [name or self.default or DEFAULT for name in configs]
            raise DatasetError(
                f"{self.where} has no configuration {config!r}. "
                + (f"Choose one of these with --config: {', '.join(named)}." if named else "Leave --config out.")
            )
        if config or not configs or "" in configs:
            return config
        if len(configs) > 1:
            raise DatasetError(
                f"{self.where} has several configurations ({_listed(configs)}): choose one with --config NAME."
            )
        return configs[0]

    def _choose(self, split: str, config: str) -> tuple[str, ...]:
        found = [file for file in self.files if (file.config, file.split) == (config, split)]
        complete = [file for file in found if not file.is_partial]
        if found and not complete:
            raise DatasetError(
                f"{self.where} has only a part of the split {split!r} ({found[0].path}): the hub converts only the "
                "first gigabytes of a data set. Use the data set's own files, which are on its branch main."
            )
        rank = min((file.rank for file in complete), default=0)
        first = [file for file in complete if file.rank == rank]
        sets = sorted({file.set for file in first})
        if len(sets) > 1:
            examples = [next(file.path for file in first if file.set == key) for key in sets]
            raise DatasetError(
                f"{self.where} has more than one set of files for the split {split!r} ({_listed(examples)}): "
                "keep one, and move the others away."
            )
        self._require_complete(split, first)
        return tuple(file.path for file in _in_order(first))

    def _require_complete(self, split: str, files: Sequence[_File]) -> None:
        totals = sorted({file.total for file in files if file.total})
        numbers = [int(file.number) for file in files if file.number]
        if totals:
            is_one_set = len(totals) == 1 and len(set(numbers)) == len(files) and max(numbers) < int(totals[0])
            if not is_one_set or not all(file.total for file in files):
                folder = files[0].path.rpartition("/")[0]
                raise DatasetError(
                    f"{'/'.join(filter(None, (self.where, folder)))} has shards of more than one set for the split "
                    f"{split!r} (of {', of '.join(totals)}): keep one set and move the others away."
                )
            self._require_numbers(split, files[0], int(totals[0]), set(range(int(totals[0]))) - set(numbers))
        elif len(numbers) == len(files) > 0 and files[0].template:
            first = _first_number(files)
            missing = set(range(first, max(numbers))) - set(numbers)
            self._require_numbers(split, files[0], max(numbers) + 1 - first, missing)

    def _require_numbers(self, split: str, like: _File, total: int, missing: Iterable[int]) -> None:
        missing = sorted(missing)
        if missing:
            width = len(like.number)
            listed = [like.template.format(f"{number:0{width}d}") for number in missing[:NAMES_IN_A_MESSAGE]]
            more = len(missing) - len(listed)
            raise DatasetError(
                f"{self.where} lacks {len(missing)} of the {total} shards of the split {split!r}: "
                f"{', '.join(listed)}{f' and {more} more' if more else ''}. {self.again}"
            )


def split_named(word: str) -> str | None:
    """The split with this name or alias, in upper or lower case; None if there is none."""
    return _SPLIT_OF.get(word.lower())


def read(
    paths: Iterable[str], where: str, readme: str = "", again: str = "Download them, then run this again."
) -> Layout:
    """Returns the layout of a data set, given the relative paths of its files with forward slashes.

    `readme` is the text of its README.md, `where` and `again` are for messages: see Layout.
    """
    kept = _without_exports([path for path in paths if not any(part.startswith(".") for part in path.split("/"))])
    parquet = [path for path in kept if path.lower().endswith(PARQUET)]
    if stated := _stated(readme):
        files, unknown, default = _from_readme(stated, parquet)
        if files:
            return Layout(where, files, unknown, again, default)
    files, unknown = _from_names(parquet)
    for path in kept:
        if "/" not in path and path.lower().endswith(CAPTIONS):
            _add(_captions(path), path, files, unknown)
    return Layout(where, files, unknown, again)


def local(root: Path, where: str) -> Layout:
    """Returns the layout of a folder. Ignores hidden folders, and those too deep for shards.

    Raises DatasetError if a folder or the README cannot be read.
    """
    readme = root / "README.md"
    try:
        # Text that is not UTF-8 is not YAML either.
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        return read(_below(root, "", MAX_DEPTH), where, text)
    except OSError as error:
        raise DatasetError(
            f"{error.filename} cannot be read ({error.strerror}): check the disk and its permissions."
        ) from error


def _below(folder: Path, inside: str, depth: int) -> Iterator[str]:
    """Yields the files that may be shards or mark an export; skips a folder's pictures."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if name.lower().endswith((PARQUET, CAPTIONS)) or name == MANIFEST:
                yield inside + name
            elif depth and entry.is_dir() and os.access(entry.path, os.R_OK | os.X_OK):
                yield from _below(Path(entry.path), f"{inside}{name}/", depth - 1)


def renamed(path: str, split: str) -> str:
    """The name under which a file of an unknown split would be recognised as one of this split."""
    folder, _, name = path.rpartition("/")
    slash = "/" if folder else ""
    if name.lower().endswith(CAPTIONS):
        return f"{ALIASES[split][0] if split in ALIASES else split}{CAPTIONS}"
    if match := _UNKNOWN.fullmatch(name):
        return f"{folder}{slash}{split}{match['rest']}"
    return f"{folder}{slash}{split}/{name}"


def _without_exports(paths: list[str]) -> list[str]:
    exported = {path.removesuffix(MANIFEST) for path in paths if path.endswith(f"/{MANIFEST}")}
    return [
        path
        for path in paths
        if not path.startswith(f"{RESULTS}/")
        and not path.rpartition("/")[2].lower().startswith(_EXPORTED)
        and not any(path.startswith(folder) for folder in exported)
    ]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - NAMES_IN_A_MESSAGE
    return ", ".join(names[:NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def _in_order(files: Sequence[_File]) -> list[_File]:
    return sorted(files, key=lambda file: (int(file.number or 0) if file.template else 0, file.path))


def _first_number(files: Sequence[_File]) -> int:
    """The number of the first shard, for shards whose names state no total.

    The hub counts from 0000. Files counted from 1 have no leading zeros, or a word before the number. Other numbers,
    such as years, have no first one: then the highest is returned, so that none counts as missing.
    """
    first = min(files, key=lambda file: int(file.number))
    is_padded = len(first.number) > 1 and first.number.startswith("0")
    if is_padded and first.path.rpartition("/")[2].lower() == first.number + PARQUET:
        return 0
    return int(first.number) if int(first.number) <= 1 else max(int(file.number) for file in files)


# ---- by name


def _from_names(paths: Iterable[str]) -> tuple[list[_File], list[str]]:
    files: list[_File] = []
    unknown: list[str] = []
    for path in sorted(paths):
        folders = [folder for folder in path.split("/")[:-1] if folder.lower() != "data"]
        if len(folders) < MAX_DEPTH:
            _add(_named(path, folders), path, files, unknown)
    return files, unknown


def _add(file: _File | None, path: str, files: list[_File], unknown: list[str]) -> None:
    if file is None:
        unknown.append(path)
    else:
        files.append(file)


def _captions(path: str) -> _File | None:
    split = split_named(path[: -len(CAPTIONS)])
    return None if split is None else _File(path, "", split, _CSV, path)


def _named(path: str, folders: Sequence[str]) -> _File | None:
    """Classifies a file by its own name, or else by its folder's; None if neither gives a split."""
    own = _own_split(path)
    last = folders[-1] if folders else ""
    if own and len(folders) < 2 and (not last or split_named(last) != split_named(own["split"])):
        return _numbered(path, _config(folders), split_named(own["split"]) or "", _rank(path, folders), own)
    if split := split_named(last):
        return _in_folder(path, split, folders[:-1])
    if partial := _PARTIAL.fullmatch(last):
        return _File(path, _config(folders[:-1]), _SPLIT_OF[partial["split"].lower()], _IN_DATA, last, is_partial=True)
    return None


def _own_split(path: str) -> re.Match[str] | None:
    """Matches the split in a file's name; after another word, only if a number and a total follow."""
    match = _OF_SPLIT.fullmatch(path.rpartition("/")[2][: -len(PARQUET)])
    return match if match and (match["total"] or not match["name"]) else None


def _config(folders: Sequence[str]) -> str:
    return "" if not folders or folders[0] == DEFAULT else folders[0]


def _rank(path: str, folders: Sequence[str]) -> int:
    if folders and folders[0] == DEFAULT:
        return _IN_DEFAULT
    return _IN_DATA if path.lower().startswith("data/") else _AT_THE_TOP


def _in_folder(path: str, split: str, folders: Sequence[str]) -> _File:
    name = path.rpartition("/")[2][: -len(PARQUET)]
    match = _own_split(path) or _OF_NO_SPLIT.fullmatch(name)
    folder = path.rpartition("/")[0]
    rank = _rank(path, folders)
    is_numbered = match is not None and bool(match["total"] or match["number"] == name or _own_split(path))
    if match is None or not is_numbered:
        return _File(path, _config(folders), split, rank, folder)
    return _numbered(path, _config(folders), split, rank, match, folder)


def _numbered(path: str, config: str, split: str, rank: int, match: re.Match[str], set: str = "") -> _File:
    folder, slash, name = path.rpartition("/")
    number, total = match["number"] or "", match["total"] or ""
    template = ""
    if number:
        end = match.end("total") if total else match.end("number")
        braces = {ord("{"): "{{", ord("}"): "}}"}
        before, after = (
            text.translate(braces) for text in (name[: match.start("number")], name[match.end("number") : end])
        )
        template = f"{folder.translate(braces)}{slash}{before}{{}}{after}{name[-len(PARQUET) :]}"
    # Shards that differ in their total share a key, so that a message can report two sets under one name.
    key = f"{folder}/{name[: match.start('number')] if number else name}"
    return _File(path, config, split, rank, set or key, number, total, template)


# ---- by the README


def _stated(readme: str) -> list[dict[str, Any]]:
    """The `configs` of the YAML header; [] if it has none or is invalid, as in Hugging Face's own viewer."""
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", readme, re.DOTALL)
    if head is None or "configs" not in head[1]:
        return []
    import yaml  # installed with huggingface_hub, and needed only for a README with a header

    try:
        header = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _from_readme(stated: Sequence[dict[str, Any]], paths: Sequence[str]) -> tuple[list[_File], list[str], str]:
    default = next(
        (str(config.get("config_name", DEFAULT)) for config in stated if config.get("default") is True), DEFAULT
    )
    files: list[_File] = []
    unknown: list[str] = []
    for config in stated:
        name = str(config.get("config_name", DEFAULT))
        for split, path in _matched(config, paths):
            if known := split_named(split):
                files.append(_stated_file(path, "" if name == default else name, known))
            else:
                unknown.append(path)
    return files, sorted(set(unknown)), default


def _stated_file(path: str, config: str, split: str) -> _File:
    match = _own_split(path) or _OF_NO_SPLIT.fullmatch(path.rpartition("/")[2][: -len(PARQUET)])
    if match is None or not match["total"]:
        return _File(path, config, split, _IN_DATA, "")
    return _numbered(path, config, split, _IN_DATA, match, "README.md")


def _matched(config: dict[str, Any], paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (split, path) for each split of a configuration and each of its files."""
    folder = str(config.get("data_dir") or "").strip("/")
    inside = f"{folder}/" if folder not in ("", ".") else ""
    if "data_files" not in config:
        if inside:
            below = {path.removeprefix(inside): path for path in paths if path.startswith(inside)}
            for file in _from_names(below)[0]:
                yield file.split, below[file.path]
        return
    for split, patterns in _patterns(config["data_files"]):
        wanted = [_glob(inside + pattern.removeprefix("./")) for pattern in patterns]
        for path in paths:
            if any(pattern.fullmatch(path) for pattern in wanted):
                yield split, path


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields (split, patterns) from `data_files`: a pattern or a list, all of train, or entries that name a split."""
    match data_files:
        case str():
            yield "train", [data_files]
        case dict():
            for split, patterns in data_files.items():
                yield str(split), _texts(patterns)
        case list():
            for entry in data_files:
                if isinstance(entry, dict):
                    yield str(entry.get("split", "train")), _texts(entry.get("path"))
            if texts := [entry for entry in data_files if isinstance(entry, str)]:
                yield "train", texts


def _texts(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else [text for text in patterns or () if isinstance(text, str)]


def _glob(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern. `*` stays within a folder, `**` does not; a folder stands for everything below it."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern.rstrip("/"))
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(
        wildcards.get(part)
        or (part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
    return re.compile(regex + ("" if len(parts) > 1 else "(?:/.*)?"))
