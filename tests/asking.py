"""Requests to a server with the patient engine."""

import base64
from io import BytesIO
from typing import Any

import httpx
from PIL import Image
from places import TESTS
from web_server import Served

from rococap.demo import MODEL

PROGRAM = [str(TESTS / "patient_engine.py"), "serve", "--port", "0", "--model", str(MODEL), "--batch-size", "1"]
"""A server without a database, whose engine is patient, and answers one request at a time."""


def grey(level: int) -> str:
    file = BytesIO()
    Image.new("L", (28, 28), level).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def chat(level: int, **fields: Any) -> dict[str, Any]:
    url = {"url": f"data:image/png;base64,{grey(level)}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
    return {"model": MODEL.name, "messages": [{"role": "user", "content": parts}]} | fields


def captioned(served: Served, *levels: int) -> httpx.Response:
    return served.client.post("/v1/captions", json={"images": [grey(level) for level in levels]})
