# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from data_tools.writers.options import OpenAIBatchOptions, OpenAIOptions, WriterOptions

read = TypeAdapter(WriterOptions).validate_python


def test_the_name_says_which():
    assert read({"name": "template"}).name == "template"
    assert type(read({"name": "openai", "model": "m"})) is OpenAIOptions
    assert type(read({"name": "openai_batch", "model": "m"})) is OpenAIBatchOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "opanai", "model": "m"}, "template.*openai.*openai_batch"),
        ({"name": "openai"}, "model"),
        ({"name": "openai", "model": "m", "modle": 1}, "Extra inputs"),
        ({"name": "openai", "model": "m", "budget": {"dollars": 5}}, "needs the price"),
        ({"name": "openai", "model": "m", "base_url": "localhost:8000"}, "expected an address"),
        ({"name": "openai", "model": "m", "base_url": "http://me:pw@x/v1"}, "must not hold a key"),
        ({"name": "openai", "model": "m", "key_variable": "sk-abc"}, "pattern"),
        ({"name": "openai", "model": "m", "parameters": {"api_key": "x"}}, "looks like a key"),
        ({"name": "openai", "model": "m", "parameters": {"seed": 1}}, "its option is seeded"),
        ({"name": "openai", "model": "m", "parameters": {"stream": True}}, "set by the writer"),
        ({"name": "openai", "model": "m", "price": {"input": -1, "output": 1}}, "greater than"),
        ({"name": "openai_batch", "model": "m", "max_requests": 50_001}, "50000"),
        ({"name": "openai_batch", "model": "m", "max_bytes": 200_000_001}, "200000000"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        read(values)
