"""What the names of files say: which configurations and splits a data set has, and in which files. Opens no data.

The same rules read a folder and the listing of a repository on the hub. A README.md whose YAML head names Parquet files
(`configs:`) decides; without one, names do:

- `{split}-000NN-of-000MM.parquet`, also `NAME-{split}-…` and with `_`, `{split}.parquet`, or any file in `{split}/`;
- in `data/`, which goes first, at the top, or in a folder that is named as the configuration is.

A split is called by any name that Hugging Face's datasets knows for it, in any case.
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
    # First what Zenodo and ImageCLEF call their files, while the split is named validation.
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DEFAULT = "default"
"""What Hugging Face calls the configuration that has no name."""
RESULTS = "results_medical"
"""Where our own exports lie, which must never be taken for data."""
MANIFEST = "rococap.json"
"""Stands in every folder that `export` filled."""

PARQUET = ".parquet"
CAPTIONS = "_captions.csv"
DEEPEST = 3
"""Folders below the top in which shards are looked for: data, a configuration, a split."""
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
    """`number` and `total` as they stand in the name, empty where they do not; `template` is the name around them.

    Files of one split and another `set` do not belong together; of sets the one of the lowest `rank` is taken.
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
    """The files of a data set by configuration and split; `unknown` are those whose names tell no split.

    `where` is what messages call the data set, and `again` what they tell to do about missing shards.
    """

    where: str
    files: Sequence[_File]
    unknown: Sequence[str]
    again: str
    default: str = ""

    def files_of(self, split: str, config: str = "") -> tuple[str, ...]:
        """The paths of a split's files in data set order; none if it is not there.

        Raises DatasetError where a configuration has to be chosen, a shard is missing, or several sets are there.
        """
        return self._choose(split, self._chosen(config))

    def splits(self, config: str = "") -> list[str]:
        """Those that `files_of` finds in a configuration, or would but for a missing shard."""
        there = {file.split for file in self.files if file.config == self._chosen(config) and not file.is_partial}
        return [split for split in SPLITS if split in there]

    def hints(self, split: str) -> str:
        """What else to tell of a split that is not there: who holds it, and which files tell no split."""
        configs = _listed(config for config in self._configs() if config and self._has(config, split))
        told = f" It is in the configuration {configs}: choose it with --config." if configs else ""
        if self.unknown:
            told += (
                f" The name of {_listed(self.unknown)} tells no split: to use "
                f"{'them' if len(self.unknown) > 1 else 'it'} as {split}, rename "
                f"{'each, such as the first' if len(self.unknown) > 1 else 'it'} to {renamed(self.unknown[0], split)}."
            )
        return told

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
        whole = [file for file in found if not file.is_partial]
        if found and not whole:
            raise DatasetError(
                f"{self.where} holds only a part of the split {split!r} ({found[0].path}): the hub converts no more "
                "than the first gigabytes of a data set. Use the data set's own files, which are on its branch main."
            )
        rank = min((file.rank for file in whole), default=0)
        first = [file for file in whole if file.rank == rank]
        sets = sorted({file.set for file in first})
        if len(sets) > 1:
            named = [next(file.path for file in first if file.set == one) for one in sets]
            raise DatasetError(
                f"{self.where} holds more than one set of files for the split {split!r} ({_listed(named)}): "
                "keep one, and move the others away."
            )
        self._require_whole(split, first)
        return tuple(file.path for file in _in_order(first))

    def _require_whole(self, split: str, files: Sequence[_File]) -> None:
        totals = sorted({file.total for file in files if file.total})
        numbers = [int(file.number) for file in files if file.number]
        if totals:
            is_one_set = len(totals) == 1 and len(set(numbers)) == len(files) and max(numbers) < int(totals[0])
            if not is_one_set or not all(file.total for file in files):
                folder = files[0].path.rpartition("/")[0]
                raise DatasetError(
                    f"{'/'.join(filter(None, (self.where, folder)))} holds shards of more than one set for the split "
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
    """The split of that name or alias, in any case."""
    return _SPLIT_OF.get(word.lower())


def read(
    paths: Iterable[str], where: str, readme: str = "", again: str = "Download them, then run this again."
) -> Layout:
    """The layout of a data set, from the relative paths of its files with forward slashes, and its README's text."""
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
    """The layout of a folder. Hidden folders are left out, and what lies deeper than shards do."""
    readme = root / "README.md"
    try:
        # What is no UTF-8 is no YAML either.
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        return read(_below(root, "", DEEPEST), where, text)
    except OSError as error:
        raise DatasetError(
            f"{error.filename} cannot be read ({error.strerror}): check the disk and its mode."
        ) from error


def _below(folder: Path, inside: str, depth: int) -> Iterator[str]:
    """What may be a shard, or says something about shards; a folder's pictures are passed over."""
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
    """What a file of an unknown split would be called as one of this split."""
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
    """Where shards without a total begin. The hub counts from 0000; who counts from 1 does so without zeros before it,
    or with a name; years and the like count from nowhere.
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
        if len(folders) < DEEPEST:
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
    """A file by its own name, or else by its folder's: None if neither tells a split."""
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
    """With another word before it a split counts only where a number and a total follow."""
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
    # Shards of other totals stay together, for the message that tells of two sets under one name.
    key = f"{folder}/{name[: match.start('number')] if number else name}"
    return _File(path, config, split, rank, set or key, number, total, template)


# ---- by README.md


def _stated(readme: str) -> list[dict[str, Any]]:
    """`configs` of the YAML head; none if it has none, or cannot be read, as Hugging Face's own viewer would not."""
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", readme, re.DOTALL)
    if head is None or "configs" not in head[1]:
        return []
    import yaml  # with the hub, and only for a README that has a head

    try:
        told = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return []
    configs = told.get("configs") if isinstance(told, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _from_readme(stated: Sequence[dict[str, Any]], paths: Sequence[str]) -> tuple[list[_File], list[str], str]:
    default = next((str(one.get("config_name", DEFAULT)) for one in stated if one.get("default") is True), DEFAULT)
    files: list[_File] = []
    unknown: list[str] = []
    for one in stated:
        name = str(one.get("config_name", DEFAULT))
        for split, path in _matched(one, paths):
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
    """Each split of a configuration with each of its files."""
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
    """`data_files` is a pattern or a list of them, which is all of train, or says which split each is of."""
    match data_files:
        case str():
            yield "train", [data_files]
        case dict():
            for split, patterns in data_files.items():
                yield str(split), _texts(patterns)
        case list():
            for one in data_files:
                if isinstance(one, dict):
                    yield str(one.get("split", "train")), _texts(one.get("path"))
            if texts := [one for one in data_files if isinstance(one, str)]:
                yield "train", texts


def _texts(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else [one for one in patterns or () if isinstance(one, str)]


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` stays within a folder, `**` does not; a folder stands for all below it."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern.rstrip("/"))
    said = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    made = "".join(
        said.get(part) or (part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
    return re.compile(made + ("" if len(parts) > 1 else "(?:/.*)?"))
