"""The OpenAPI document, the page that shows it, and the metrics: what a server says about itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from patient_engine import ENDLESS
from patient_server import PROGRAM, captioned, chat, grey
from prometheus_client.parser import text_string_to_metric_families
from samples import fill
from steps import until
from web_server import Served, loaded, running, serving

from rococap import db
from rococap.demo import MODEL

DATA_URL = f"data:image/png;base64,{grey(30)}"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server without a database, which answers two requests at a time."""
    with running([*PROGRAM[:-1], "2", "--max-waiting", "9"]) as served:
        loaded(served)
        yield served
        assert served.stop() == 0
        assert served.complaints() == []


def measured(served: Served) -> dict[tuple[str, ...], float]:
    """Each number of /metrics, by its name and the values of its labels."""
    answer = served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_metrics_count_requests_tokens_and_the_time_of_each_stage(served):
    before = measured(served)
    assert captioned(served, 10, 20, 30).status_code == 200
    after = measured(served)

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown("rococap_requests_total", "stop") == grown("rococap_pictures_total") == 3
    assert grown("rococap_prompt_tokens_total") == 3 * 7
    assert grown("rococap_http_requests_total", "/v1/captions", "200") == 1
    assert grown("rococap_http_request_seconds_count", "/v1/captions") == 1
    assert grown("rococap_new_tokens_total") == 3 * len("µ grey 10".encode())
    for stage in ("waiting", "preparing", "ready", "running"):
        assert grown("rococap_stage_seconds_count", stage) == 3
        assert grown("rococap_stage_seconds_sum", stage) > 0
    assert grown("rococap_decode_rows_total") >= grown("rococap_decode_steps_total") > 0
    assert after["rococap_batch_size",] == 2
    assert after["rococap_max_waiting",] == 9
    assert after["process_resident_memory_bytes",] > 0


def test_metrics_show_what_runs_and_waits_and_what_clients_abandon(served):
    before = measured(served).get(("rococap_requests_total", "abandoned"), 0)
    body = chat(ENDLESS, stream=True)
    with httpx.stream("POST", f"{served.address}/v1/chat/completions", json=body, timeout=20) as answer:
        arriving = answer.iter_bytes()
        assert next(arriving)
        now = measured(served)
        assert now["rococap_num_requests_running",] == 1
        assert now["rococap_batch_fill",] == 0.5
        assert now["rococap_num_requests_waiting",] == 0
    until(lambda: measured(served)["rococap_num_requests_running",] == 0, "the request is abandoned")
    assert measured(served)["rococap_requests_total", "abandoned"] == before + 1


def test_metrics_of_a_database_count_jobs(tmp_path):
    url = f"sqlite:///{tmp_path}/queue.db"
    database = db.connect(url)
    fill(database, tmp_path / "set", 3)
    database.dispose()
    with serving(url) as served:
        found = measured(served)
        assert found["rococap_jobs", "default", "train", "pending"] == 3
        assert found["rococap_jobs", "default", "train", "done"] == 0
        assert found["rococap_database_up",] == 1
        (tmp_path / "queue.db").unlink()
        found = measured(served)
        assert found["rococap_database_up",] == 0
        assert not [key for key in found if key[0] == "rococap_jobs"]
        assert served.client.get("/docs").status_code == 404, "there is no API without a model"


def test_the_docs_work_in_a_browser_without_the_network(served, browser):
    tab = browser.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(served.address)
    tab.locator(".opblock-summary-path", has_text="/v1/captions").wait_for()
    assert tab.url == f"{served.address}/docs"
    tab.locator("#operations-captions-models_v1_models_get .opblock-summary-control").click()
    tab.get_by_role("button", name="Try it out").click()
    tab.get_by_role("button", name="Execute").click()
    tab.locator(".live-responses-table .response-col_status", has_text="200").wait_for()
    assert [url for url in asked if not url.startswith((served.address, "data:"))] == []
    assert complaints == []
    tab.close()


def realistic(document: dict[str, Any]) -> dict[str, Any]:
    """The document with values in place of types where chance finds no value that gets past the first check."""
    schemas = document["components"]["schemas"]
    pictures = document["paths"]["/v1/captions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    pictures["properties"]["images"]["items"] = {"type": "string", "enum": [grey(10), DATA_URL, "", "AAAA"]}
    schemas["ChatRequest"]["properties"]["model"] = {"const": MODEL.name}
    schemas["ImageUrl"]["properties"]["url"] = {"type": "string", "enum": [DATA_URL, "data:,", "http://localhost/"]}
    return document


@pytest.mark.slow
def test_no_request_that_the_document_allows_or_forbids_ends_in_a_server_error(served, tmp_path):
    document = realistic(served.client.get("/openapi.json").json())
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    command = ["-m", "schemathesis.cli", "run", str(path), "--url", served.address, "--continue-on-failure"]
    # What a schema cannot say, such as that one of many parts must be a picture, is checked beyond it.
    limits = ["--exclude-checks", "positive_data_acceptance", "--max-examples", "25", "--seed", "1", "--no-color"]
    limits += ["--request-timeout", "120"]
    done = subprocess.run([sys.executable, *command, *limits], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "7 selected / 7 total" in done.stdout
    assert served.client.get("/healthz").status_code == 200
