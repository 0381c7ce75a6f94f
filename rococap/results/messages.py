"""Captions as conversations to train on: the prompt about a picture, and the caption as its answer.

The format is that of LLaMA-Factory (`sharegpt` with OpenAI's names) and ms-swift. Knows neither runs nor the database.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

Text = Literal["generated", "original"]
"""Which caption of a picture is the answer."""

PLACE = "<image>"
"""Where trainers put the picture."""
DATASET_INFO = "dataset_info.json"
"""The file by which LLaMA-Factory finds the data sets of a folder."""
ORIGINALS_NOTE = "Captions of the data set, under its licence, with the prompt of the run. Not for clinical use."

_CONTROL = re.compile(r"<(?:image|video|audio)>|<\|\w+\|>")
"""What trainers and tokenizers read as something other than text: the places of pictures, videos and sounds, and tokens
such as <|image_pad|> and <|im_end|>. None of them knows a way to escape these."""


def control_in(text: str) -> str | None:
    """The first part of the text that a trainer would not take for text, such as <image>; None if there is none."""
    found = _CONTROL.search(text)
    return found[0] if found else None


def unusable(answer: str, text: Text) -> str | None:
    """Why a caption cannot be an answer; None if it can."""
    if text == "original" and not answer.strip():
        return "The data set has no caption for it."
    if control := control_in(answer):
        return f"Its caption contains {control}, which a trainer would not take for text."
    return None


def line_of(prompt: str, answer: str, picture: str) -> str:
    """A conversation as a line of JSON, with its end; `picture` is the path of the picture's file in the folder.

    The picture comes directly before the prompt, as in the worker's own messages. Only ASCII is written, since some
    readers end a line at U+2028 or at other separators, which JSON allows within a text.
    """
    messages = [{"role": "user", "content": PLACE + prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "images": [picture]}) + "\n"


def file_name(split: str) -> str:
    return f"{split}.jsonl"


def dataset_info(splits: Sequence[str]) -> dict[str, Any]:
    """What LLaMA-Factory needs to know of the files: a data set `rococap_SPLIT` for each split."""
    return {
        f"rococap_{split}": {
            "file_name": file_name(split),
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        }
        for split in splits
    }
