"""Captions over HTTP, by a real server with the demo model: what is asked, what is answered, what fails."""

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import picture, register, write_shard
from steps import select
from web_server import Served, captioning

from rococap import db
from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw
from rococap.engines import Options
from rococap.recipe import Recipe
from rococap.worker.process import work
from rococap.worker.settings import Settings

RECIPE = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
BROKEN = b"\x89PNG\r\n\x1a\n, and nothing more"
BLANK = 11
"""The number of a picture that is a single colour."""


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PICTURES = [png(draw(seed).image) for seed in HELD_OUT_SEEDS["validation"][:10]] + [BROKEN, picture(BLANK)]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A queue whose run was captioned by a worker."""
    folder: Path = tmp_path_factory.mktemp("queue")
    url = f"sqlite:///{folder}/queue.db"
    database = db.connect(url)
    write_shard(folder / "set", "train", range(len(PICTURES)), pictures=dict(enumerate(PICTURES)))
    register(database, folder / "set", ["train"], recipe=RECIPE)
    work(database, Settings(options=Options(device="cpu"), self_check=False))
    database.dispose()
    return url


@pytest.fixture(scope="module")
def beside(worked: str) -> Iterator[Served]:
    """A server with the run's recipe, beside its pages."""
    with captioning(worked, "--run", "default", "--device", "cpu") as served:
        yield served


@pytest.fixture(scope="module")
def alone() -> Iterator[Served]:
    """A server without a database."""
    options = ("--max-new-tokens", "64", "--dtype", "float32", "--device", "cpu", "--max-waiting", "8")
    with captioning(None, "--model", str(MODEL), *options) as served:
        yield served


def stored(url: str) -> list[dict[str, Any]]:
    """What the worker stored for each picture, as the API answers it."""
    database = db.connect(url)
    rows = select(
        database,
        "SELECT c.text, c.flags, c.finish_reason, c.prompt_tokens, c.new_tokens, f.code FROM jobs j "
        "LEFT JOIN captions c ON c.job_id = j.id LEFT JOIN failures f ON f.job_id = j.id ORDER BY j.id",
    )
    database.dispose()
    return [
        {
            "caption": text,
            "flags": [flag for flag in (flags or "").split(",") if flag],
            "finish_reason": finish_reason,
            "prompt_tokens": prompt_tokens or 0,
            "new_tokens": new_tokens or 0,
            "failure": code,
        }
        for text, flags, finish_reason, prompt_tokens, new_tokens, code in rows
    ]


def listed(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [caption | {"failure": (caption["failure"] or {}).get("code")} for caption in answer.json()["captions"]]


def form(*pictures: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", ("picture", data)) for data in pictures]


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def error_of(answer: Any) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["message"]


# --- what is answered ------------------------------------------------------------------------------------------


def test_captions_flags_and_failures_are_the_workers_letter_by_letter(beside, worked):
    answer = beside.client.post("/v1/captions", files=form(*PICTURES))
    assert listed(answer) == stored(worked)
    assert len({caption["caption"] for caption in listed(answer)}) > 8
    assert listed(answer)[BLANK]["flags"] == ["blank"]
    assert (answer.json()["model"], answer.json()["recipe_hash"]) == (MODEL.name, RECIPE.hash)


def test_json_with_base64_or_data_urls_is_answered_as_a_form_is(alone, worked):
    images = [in_base64(PICTURES[0]), f"data:image/png;base64,{in_base64(PICTURES[1])}", in_base64(BROKEN)]
    expected = stored(worked)
    answer = alone.client.post("/v1/captions", json={"images": images})
    assert listed(answer) == [expected[0], expected[1], expected[10]]
    assert "replace it at its source" in answer.json()["captions"][2]["failure"]["message"]
