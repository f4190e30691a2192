"""Unmodified clients against the whole system."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

from stack import Project, Stack

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


def _client(project: Project, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=project.stack.base_url + "/v1", api_key=project.mint(**options), max_retries=0)


def test_the_openai_package_streams_over_http_1(project: Project) -> None:
    with _client(project, session="http1") as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=True, extra_body={"sim": {"output_tokens": 40}}
        )
        assert stream.response.http_version == "HTTP/1.1"
        chunks = list(stream)
    assert [chunk.usage for chunk in chunks if chunk.usage] == [], "usage was not asked for"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.startswith("This is simulated text")
    row = project.settled()[-1]
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "provider", 40)


def test_the_openai_package_streams_over_http_2(project: Project) -> None:
    async def scenario() -> tuple[str, int]:
        async with openai.AsyncOpenAI(
            base_url=project.stack.base_url + "/v1",
            api_key=project.mint(session="http2"),
            http_client=DefaultAsyncHttpxClient(http1=False, http2=True),
        ) as client:
            stream = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=QUESTION,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"sim": {"output_tokens": 40}},
            )
            tokens = 0
            async for chunk in stream:
                if chunk.usage:
                    tokens = chunk.usage.completion_tokens
                    assert chunk.usage.model_extra is not None
                    assert chunk.usage.model_extra["cost_usd"] > 0
            return stream.response.http_version, tokens

    assert asyncio.run(scenario()) == ("HTTP/2", 40)


def test_many_streams_share_one_http_2_connection(project: Project) -> None:
    async def scenario() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=project.stack.base_url + "/v1",
            api_key=project.mint(session="http2-many"),
            http_client=DefaultAsyncHttpxClient(http1=False, http2=True),
        ) as client:

            async def one(tokens: int) -> int:
                stream = await client.chat.completions.create(
                    model="gpt-4o-mini",
                    messages=QUESTION,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"sim": {"output_tokens": tokens, "chunk_interval_ms": 1}},
                )
                return [chunk.usage.completion_tokens async for chunk in stream if chunk.usage][-1]

            return await asyncio.gather(*(one(tokens) for tokens in range(10, 60)))

    assert asyncio.run(scenario()) == list(range(10, 60))


def test_a_call_that_does_not_stream_gets_one_body(project: Project) -> None:
    with _client(project, session="whole") as client:
        answer = client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, n=2, extra_body={"sim": {"output_tokens": 12}}
        )
    assert answer.object == "chat.completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.content for choice in answer.choices)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24


def test_a_call_without_a_model_gets_the_projects_default(project: Project) -> None:
    with _client(project, session="default") as client:
        answer = client.chat.completions.create(model="default", messages=QUESTION)
    assert answer.model == "gpt-4o-mini"


def test_errors_have_their_types_in_the_openai_package(project: Project) -> None:
    with _client(project, session="errors") as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="gpt-4o-mini", messages=QUESTION, n=0)
        assert (bad.value.code, bad.value.param) == ("validation_error", "n")
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("gpt-4o-mini")
        assert missing.value.code == "not_found"
    with openai.OpenAI(base_url=project.stack.base_url + "/v1", api_key="nonsense") as stranger:
        with pytest.raises(openai.AuthenticationError) as unknown:
            stranger.models.list()
        assert unknown.value.code == "invalid_token"


def test_curl_streams_over_http_2_with_prior_knowledge(project: Project) -> None:
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True).stdout:
        pytest.skip("this machine has no curl that speaks HTTP/2")
    done = subprocess.run(
        [
            *(curl, "-sN", "--http2-prior-knowledge", "-w", "\n%{http_version} %{http_code}"),
            *("-H", f"Authorization: Bearer {project.mint(session='curl')}", "-H", "Content-Type: application/json"),
            *("-d", '{"model":"gpt-4o-mini","stream":true,"messages":[{"role":"user","content":"Hello"}]}'),
            project.stack.base_url + "/v1/chat/completions",
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    body, _, status = done.stdout.rpartition("\n")
    assert status == "2 200"
    assert body.endswith("data: [DONE]\n\n")


NODE_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ apiKey: process.env.TOKEN, baseURL: process.env.BASE_URL, maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me a story." }];
const ask = (sim, more = {}, options = {}) =>
  client.chat.completions.create({ model: "gpt-4o-mini", messages, stream: true, sim, ...more }, options);
const out = {};

let text = "", finish = null;
for await (const chunk of await ask({ output_tokens: 30 })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
}
out.streamed = text.length > 0 && finish !== null;

const abort = new AbortController();
let seen = 0;
for await (const _ of await ask({ output_tokens: 5000, chunk_interval_ms: 5 }, {}, { signal: abort.signal })) {
  if (++seen === 3) abort.abort();
}
out.cancelled = seen;

try { await ask({}, { n: 0 }); } catch (error) { out.status = error.status; out.code = error.code; }
try {
  for await (const _ of await ask({ output_tokens: 20, error_event_after_chunks: 2 })) {}
} catch (error) { out.midstream = error.code; }
console.log(JSON.stringify(out));
"""


def test_the_openai_package_of_npm_streams_cancels_and_sees_errors(
    project: Project, repository: Path, tmp_path: Path
) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("this machine has no node and npm")
    # Kept beside the virtual environment, so that only the first run downloads it.
    folder = repository / ".venv" / "npm"
    if not (folder / ".installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            install = [npm, "install", "--silent", "--prefix", str(folder), "openai@7"]
            subprocess.run(install, capture_output=True, text=True, timeout=300, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            told = str(error.stderr or "").strip()[-200:]
            pytest.skip(f"npm cannot download the openai package here: {told or error}")
        (folder / ".installed").touch()
    script = folder / f"{tmp_path.name}.mjs"
    script.write_text(NODE_SCRIPT)
    try:
        done = subprocess.run(
            [node, str(script)],
            env={"TOKEN": project.mint(session="npm"), "BASE_URL": project.stack.base_url + "/v1", "PATH": "/usr/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        '{"streamed":true,"cancelled":3,"status":400,"code":"validation_error","midstream":"upstream_error"}'
    )


def test_the_sync_client_over_http_2_is_served_too(project: Project) -> None:
    with openai.OpenAI(
        base_url=project.stack.base_url + "/v1",
        api_key=project.mint(session="http2-sync"),
        http_client=DefaultHttpxClient(http1=False, http2=True),
    ) as client:
        assert "gpt-4o-mini" in [model.id for model in client.models.list()]
