"""One OpenAI-compatible server as it is reached: its model, what it takes, and one request to it.

The harness around it is the package `serving`.  Answers are greedy and of equal length wherever the
server takes `ignore_eos`; tokens are counted from each answer's `usage`, never from chunks.
"""

import msgspec

from brim.bench.answers import Answered, read_answer
from brim.bench.client import Connection, Endpoint
from brim.bench.workload import RecordedRequest, Turn
from brim.errors import Busy, ConfigError, InvalidRequest


class _ModelEntry(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelEntry]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that was reached, and what to send it."""

    endpoint: Endpoint
    model: str
    takes_ignore_eos: bool
    takes_chat: bool = True
    """Whether it answers a chat; a model without a chat template may not."""

    def body(self, request: RecordedRequest, **extra: object) -> bytes:
        """The JSON body of `request` for this server: streaming, greedy, with usage.

        Args:
            request: What to ask.
            extra: Further fields, or other values of these.
        """
        fields: dict[str, object] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.messages is None:
            fields["prompt"] = request.prompt
        else:
            fields["messages"] = request.messages
        if self.takes_ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields | extra)

    async def ask(
        self, connection: Connection, request: RecordedRequest, **extra: object
    ) -> Answered:
        """Send one request, with further fields if any, and read its answer to the end."""
        reply = await connection.post(request.path, self.body(request, **extra))
        return read_answer(request.id, reply)


async def reach(endpoint: Endpoint) -> Target:
    """Find the server's model and what it takes, with a few short requests.

    Raises:
        Busy: It is there and not ready yet.
        ConfigError: Nothing answers there, or it lists no model.
        InvalidRequest: It refuses a plain completion; the message quotes it.
    """
    connection = Connection(endpoint)
    try:
        model = endpoint.model or await _first_model(connection)
        probe = RecordedRequest(id="probe", max_tokens=2, prompt="1 2 3")
        for takes_ignore_eos in (True, False):
            target = Target(endpoint=endpoint, model=model, takes_ignore_eos=takes_ignore_eos)
            answer = await target.ask(connection, probe)
            if answer.error is None:
                return msgspec.structs.replace(
                    target, takes_chat=await _takes_chat(target, connection)
                )
            if answer.status == 503:
                raise _not_ready(endpoint)
        raise InvalidRequest(f"'{endpoint.name}' does not answer a completion: {answer.error}")
    finally:
        connection.close()


async def _takes_chat(target: Target, connection: Connection) -> bool:
    probe = RecordedRequest(id="probe", max_tokens=2, messages=(Turn("user", "1 2 3"),))
    return (await target.ask(connection, probe)).error is None


async def _first_model(connection: Connection) -> str:
    reply = await connection.get("/models")
    if reply.status == 503:
        raise _not_ready(connection.endpoint)
    try:
        return msgspec.json.decode(reply.body, type=_ModelList).data[0].id
    except (msgspec.DecodeError, IndexError) as exc:
        raise ConfigError(
            f"'{connection.endpoint.name}' lists no models (status {reply.status}); "
            "name one as NAME=URL#MODEL"
        ) from exc


def _not_ready(endpoint: Endpoint) -> Busy:
    return Busy(f"'{endpoint.name}' is not ready yet (503); wait and try again", retry_after_s=1.0)
