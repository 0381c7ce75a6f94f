"""Who may ask a server for what."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from samples import fill
from steps import refused, select
from web_server import HTML, Served, serving

from rococap import db
from rococap.web.access import access_for, is_loopback

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def queue_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("queue")
    url = f"sqlite:///{folder}/queue.db"
    database = db.connect(url)
    fill(database, folder / "set", 5)
    database.dispose()
    return url


@pytest.fixture(scope="module")
def local(queue_url: str) -> Iterator[Served]:
    with serving(queue_url) as served:
        yield served


@pytest.fixture(scope="module")
def guarded(queue_url: str) -> Iterator[Served]:
    """One that other machines reach, which has made its token itself."""
    with serving(queue_url, "--host", "0.0.0.0", "--allow-host", "captions.example.org") as served:
        yield served


def paused(queue_url: str) -> bool:
    database = db.connect(queue_url)
    try:
        return select(database, "SELECT paused FROM runs") == [(1,)]
    finally:
        database.dispose()


def pause(served: Served, path: str = "/actions/pause", **headers: str) -> int:
    return served.client.post(path, json={"run": "default"}, headers=headers).status_code


# --- hosts and origins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost:9000", "LOCALHOST", "192.0.2.7:8642", "[::1]:8642"])
def test_a_server_answers_by_its_names_and_by_any_address(local, host):
    assert local.client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/live", "/throughput", "/v1/models"])
@pytest.mark.parametrize("host", ["evil.example:8642", "localhost.evil.example", "", "[", "a@b"])
def test_a_name_that_was_rebound_to_it_gets_nothing(local, host, path):
    answer = local.client.get(path, headers={"Host": host})
    assert answer.status_code == 421
    assert "--allow-host" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/actions/pause", "/v1/chat/completions", "/no/such/path"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_changes_nothing(local, queue_url, headers, path):
    assert pause(local, path, **headers) == 403
    assert not paused(queue_url)


@pytest.mark.parametrize("own", [True, False])
def test_its_own_pages_and_programs_change_the_queue(local, queue_url, own):
    headers = {"Origin": local.address, "Sec-Fetch-Site": "same-origin"} if own else {}
    assert pause(local, **headers) == 200
    assert paused(queue_url)
    assert pause(local, "/actions/resume", **headers) == 200
    assert not paused(queue_url)


# --- tokens ----------------------------------------------------------------------------------------------------


def token_of(served: Served) -> str:
    said = r"The dashboard is at http://\S+/\?token=(\S+) until you stop this with Ctrl-C\.\n"
    return re.fullmatch(said, served.said)[1]


@pytest.mark.parametrize("path", ["/", "/live", "/throughput", "/actions/pause", "/nothing"])
def test_beyond_this_machine_nothing_is_told_without_the_token(guarded, path):
    answer = guarded.client.get(path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert guarded.client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert (
        guarded.client.get(path, headers={b"Cookie": b"rococap-%d=\xfc" % guarded.client.base_url.port}).status_code
        == 401
    )


def test_programs_send_the_token_with_each_request(guarded, queue_url):
    bearer = {"Authorization": f"Bearer {token_of(guarded)}"}
    assert guarded.client.get("/throughput", headers=bearer).status_code == 200
    assert pause(guarded) == 401
    assert not paused(queue_url)
    assert pause(guarded, **bearer) == 200
    assert pause(guarded, "/actions/resume", **bearer) == 200
    assert pause(guarded, **bearer, Origin="https://evil.example") == 403


def test_a_link_with_the_token_sets_a_cookie_once_and_leaves_the_address(guarded):
    answer = guarded.client.get("/", params={"token": token_of(guarded)})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    guarded.client.cookies.clear()
    assert guarded.client.get("/", headers={"Cookie": cookie.partition(";")[0]}).status_code == 200


def test_a_wrong_token_sets_no_cookie(guarded):
    answer = guarded.client.get("/", params={"token": token_of(guarded)[:-1]}, headers=HTML)
    assert answer.status_code == 401
    assert "Set-Cookie" not in answer.headers
    assert "This token is wrong." in answer.text


def test_a_link_from_another_site_is_opened_a_second_time_because_browsers_keep_the_cookie_back(guarded):
    answer = guarded.client.get('/pictures?run="><b>', headers={"Sec-Fetch-Site": "cross-site", **HTML})
    assert answer.status_code == 200
    assert f'content="0; url={guarded.address}/pictures?run=%22%3E%3Cb%3E"' in answer.text


def test_whoever_checks_that_it_is_alive_needs_no_token_and_learns_nothing_else(guarded):
    assert guarded.client.get("/healthz").json() == {"status": "ok"}


def test_a_proxys_name_is_allowed_by_an_option(guarded):
    bearer = {"Authorization": f"Bearer {token_of(guarded)}"}
    assert guarded.client.get("/", headers={"Host": "captions.example.org", **bearer}).status_code == 200
    assert guarded.client.get("/", headers={"Host": "example.org", **bearer}).status_code == 421


def test_a_token_from_the_environment_is_never_printed_and_read_only_lets_nobody_write(queue_url):
    with serving(queue_url, "--read-only", ROCOCAP_TOKEN=TOKEN) as served:
        assert TOKEN not in served.said + served.process.stdout.readline()
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        page = served.client.get("/", headers=bearer)
        assert "read only" in page.text
        assert "data-post" not in page.text
        for path in ("/actions/pause", "/actions/cancel", "/v1/chat/completions"):
            assert pause(served, path, **bearer) == 403
        assert not paused(queue_url)


@pytest.mark.parametrize("token", ["short", "has a blank in it!!", "semicolon;semicolon;"])
def test_a_token_that_is_no_secret_or_fits_no_header_is_refused(here, monkeypatch, token):
    monkeypatch.setenv("ROCOCAP_TOKEN", token)
    assert refused("serve", "--port", "0").startswith("ROCOCAP_TOKEN must have 16 characters or more")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_this_machines_own_addresses_need_no_token(host, loopback):
    assert is_loopback(host) is loopback
    assert (access_for(host, 1, token="").token is None) is loopback
    assert access_for(host, 1, token=TOKEN).token == TOKEN


# --- what answers hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../db.py",
        "/static/%2e%2e/%2e%2e/db.py",
        "/static/x/..%2f..%2fdb.py",
        "/static/x/%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/static/x/site.css%00.html",
        "/../../etc/passwd",
        "/templates/base.html",
    ],
)
def test_no_path_leads_to_a_file(local, path):
    answer = local.client.get(path)
    assert answer.status_code == 404
    assert answer.json() == {"error": {"message": "The address may have been mistyped, or what it showed is gone."}}


@pytest.mark.parametrize("path", ["/", "/nothing", "/healthz", "/throughput", "/actions/pause"])
def test_every_answer_forbids_scripts_styles_and_frames_of_others(local, path):
    headers = local.client.get(path, headers=HTML).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "Server" not in headers


def test_scripts_and_styles_are_files_that_browsers_may_keep_until_they_change(local):
    page = local.client.get("/", headers=HTML).text
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", page) == []
    linked = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(linked) == 6
    for path in linked:
        answer = local.client.get(path)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["Cache-Control"]
        version = path.split("/")[2]
        assert local.client.get(path.replace(version, "0" * len(version))).status_code == 404


def test_a_server_without_a_model_says_how_it_would_answer_requests_for_captions(local):
    answer = local.client.post("/v1/captions", json={"images": []})
    message = "This server only shows the queue. Start it with --run NAME to have requests for captions answered."
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, message)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"run": "nobody"}, 409, "There is no run 'nobody'. Runs: default."),
        ({"run": ""}, 422, "body.run: String should have at least 1 character."),
        ({"run": "default", "split": "../x"}, 422, "body.split: Input should be 'train', 'validation' or 'test'."),
        ({"run": "x" * 2_000_000}, 413, "A request to this address may have at most 1,000,000 bytes."),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_a_line(local, body, status, message):
    answer = local.client.post("/actions/cancel", json=body)
    assert (answer.status_code, answer.json()) == (status, {"error": {"message": message}})


# --- the command -----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_an_error_of_one_line(local, here):
    port = local.address.rpartition(":")[2]
    assert refused("serve", "--port", port) == (
        f"Nothing can be served at 127.0.0.1 port {port} (Address already in use). Choose another port, or a free one: "
        "--port 0"
    )


def test_a_missing_database_is_not_created(tmp_path):
    assert "There is no database" in refused("--db", f"{tmp_path}/none.db", "serve")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(here):
    code = "import sys; sys.modules['fastapi'] = None; from rococap.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--db", "queue.db", "serve"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: The server needs FastAPI \(.*\)\. Install it: pip install 'rococap\[web\]'\n", done.stderr
    )
