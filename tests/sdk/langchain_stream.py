# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
"""`langchain-openai`, unmodified, against a sidecar. Run by its own Python, in which nothing of ours is installed."""

import asyncio
import json
import os

import openai
from langchain_openai import ChatOpenAI

GIVEN = json.loads(os.environ["GIVEN"])


def chat(token, **options):
    return ChatOpenAI(model="default", base_url=GIVEN["base_url"] + "/v1", api_key=token, max_retries=0, **options)


def text_of(chunks):
    return "".join(chunk.content for chunk in chunks if isinstance(chunk.content, str))


async def later(one):
    return [chunk async for chunk in one.astream("Tell me a story.")]


one = chat(GIVEN["token"])
whole = one.invoke("Tell me a story.")
assert whole.content.startswith("This is simulated text")
assert whole.usage_metadata["output_tokens"] > 0
assert text_of(one.stream("Tell me a story.")).startswith("This is simulated text")
assert text_of(asyncio.run(later(one))).startswith("This is simulated text")
with_usage = list(chat(GIVEN["token"], stream_usage=True).stream("Tell me a story."))
assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in with_usage) > 0

said, code = [], None
poor = chat(GIVEN["poor_token"], extra_body={"sim": {"output_tokens": 5000}})
try:
    for chunk in poor.stream("Tell me a story."):
        said.append(chunk)
except openai.APIError as error:
    code = error.code
assert code == "quota_exceeded", code
assert text_of(said).startswith("This is simulated text")
