"""What locate does with a hub: a real huggingface_hub in a process of its own against a server on loopback."""

import errno
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub, Repo

from rococap.data.datasets import find_shards
from rococap.data.hub import _why

NAME = "radiology/roco"
PYTHON = """
import json, sys
from rococap.data.datasets import locate
from rococap.errors import DatasetError
name, splits, revision, config = json.loads(sys.argv[1])
try:
    found = locate(name, splits, revision, config)
    print(json.dumps({"name": found.name, "root": str(found.root), "revision": found.revision}))
except DatasetError as error:
    print(json.dumps({"error": str(error)}))
"""


def shard_bytes(number, size=200_000):
    table = pa.table(
        {
            "image": [{"bytes": os.urandom(size), "path": None}],
            "image_id": [f"ROCOv2_2023_train_{number:06d}"],
            "caption": ["A caption."],
            "cui": [["C0040405"]],
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def files():
    names = [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    parquet = {name: shard_bytes(number) for number, name in enumerate(names)}
    return {
        "README.md": b"# ROCO",
        ".gitattributes": b"* lfs",
        "data/train_captions.csv": b"ID,Caption",
    } | parquet


@pytest.fixture
def hub(files):
    with Hub({NAME: Repo(files)}) as hub:
        yield hub


def environment(hub, home, **extra):
    """No token, proxy or cache of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    return kept | {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "HF_HUB_ETAG_TIMEOUT": "60",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        **extra,
    }


def located(hub, home, splits=("train",), revision=None, name=NAME, limit=None, config="", **extra):
    run = subprocess.run(
        [sys.executable, "-c", PYTHON, json.dumps([name, splits, revision, config])],
        env=environment(hub, home, **extra),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def cached(home):
    snapshots = home / "hub" / "datasets--radiology--roco" / "snapshots"
    return sorted(path.relative_to(snapshots).as_posix() for path in snapshots.glob("*/**/*.parquet"))


def test_only_the_files_of_the_splits_are_fetched(hub, files, tmp_path):
    found = located(hub, tmp_path / "home", ["train", "test"])
    assert hub.fetched() == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    root = Path(found["root"])
    there = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert there == {path: files[path] for path in hub.fetched()}
    assert [shard.path for shard in find_shards(root, "train")] == hub.fetched()[1:]


def test_shards_at_the_top_of_a_repository_are_fetched(files, tmp_path):
    top = {path.removeprefix("data/"): data for path, data in files.items()}
    with Hub({NAME: Repo(top)}) as hub:
        located(hub, tmp_path / "home", ["validation"])
        assert hub.fetched() == ["validation-00000-of-00001.parquet"]


def test_the_commit_is_recorded(hub, tmp_path):
    commit = hub.repos[NAME].commit
    hub.repos[NAME].branches["v1"] = commit
    for revision in (None, "v1", commit):
        found = located(hub, tmp_path / "home", ["test"], revision)
        assert (found["name"], found["revision"]) == (NAME, commit)


def test_what_is_cached_is_not_fetched_again(hub, tmp_path):
    first = located(hub, tmp_path / "home", ["test"])
    hub.requests.clear()
    assert located(hub, tmp_path / "home", ["test"]) == first
    assert hub.fetched() == []


@pytest.mark.slow
def test_a_connection_cut_in_the_middle_goes_on_where_it_was(hub, files, tmp_path):
    # huggingface_hub writes in chunks of 10 MiB, so that the start of a chunk is what it goes on from.
    chunk, path = 10 << 20, "data/test-00000-of-00001.parquet"
    files[path] = shard_bytes(3, size=3 * chunk)
    hub.cut[path] = [chunk + 50_000, chunk + 70_000]
    found = located(hub, tmp_path / "home", ["test"])
    whole = (Path(found["root"]) / path).read_bytes()
    assert sha256(whole).hexdigest() == sha256(files[path]).hexdigest()
    ranges = [request.range for request in hub.requests if request.method == "GET" and path in request.path]
    assert ranges == [None, f"bytes={chunk}-", f"bytes={2 * chunk}-"]


def test_a_reset_connection_is_an_error_and_a_second_call_ends_the_work(hub, files, tmp_path):
    broken, whole = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
    hub.reset[broken] = [1_000]
    hub.stall.add(broken)  # until the other is whole
    commit = hub.repos[NAME].commit

    def go_on() -> None:
        while cached(tmp_path / "home") != [f"{commit}/{whole}"]:
            time.sleep(0.02)
        hub.go_on.set()

    threading.Thread(target=go_on, daemon=True).start()
    error = located(hub, tmp_path / "home")["error"]
    assert error.startswith(f"The download of {NAME} failed (")
    assert error.endswith("): run this again; complete files are kept.")
    assert cached(tmp_path / "home") == [f"{commit}/{whole}"]
    hub.requests.clear()
    found = located(hub, tmp_path / "home")
    assert hub.fetched() == [broken]
    assert (Path(found["root"]) / broken).read_bytes() == files[broken]


def test_a_killed_download_keeps_the_files_that_are_whole(hub, files, tmp_path):
    stalled, whole = "data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"
    hub.stall.add(stalled)
    process = subprocess.Popen(
        [sys.executable, "-c", PYTHON, json.dumps([NAME, ["train"], None, ""])], env=environment(hub, tmp_path / "home")
    )
    commit = hub.repos[NAME].commit
    try:
        assert hub.stalled.wait(60)
        while cached(tmp_path / "home") != [f"{commit}/{whole}"]:
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    hub.stall.clear()
    hub.go_on.set()
    hub.requests.clear()
    found = located(hub, tmp_path / "home")
    assert hub.fetched() == [stalled]
    assert (Path(found["root"]) / stalled).read_bytes() == files[stalled]


def test_offline_a_whole_cache_is_enough(hub, tmp_path):
    online = located(hub, tmp_path / "home", ["test"])
    hub.requests.clear()
    assert located(hub, tmp_path / "home", ["test"], HF_HUB_OFFLINE="1") == online
    assert hub.requests == []


@pytest.mark.parametrize("before", [[], ["validation"]], ids=["empty cache", "another split"])
def test_offline_a_cache_that_is_not_whole_is_an_error(hub, tmp_path, before):
    home = tmp_path / "home"
    if before:
        located(hub, home, before)
    assert located(hub, home, ["test"], HF_HUB_OFFLINE="1") == {
        "error": f"HF_HUB_OFFLINE is set, and the data set {NAME} is not complete in the cache {home}/hub: "
        "unset it and run this again, or give a folder."
    }


def test_offline_a_split_cached_in_part_is_an_error(hub, tmp_path):
    found = located(hub, tmp_path / "home")
    (Path(found["root"]) / "data" / "train-00001-of-00002.parquet").unlink()
    assert "is not complete in the cache" in located(hub, tmp_path / "home", HF_HUB_OFFLINE="1")["error"]


def test_a_hub_that_is_gone_is_an_error(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        found = located(url, tmp_path / "home")  # while nobody else can listen there
    assert found == {
        "error": f"The hub at {url} cannot be used ([Errno 111] Connection refused), and the data set {NAME} is not "
        f"complete in the cache {tmp_path}/home/hub: check the network, then run this again; complete files are kept."
    }


def test_a_hub_in_trouble_is_an_error(hub, tmp_path):
    hub.repos[NAME].status = 503
    error = located(hub, tmp_path / "home")["error"]
    assert error.startswith(f"The hub at {hub.url} cannot be used (Server error '503 Service Unavailable' for url ")
    assert error.endswith("check the network, then run this again; complete files are kept.")


def test_a_token_that_may_not_read_the_data_set_is_an_error(hub, tmp_path):
    hub.repos[NAME].status = 403
    error = located(hub, tmp_path / "home")["error"]
    assert error.startswith(f"The hub refuses access to the data set {NAME} (")
    assert error.endswith("): log in with `hf auth login` and a token that may read it.")


def test_without_the_hub_a_whole_cache_is_enough(hub, tmp_path):
    online = located(hub, tmp_path / "home", ["test"])
    hub.stop()
    assert located(hub, tmp_path / "home", ["test"]) == online


def test_a_data_set_that_does_not_exist_is_an_error(hub, tmp_path):
    assert located(hub, tmp_path / "home", name="radiology/rocco") == {
        "error": "There is no data set radiology/rocco on the hub that you have access to, nor a folder of "
        "that name here: check the name, or log in with `hf auth login`."
    }


@pytest.mark.parametrize("revision", ["v9", "0123456789" * 4])
def test_a_revision_that_does_not_exist_is_an_error(hub, tmp_path, revision):
    assert located(hub, tmp_path / "home", revision=revision) == {
        "error": f"The data set {NAME} has no revision {revision}: choose one of {hub.url}/datasets/{NAME}/commits."
    }


def test_a_gated_data_set_is_an_error(hub, tmp_path):
    hub.repos[NAME].gated = True
    assert located(hub, tmp_path / "home") == {
        "error": f"The data set {NAME} is gated: accept its terms at {hub.url}/datasets/{NAME}, "
        "log in with `hf auth login`, then run this again."
    }


def test_a_split_that_the_data_set_lacks_is_an_error(hub, tmp_path):
    commit = hub.repos[NAME].commit
    assert located(hub, tmp_path / "home", ["train", "dev"]) == {
        "error": f"The data set {NAME} at {commit} has no Parquet files for the split 'dev': "
        "choose another split or revision, or give a folder."
    }


def test_a_data_set_that_lacks_a_shard_is_an_error(files, tmp_path):
    del files["data/train-00001-of-00002.parquet"]
    with Hub({NAME: Repo(files)}) as hub:
        assert "train-00001-of-00002.parquet" in located(hub, tmp_path / "home")["error"]


def test_a_file_that_does_not_fit_is_an_error(hub, tmp_path):
    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert located(hub, tmp_path / "home", limit=small_files_only) == {
        "error": f"The data set {NAME} cannot be written to the cache {tmp_path}/home/hub (File too large): "
        "free some space, or set HF_HOME to another disk, then run this again; complete files are kept."
    }


def test_a_full_disk_is_named_as_such():
    said = _why(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), NAME, None)
    assert "(No space left on device): free some space, or set HF_HOME to another disk" in said


def test_a_cache_that_cannot_be_written_is_an_error(hub, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file where the folder should be")
    assert located(hub, tmp_path / "home") == {
        "error": f"The data set {NAME} cannot be written to the cache {tmp_path}/home/hub (Not a directory): "
        "check the folder, or set HF_HOME to another disk, then run this again; complete files are kept."
    }


# --- other layouts ---------------------------------------------------------------------------------------------

CONVERTED = "refs/convert/parquet"


def repo(*names, **texts):
    return Repo({name: shard_bytes(number, size=100) for number, name in enumerate(names)} | texts)


def fetched_of(hub, home, *args, **kwargs):
    hub.requests.clear()
    found = located(hub, home, *args, **kwargs)
    assert "error" not in found, found
    return hub.fetched()


def test_only_the_wanted_splits_files_are_fetched_whatever_they_are_called(tmp_path):
    names = ["roco-train-00000-of-00001.parquet", "dev/0000.parquet", "dev/0001.parquet", "data/Test.parquet", "a.bin"]
    with Hub({NAME: repo(*names)}) as hub:
        assert fetched_of(hub, tmp_path, ["train"]) == names[:1]
        assert fetched_of(hub, tmp_path, ["validation", "test"]) == ["data/Test.parquet", *names[1:3]]


@pytest.mark.slow
def test_a_configuration_is_chosen_and_stands_in_the_name(tmp_path):
    names = ["axial/train-00000-of-00001.parquet", "coronal/train/0000.parquet", "coronal/val/0000.parquet"]
    with Hub({NAME: repo(*names)}) as hub:
        assert located(hub, tmp_path)["error"] == (
            f"The data set {NAME} at {hub.repos[NAME].commit} has several configurations (axial, coronal): choose one "
            "with --config NAME."
        )
        found = located(hub, tmp_path, config="coronal")
        assert (found["name"], hub.fetched()) == (f"{NAME}:coronal", names[1:2])
        assert [shard.path for shard in find_shards(Path(found["root"]), "train", "coronal")] == names[1:2]
        assert located(hub, tmp_path, name=f"{NAME}:coronal") == found
        assert "has no configuration 'sagittal'" in located(hub, tmp_path, config="sagittal")["error"]
        hub.stop()
        assert located(hub, tmp_path, name=f"{NAME}:coronal", revision=found["revision"]) == found


@pytest.mark.slow
@pytest.mark.parametrize("config", ["", "default"])
def test_the_hubs_converted_branch_has_a_lone_configuration(tmp_path, config):
    converted = repo("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet")
    converted.branches[CONVERTED] = converted.commit
    with Hub({NAME: converted}) as hub:
        found = located(hub, tmp_path, revision=CONVERTED, config=config)
        assert (found["name"], found["revision"]) == (NAME, converted.commit)
        assert hub.fetched() == ["default/train/0000.parquet", "default/train/0001.parquet"]
        assert located(hub, tmp_path, revision=CONVERTED, HF_HUB_OFFLINE="1") == found
        (Path(found["root"]) / "default" / "train" / "0001.parquet").unlink()
        told = located(hub, tmp_path, revision=CONVERTED, HF_HUB_OFFLINE="1")["error"]
        assert "is not complete in the cache" in told


def test_what_the_hub_converted_in_part_is_refused_before_anything_is_fetched(tmp_path):
    with Hub({NAME: repo("default/partial-train/0000.parquet")}) as hub:
        assert "has only a part of the split 'train'" in located(hub, tmp_path)["error"]
        assert hub.fetched() == []


def test_a_readme_that_names_files_decides_also_offline(tmp_path):
    text = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part/b*\n---\n"
    readme = {"README.md": text.encode()}
    with Hub({NAME: repo("part/a.parquet", "part/b.parquet", "train.parquet", **readme)}) as hub:
        found = located(hub, tmp_path)
        assert hub.fetched() == ["README.md", "part/b.parquet"]
        assert [shard.path for shard in find_shards(Path(found["root"]), "train")] == ["part/b.parquet"]
        hub.requests.clear()
        assert located(hub, tmp_path, HF_HUB_OFFLINE="1") == found
        assert hub.requests == []


def test_files_of_unknown_splits_are_named_with_what_to_rename_them_to(tmp_path):
    with Hub({NAME: repo("data/fold1-00000-of-00001.parquet")}) as hub:
        assert located(hub, tmp_path)["error"] == (
            f"The data set {NAME} at {hub.repos[NAME].commit} has no Parquet files for the split 'train': choose "
            "another split or revision, or give a folder. The name of data/fold1-00000-of-00001.parquet gives no "
            "split: to use it as train, rename it to data/train-00000-of-00001.parquet."
        )
