"""An app that floods a model, and one that somebody waits for: order of service, by real servers.

How long that takes is measured by benches/priorities.py; a test must not depend on time.
"""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import require_engine
from support.server_process import ServerProcess
from support.traffic import Errand, Reply, new_client, send

NUM_FLOOD = 32
"""Twice the sixteen sequences that one model works on at once: on a busy machine some are answered
before the last have come, and a queue is there all the same."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    require_engine("llamacpp")
    settings = {"cache.enabled": False}
    with ServerProcess(tmp_path, "-m", "small=demo", settings=settings) as server:
        yield server


def key_of(server: ServerProcess, directory: Path, name: str, priority: str) -> str:
    """The key of a new app."""
    manifest = directory / f"{name}.toml"
    manifest.write_text(f'name = "{name}"\npriority = "{priority}"\n')
    done = server.brim("apps", "add", str(manifest), "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["key"])


def errand(number: int, max_tokens: int, priority: str | None = None) -> Errand:
    """A prompt of some hundred tokens that shares nothing with another."""
    words = " ".join(str(random.Random(number).random()) for _ in range(12))
    return Errand(
        name=f"{number}", model="small", prompt=words, max_tokens=max_tokens, priority=priority
    )


def test_a_question_is_served_before_a_flood_that_came_first(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Its first word comes before most of the flood's have, and the flood is answered whole.

    The app in the background asks for interactive service, which its manifest does not grant.
    """
    person = key_of(server, tmp_path, "person", "interactive")
    background = key_of(server, tmp_path, "flood", "background")

    async def both() -> tuple[list[Reply], list[Reply]]:
        async with (
            new_client(server.url, key=background) as crowd,
            new_client(server.url, key=person) as client,
        ):
            flood = [
                asyncio.create_task(send(crowd, errand(number, 200, priority="interactive")))
                for number in range(NUM_FLOOD)
            ]
            await asyncio.to_thread(
                server.wait_until, lambda: server.ps()[0]["num_waiting"] > NUM_FLOOD // 4
            )
            asked = [await send(client, errand(100 + number, 8)) for number in range(3)]
            return asked, await asyncio.gather(*flood)

    asked, flood = asyncio.run(both())
    assert [reply.error for reply in [*asked, *flood] if reply.error] == []
    assert all(reply.num_endings == 1 for reply in [*asked, *flood])
    first_text_s = max(reply.first_text_s or 0.0 for reply in asked)
    later = [reply for reply in flood if (reply.first_text_s or 0.0) > first_text_s]
    assert len(later) > NUM_FLOOD // 4, "the flood's queue was served first"
