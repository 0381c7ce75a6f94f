"""Captions over HTTP, by a real server with the demo model: what is asked, what is answered, what fails."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from patient_server import HEAD, connected, status_of
from PIL import Image
from places import TESTS
from samples import picture, register, write_shard
from steps import select, until
from web_server import Served, loaded, running, serving

from rococap import db, prompts
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
    with serving(worked, "--run", "default", "--device", "cpu") as served:
        loaded(served)
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


def test_json_with_base64_or_data_urls_is_answered_as_a_form_is(beside, worked):
    images = [in_base64(PICTURES[0]), f"data:image/png;base64,{in_base64(PICTURES[1])}", in_base64(BROKEN)]
    expected = stored(worked)
    answer = beside.client.post("/v1/captions", json={"images": images})
    assert listed(answer) == [expected[0], expected[1], expected[10]]
    assert "replace it at its source" in answer.json()["captions"][2]["failure"]["message"]


def test_a_prompt_is_chosen_by_its_text_a_presets_name_or_a_run(beside):
    def answer(**chosen: str) -> Any:
        return beside.client.post("/v1/captions", data=chosen, files=form(PICTURES[0])).json()

    assert answer(run="default") == answer() == answer(prompt=RECIPE.prompt)
    named = answer(preset="findings")
    assert named == answer(prompt=prompts.find("findings").prompt)
    assert named["recipe_hash"] == replace(RECIPE, prompt=prompts.find("findings").prompt).hash


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no pictures": ({"json": {"images": []}}, "A request may have 1 to 64 pictures, not 0."),
    "too many": ({"json": {"images": ["AAAA"] * 65}}, "A request may have 1 to 64 pictures, not 65."),
    "no images": ({"json": {}}, "images: Field required."),
    "no JSON": ({"content": b"{"}, "The request: Invalid JSON: EOF while parsing an object at line 1 column 1."),
    "no base64": ({"json": {"images": ["A&A="]}}, "This is not base64: Only base64 data is allowed."),
    "an address": (
        {"json": {"images": ["https://example.org/a.png"]}},
        "The server fetches no pictures. Send the picture itself, as a data URL.",
    ),
    "another field": ({"json": {"images": ["AAAA"], "n": 2}}, "n: Extra inputs are not permitted."),
    "two prompts": (
        {"json": {"images": ["AAAA"], "prompt": "What?", "run": "default"}},
        "run and prompt exclude one another: give only one of them.",
    ),
    "a placeholder": (
        {"json": {"images": ["AAAA"], "prompt": "Is it {caption}?"}},
        "prompt contains {caption}, which would give the model the answer. Remove it.",
    ),
    "no such run": ({"json": {"images": ["AAAA"], "run": "other"}}, "There is no run 'other'. Runs: default."),
    "no form": (
        {"content": b"--", "headers": {"Content-Type": "multipart/form-data"}},
        "The form cannot be read: Missing boundary in multipart.",
    ),
    "another file": ({"files": {"file": b"AAAA"}}, "Pictures are sent in the field image."),
    "a picture as a text": (
        {"files": {"image": (None, "AAAA")}},
        "image is a text here. Pictures are sent as files, in the field image.",
    ),
    "a preset of a megabyte": (
        {"json": {"images": ["AAAA"], "preset": "x" * 1_000_000}},
        "A name has at most 200 characters, and no NUL.",
    ),
    "a run that no database can have": (
        {"json": {"images": ["AAAA"], "run": "a\0b"}},
        "A name has at most 200 characters, and no NUL.",
    ),
    "an address in capitals": (
        {"json": {"images": ["HTTPS://example.org/a.png"]}},
        "The server fetches no pictures. Send the picture itself, as a data URL.",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_request_that_cannot_be_understood_is_told_why(beside, name):
    request, message = MALFORMED[name]
    assert error_of(beside.client.post("/v1/captions", **request)) == (400, message)


def test_an_error_repeats_little_of_a_request(beside):
    answer = beside.client.post("/v1/captions", json={"images": ["AAAA"], "x" * 1_000_000: 2})
    assert answer.status_code == 400
    assert len(answer.content) < 1_000


def test_media_types_have_no_case(beside, worked):
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%b\r\n--b--\r\n' % PICTURES[0]
    headers = {"Content-Type": "Multipart/Form-Data; boundary=b"}
    assert listed(beside.client.post("/v1/captions", content=body, headers=headers)) == stored(worked)[:1]


def test_a_body_without_a_type_is_json(beside):
    captions = json.dumps({"images": [in_base64(PICTURES[0])]}).encode()
    chat = json.dumps({"model": MODEL.name, "messages": asking(PICTURES[0])}).encode()
    for path, body in (("captions", captions), ("chat/completions", chat)):
        assert beside.client.post(f"/v1/{path}", content=body).status_code == 200


def test_an_address_that_does_not_exist_is_told_so_and_leads_nowhere_else(beside):
    for path in ("/v1/captions/", "/v1/responses"):
        assert error_of(beside.client.post(path)) == (
            404,
            "There is no such address. Those of the API begin with /v1/, and /docs describes them.",
        )
    assert error_of(beside.client.put("/v1/models")) == (405, "This address does not take PUT.")


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(beside):
    with connected(beside, HEAD + b"Content-Length: 2000000000\r\n\r\n") as (connection,):
        assert status_of(connection) == 413


def test_a_request_that_names_a_run_while_the_database_is_away_may_be_sent_again(beside, worked):
    folder = Path(worked.removeprefix("sqlite:///")).parent
    asked = {"images": [in_base64(PICTURES[0])], "run": "default"}
    away = folder.rename(folder.with_name("away"))
    try:
        answer = beside.client.post("/v1/captions", json=asked)
    finally:
        away.rename(folder)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert beside.client.post("/v1/captions", json=asked).status_code == 200


def test_running_out_of_memory_fails_nobodys_request(worked):
    program = [str(TESTS / "small_memory.py"), "serve", "--port", "0", "--model", str(MODEL), "--dtype", "float32"]
    with running([*program, "--max-new-tokens", "64", "--device", "cpu", "--batch-size", "8"]) as served:
        loaded(served)
        assert listed(served.client.post("/v1/captions", files=form(*PICTURES))) == stored(worked)
        assert [line for line in served.complaints() if "out of memory" in line]
        assert served.stop() == 0


def test_a_request_is_logged_with_its_size_and_its_time(beside):
    n = beside.logged("\n")
    beside.client.post("/v1/captions", files=form(*PICTURES[:2]))
    with client_of(beside) as client:
        for stream in (False, True):
            list(client.chat.completions.create(model=MODEL.name, messages=asking(PICTURES[0]), stream=stream))
    beside.client.post("/v1/secret?secret")
    until(lambda: beside.logged("\n") == n + 4, "all are logged, which happens once they are answered")
    beside.log.seek(0)
    lines = [re.sub(r"\d+ (bytes|tokens|ms)", r"N \1", line.partition(" INFO ")[2]) for line in beside.log]
    logged = "POST /v1/{}, N bytes, {} pictures, N tokens, N ms\n"
    assert sorted(lines[-4:]) == [
        logged.format("captions: 200", 2),
        logged.format("chat/completions: 200", 1),
        logged.format("chat/completions: 200", 1),
        logged.format("…: 404", 0),
    ]


# --- chat ------------------------------------------------------------------------------------------------------


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="none needed", max_retries=0)


def asking(*pictures: bytes, text: str = RECIPE.prompt) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64(data)}"}} for data in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_openais_client_gets_the_workers_captions(beside, worked):
    with client_of(beside) as client:
        assert [model.id for model in client.models.list()] == [MODEL.name]
        for data, expected in zip(PICTURES[:3], stored(worked), strict=False):
            answer = client.chat.completions.create(model=MODEL.name, messages=asking(data), temperature=0)
            (choice,) = answer.choices
            assert (choice.message.content, choice.finish_reason) == (expected["caption"], "stop")
            assert answer.usage.prompt_tokens == expected["prompt_tokens"]
            assert answer.usage.completion_tokens == expected["new_tokens"]
            assert answer.usage.total_tokens == expected["prompt_tokens"] + expected["new_tokens"]


def test_openais_client_streams_each_token_and_the_usage(beside, worked):
    expected = stored(worked)[1]
    with client_of(beside) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL.name, messages=asking(PICTURES[1]), stream=True, stream_options={"include_usage": True}
            )
        )
    said = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(text or "" for text in said) == expected["caption"]
    assert sum(bool(text) for text in said) == expected["new_tokens"] - 1, "one for each token but the last, which ends"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], expected["new_tokens"])


def test_openais_client_finds_the_model_by_its_name(beside):
    with client_of(beside) as client:
        assert client.models.retrieve(MODEL.name) == client.models.list().data[0]
        with pytest.raises(openai.NotFoundError, match="This server has 'model'"):
            client.models.retrieve("openai/gpt-4o")


def test_an_answer_can_be_sent_back_with_all_its_fields(beside):
    asked = asking(PICTURES[0])
    with client_of(beside) as client:
        answer = client.chat.completions.create(model=MODEL.name, messages=asked, max_tokens=3)
        said = answer.choices[0].message.model_dump() | {"annotations": []}
        turns = [*asked, said, {"role": "user", "content": "And what else?"}]
        assert client.chat.completions.create(model=MODEL.name, messages=turns, max_tokens=3).choices
        turns[1] = said | {"annotations": ["a note"]}
        with pytest.raises(openai.BadRequestError, match="annotations: Extra inputs are not permitted"):
            client.chat.completions.create(model=MODEL.name, messages=turns)


def test_every_detail_of_openais_is_accepted(beside):
    (asked,) = asking(PICTURES[0])
    for detail in ("auto", "low", "high", "original"):
        asked["content"][0]["image_url"]["detail"] = detail
        with client_of(beside) as client:
            assert client.chat.completions.create(model=MODEL.name, messages=[asked], max_tokens=1).choices


def test_several_turns_with_several_pictures_are_answered(beside):
    turns = [
        {"role": "developer", "content": "You are a radiologist."},
        *asking(*PICTURES[:2]),
        {"role": "assistant", "content": "Both show a lung."},
        *asking(PICTURES[2]),
    ]
    with client_of(beside) as client:
        answer = client.chat.completions.create(model=MODEL.name, messages=turns, max_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


REFUSED: dict[str, tuple[dict[str, Any], int, str | None, str | None]] = {
    "another model": ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
    "sampling": ({"temperature": 0.7}, 400, "temperature", "unsupported_parameter"),
    "several answers": ({"n": 2}, 400, "n", "unsupported_parameter"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    "JSON": ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    "an unknown field": ({"top_k": 5}, 400, "top_k", None),
    "too many tokens": ({"max_tokens": 65}, 400, "max_tokens", None),
    "no tokens": ({"max_completion_tokens": 0}, 400, "max_completion_tokens", None),
    "no picture": ({"messages": [{"role": "user", "content": "Hello?"}]}, 400, "messages", None),
    "too many pictures": ({"messages": asking(*PICTURES[:9])}, 400, "messages", None),
    "a broken picture": ({"messages": asking(BROKEN)}, 400, None, "not_an_image"),
    "a broken picture, streamed": ({"messages": asking(BROKEN), "stream": True}, 400, None, "not_an_image"),
    "a picture's token": ({"messages": asking(PICTURES[0], text="<|image_pad|>")}, 400, None, "unprocessable"),
    "a tool's turn": ({"messages": [{"role": "tool", "content": "4"}]}, 400, "messages.0.role", None),
    "no messages": ({"messages": []}, 400, "messages", None),
    "another kind of part": (
        {"messages": [{"role": "user", "content": [{"type": "input_image"}]}]},
        400,
        "messages.0.content.0",
        None,
    ),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, 400, "messages.0.content", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_chat_cannot_do_is_refused_by_name(beside, name):
    changes, *expected = REFUSED[name]
    answer = beside.client.post(
        "/v1/chat/completions", json={"model": MODEL.name, "messages": asking(PICTURES[0]), "temperature": 0} | changes
    )
    error = answer.json()["error"]
    assert [answer.status_code, error["param"], error["code"]] == expected, error
    assert error["message"].endswith("."), error


def test_a_worker_captions_by_this_server_as_it_does_by_itself(beside, worked, tmp_path):
    url = f"sqlite:///{tmp_path}/queue.db"
    database = db.connect(url)
    write_shard(tmp_path / "set", "train", range(len(PICTURES)), pictures=dict(enumerate(PICTURES)))
    register(database, tmp_path / "set", ["train"], recipe=replace(RECIPE, dtype="auto"))
    options = Options(engine="openai", base_url=f"{beside.address}/v1", served_model=MODEL.name)
    work(database, Settings(options=options))
    database.dispose()
    assert stored(url) == stored(worked)


@pytest.mark.slow
def test_several_processes_answer_as_one_does(worked):
    expected = stored(worked)
    with serving(worked, "--run", "default", "--devices", "cpu:2") as served:
        until(lambda: served.logged("answers requests") == 2, "both models are loaded")
        with ThreadPoolExecutor(4) as threads:
            answers = threads.map(lambda data: served.client.post("/v1/captions", files=form(data)), PICTURES)
            assert [listed(answer) for answer in answers] == [[one] for one in expected]
        assert listed(served.client.post("/v1/captions", data={"run": "default"}, files=form(*PICTURES))) == expected
        with client_of(served) as client:
            assert [model.id for model in client.models.list()] == [MODEL.name]
            chunks = list(client.chat.completions.create(model=MODEL.name, messages=asking(PICTURES[1]), stream=True))
        said = [chunk.choices[0].delta.content for chunk in chunks]
        assert "".join(text or "" for text in said) == expected[1]["caption"]
        assert sum(bool(text) for text in said) == expected[1]["new_tokens"] - 1


# --- the documentation -----------------------------------------------------------------------------------------

PAGE = (TESTS.parent / "docs" / "serving.md").read_text()
EXAMPLES = re.findall(r"^\$ (.*curl .*)\n(.*)$", PAGE, re.MULTILINE)
"""Command lines of the page, and the first line that each prints, in which … stands for anything."""


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_documentation_print_what_it_shows(beside, tmp_path, number):
    line, shown = EXAMPLES[number]
    (tmp_path / "scan.png").write_bytes(PICTURES[1])
    line = line.replace("http://127.0.0.1:8642", beside.address)
    printed = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(".*".join(map(re.escape, shown.split("…"))), printed), printed


def test_the_documentation_has_an_example_of_every_kind():
    assert len(EXAMPLES) == 5
