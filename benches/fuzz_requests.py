"""What `fuzz_server` sends: bodies made from the published schema and damaged, and broken HTTP.

Everything is drawn from one random generator, so that a seed repeats a sequence.
"""

import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, -(2**63), 10**30, 0.1, -0.0, 1e308, "", " ",
    "x" * 300, "\0", "\u202e\ufeff", "\U0001f4a9" * 9, "../../etc/passwd", "/dev/zero", "%s%n{0}",
    "{{ 7*7 }}", "<|im_end|>", [], [[]], [None], {}, {"": ""}, {"__proto__": 1}, ["x"] * 2000,
    [1] * 5000, {str(number): number for number in range(300)},
)  # fmt: skip
"""In the place of any value: other types, borders of integers, text with meaning elsewhere."""

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "get")
HOSTS = ("127.0.0.1", "localhost", "evil.example", "", "[::1", "a.localhost", "\x7f", "x" * 300)
ORIGINS = ("https://app.example", "https://evil.example", "null", "", "http://[", "chrome://x")
NUM_EACH = 4
"""Of every kind in `every_break`: what it is made of is drawn anew each time."""

MAX_ANSWER_TOKENS = 64
"""What most requests ask for at most: a fuzzer looks for what breaks, not for what takes long."""


class Generator:
    """Makes requests.

    Args:
        rng: Where every choice comes from.
        document: The server's `/openapi.json`.
        models: Names that are served.
        keys: That the server knows, and some that it does not.
    """

    def __init__(
        self,
        rng: random.Random,
        document: dict[str, Any],
        models: list[str],
        keys: list[str],
    ) -> None:
        self.rng = rng
        self._schemas = document["components"]["schemas"]
        self._paths = sorted(document["paths"])
        self._models = models
        self._keys = keys
        self._broken: tuple[Callable[[], bytes], ...] = (
            self._noise,
            self._many_headers,
            self._bad_length,
            self._bad_chunks,
            self._bad_line,
            self._two_lengths,
        )

    def body(self, name: str) -> bytes:
        """JSON of a component, as the schema has it or damaged."""
        value = self._instance({"$ref": name}, 0)
        if self.rng.random() < 0.5:
            # Mostly in order, so that whatever comes after the checks is met as well.
            value = {} if self.rng.random() < 0.7 else value
            value["messages" if "Chat" in name else "prompt"] = self._plain(name)
            value["stream"] = self.rng.random() < 0.5
        if isinstance(value, dict):
            value["model"] = self.rng.choice(self._models)
            if self.rng.random() < 0.9:
                value["max_tokens"] = self.rng.randint(1, MAX_ANSWER_TOKENS)
                value["n"] = self.rng.randint(1, 2)
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 5))):
            value = self._damaged(value)
        data = json.dumps(value, ensure_ascii=self.rng.random() < 0.5).encode("utf-8", "replace")
        return (
            self.rng.choice(self._damages(data, self.rng.choice))()
            if self.rng.random() < 0.2
            else data
        )

    def request(self) -> tuple[str, bytes]:
        """One complete request, its path first: any method, any route, any headers."""
        path = self._path()
        post = path.endswith("completions") and self.rng.random() < 0.8
        method = "POST" if post else self.rng.choice(METHODS)
        schema = "ChatCompletionRequest" if "chat" in path else "CompletionRequest"
        body = self.body(schema) if post or self.rng.random() < 0.2 else b""
        return self._complete(method, path, body)

    def _complete(self, method: str, path: str, body: bytes) -> tuple[str, bytes]:
        path = path.replace(" ", "%20")
        headers = [("Host", "127.0.0.1"), ("Content-Length", str(len(body))), *self._headers()]
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return path, f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + body

    def broken(self) -> bytes:
        """Bytes that are not, or hardly, HTTP."""
        return self.rng.choice(self._broken)()

    def every_kind(self) -> Iterator[tuple[str, bytes]]:
        """Complete requests, paths first: each route by each method, and bodies with each damage.

        Of each damage the smallest and the largest.
        """
        for path in self._paths:
            for method in METHODS:
                yield self._complete(method, path.replace("{model}", self._word()), b"")
        for path, schema in (
            ("/v1/chat/completions", "ChatCompletionRequest"),
            ("/v1/completions", "CompletionRequest"),
        ):
            for pick in (min, max):
                data = self._sound(schema)
                yield self._complete("POST", path, data)
                for damage in self._damages(data, pick):
                    yield self._complete("POST", path, damage())

    def every_break(self) -> Iterator[bytes]:
        """Bytes that are not, or hardly, HTTP, of each kind."""
        for _ in range(NUM_EACH):
            for make in self._broken:
                yield make()

    def _sound(self, name: str) -> bytes:
        """A body that is answered."""
        value = {"messages" if "Chat" in name else "prompt": self._plain(name)}
        return json.dumps({"model": self._models[0], "max_tokens": 4, **value}).encode()

    def _plain(self, name: str) -> Any:
        text = "def f(x):" * self.rng.randint(1, 20)
        return [{"role": "user", "content": text}] if "Chat" in name else text

    def _path(self) -> str:
        path: str = self.rng.choice(self._paths).replace("{model}", self._word())
        if self.rng.random() < 0.4:
            return self.rng.choice(("/v1/chat/completions", "/v1/completions"))
        if self.rng.random() < 0.3:
            path = f"/{self._word()}" if self.rng.random() < 0.5 else path + self._word()
        if self.rng.random() < 0.2:
            path += f"?{self._word()}={self._word()}&since={self._word()}&follow=false"
        return path

    def _headers(self) -> list[tuple[str, str]]:
        rng, found = self.rng, []
        if rng.random() < 0.7:
            name = rng.choice(("Authorization", "X-Api-Key"))
            found.append((name, rng.choice(("Bearer ", "", "Basic ")) + rng.choice(self._keys)))
        if rng.random() < 0.1:
            found.append(("Host", rng.choice(HOSTS)))
        if rng.random() < 0.15:
            found.append(("Origin", rng.choice(ORIGINS)))
        if rng.random() < 0.1:
            found.append(("Access-Control-Request-Method", self._word()))
        if rng.random() < 0.1:
            found.append(("Expect", "100-continue"))
        if rng.random() < 0.1:
            found += [(self._token(), self._word()) for _ in range(rng.choice((1, 20, 120)))]
        return found

    def _word(self) -> str:
        choices = ("1", "-1", "true", "nan", "1e999", "%00", "%ff%fe", "..%2f..%2f", "a/b", "\xe9")
        if self.rng.random() < 0.5:
            return self.rng.choice(choices)
        return "".join(self.rng.choices(string.printable[:94], k=self.rng.choice((1, 8, 200))))

    def _token(self) -> str:
        return "".join(self.rng.choices(string.ascii_letters + "-", k=8))

    def _instance(self, schema: dict[str, Any], depth: int) -> Any:
        """A value that a schema allows, as far as it says so in one place."""
        rng = self.rng
        if "$ref" in schema:
            return self._instance(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        if "anyOf" in schema:
            return self._instance(rng.choice(schema["anyOf"]), depth)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            most = min(schema.get("maxItems", 4), 4 if depth < 4 else 1)
            num = rng.randint(schema.get("minItems", 0), max(schema.get("minItems", 0), most))
            return [self._instance(schema.get("items", {}), depth + 1) for _ in range(num)]
        return self._scalar(kind, schema)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        wanted = set(schema.get("required", ()))
        found = {
            name: self._instance(each, depth + 1)
            for name, each in schema.get("properties", {}).items()
            if name in wanted or self.rng.random() < (0.15 if depth < 3 else 0)
        }
        if not schema.get("properties") and self.rng.random() < 0.5:
            found[self._token()] = self.rng.choice(NASTY)
        return found

    def _scalar(self, kind: str | None, schema: dict[str, Any]) -> Any:
        rng = self.rng
        low, high = schema.get("minimum", 0), schema.get("maximum", 100)
        if kind == "integer":
            return rng.choice((low, min(high, low + 1), high, rng.randint(low, max(low, high))))
        if kind == "number":
            return rng.choice((low, high, rng.uniform(low, high)))
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "string":
            least = schema.get("minLength", 0)
            letters = rng.choices("def (x):\n \xe9\U0001f600", k=max(least, rng.randint(1, 60)))
            return "".join(letters)
        return None

    def _damaged(self, value: Any) -> Any:
        """The value with one place in it replaced, removed or added to."""
        if not isinstance(value, (dict, list)) or not value or self.rng.random() < 0.15:
            return self.rng.choice(NASTY)
        copy: Any = value.copy()
        place = self.rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        roll = self.rng.random()
        if roll < 0.15:
            del copy[place]
        elif roll < 0.3 and isinstance(copy, dict):
            copy[self._word()] = self.rng.choice(NASTY)
        else:
            copy[place] = self._damaged(copy[place])
        return copy

    def _damages(
        self, data: bytes, pick: Callable[[Sequence[int]], int]
    ) -> tuple[Callable[[], bytes], ...]:
        """Every way to damage a body that goes by its bytes, with sizes that `pick` takes."""
        cut = self.rng.randint(0, len(data))
        return (
            lambda: data[:cut],
            lambda: data + data,
            lambda: data[:cut] + b"\xff\xfe\xed\xa0\x80" + data[cut:],
            lambda: data[:cut] + b"NaN" + data[cut:],
            lambda: b"[" * pick((10, 1000, 200_000)) + data,
            lambda: data[:cut] + b'{"a":' * pick((10, 1000, 100_000)) + data[cut:],
            lambda: data.replace(b":", b":1e", 1),
            lambda: _with(data, b'"model":"x","model":"y"'),
            lambda: _with(data, b'"prompt":[' + b"7," * pick((10, 1000, 700_000)) + b"7]"),
            lambda: _with(data, b'"logit_bias":{' + _biases(pick((10, 2000, 100_000))) + b"}"),
            lambda: data.ljust(pick((1, 1_100_000)), b" "),
        )

    def _noise(self) -> bytes:
        starts = (
            b"",
            b"\x16\x03\x01\x02\x00\x01",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET ",
            b"\r\n",
        )
        return self.rng.choice(starts) + self.rng.randbytes(self.rng.choice((1, 50, 5000)))

    def _many_headers(self) -> bytes:
        line = self._token().encode() + b": " + b"v" * self.rng.choice((1, 1000, 70_000)) + b"\r\n"
        return b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + line * self.rng.choice((1, 99, 900))

    def _bad_length(self) -> bytes:
        length = self.rng.choice(
            (b"-1", b"99999999999999999999", b"0x10", b"1e3", b"", b"3, 3", b"5")
        )
        return self._post(b"Content-Length: " + length) + b"\r\n" + b'{"a"'

    def _two_lengths(self) -> bytes:
        lengths = b"Content-Length: 4\r\nContent-Length: 5"
        both = b"Content-Length: 4\r\nTransfer-Encoding: chunked"
        return self._post(self.rng.choice((lengths, both))) + b"\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"

    def _bad_chunks(self) -> bytes:
        chunk = self.rng.choice(
            (b"zz\r\nxx\r\n", b"-1\r\n", b"ffffffffffffffffff\r\nx", b"5\r\nab\r\n0\r\n\r\n",
             b"1\r\nx", b"2;" + b"e" * 70_000 + b"\r\nab\r\n", b"3\r\nabcdef\r\n0\r\n\r\n",
             b"1\r\nx\r\n" * 3000)
        )  # fmt: skip
        return self._post(b"Transfer-Encoding: chunked") + b"\r\n" + chunk

    def _bad_line(self) -> bytes:
        lines = (
            b"GET  / HTTP/1.1", b"GET / HTTP/9.9", b"GET / HTTP/1.0", b"/ GET",
            b"GET http://x:99999/ HTTP/1.1", b"GET http://[ HTTP/1.1",
            b"CONNECT evil.example:443 HTTP/1.1", b"GET /\x00 HTTP/1.1", b"GET /%zz HTTP/1.1",
            b"GET //// HTTP/1.1", b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET /?\xff HTTP/1.1",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"G\xc3\x8bT / HTTP/1.1",
        )  # fmt: skip
        rest = self.rng.choice(
            (b"", b"Host: x\r\n", b" folded: x\r\n", b": empty\r\n", b"a b: c\r\n")
        )
        upgrade = self.rng.choice((b"", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"))
        return self.rng.choice(lines) + b"\r\nHost: localhost\r\n" + rest + upgrade + b"\r\n"

    def _post(self, header: bytes) -> bytes:
        return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n"


def _with(data: bytes, fields: bytes) -> bytes:
    """A JSON object with more fields in front."""
    return data.replace(b"{", b"{" + fields + b",", 1)


def _biases(number: int) -> bytes:
    return b",".join(b'"%d":1' % token for token in range(number))
