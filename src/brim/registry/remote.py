"""Describes a model on the Hugging Face hub, or at an address, from the first bytes of its files.

Headers come by range requests: a few megabytes of a GGUF file with its vocabulary, some kilobytes
of a safetensors part.  Nothing is stored, and a server that does not answer with the range that was
asked for is left after as many bytes as were wanted.
"""

import posixpath
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import brim
from brim.core.model import ModelSpec
from brim.errors import ModelFileError, NotFound, Unauthorized
from brim.registry.describe import SPLIT_NAME, check_part, describe_headers, model_stem
from brim.registry.describe_safetensors import describe_tensors
from brim.registry.gguf_header import GgufHeader, parse_gguf_header
from brim.registry.safetensors_header import (
    INDEX,
    MAX_HEADER_BYTES,
    SINGLE,
    SafeTensor,
    check_index,
    header_length,
    parse_header,
    parse_json,
    parts_of_index,
)

if TYPE_CHECKING:
    import httpx2

FIRST_BYTES = 1 << 20
"""First request of a GGUF header: all that one without a vocabulary has, and a good part of others;
each further one asks for as much again as is at hand."""

MAX_GGUF_HEADER_BYTES = 64 << 20
"""Of a remote header.  The largest vocabularies with their merges have 12 MB."""

SAFETENSORS_FIRST_BYTES = 1 << 17
"""First request of a part: longer than the header of most."""

TIMEOUT_S = 20.0
"""For one answer to begin, and between its pieces."""


class RemoteFiles:
    """Files below one address, read from their beginning.

    Args:
        where: What the user named, for messages.
        base: Address that file names are appended to.
        headers: Sent with every request to it (a login); never to another host.
        query: What follows each name, as in '?download=true'.
    """

    def __init__(
        self, where: str, base: str, headers: dict[str, str] | None = None, *, query: str = ""
    ) -> None:
        import httpx2

        self.where = where
        self.base = base
        self.query = query
        agent = {"User-Agent": f"brim/{brim.__version__}", "Accept-Encoding": "identity"}
        self._client = httpx2.Client(
            headers=agent | (headers or {}), timeout=TIMEOUT_S, follow_redirects=True
        )

    def __enter__(self) -> "RemoteFiles":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def read(self, name: str, start: int, num_bytes: int) -> tuple[bytes, int]:
        """Bytes of a file from `start`, fewer where it ends, and the size of all of it.

        Raises:
            NotFound: There is no such file, or the server cannot be reached.
            Unauthorized: It wants a login.
            ModelFileError: The server does not answer range requests.
        """
        span = f"bytes={start}-{start + num_bytes - 1}"
        with _as_sentences(self.where, name):
            address = self.base + name + self.query
            request = self._client.stream("GET", address, headers={"Range": span})
            with request as answer:
                self._check(answer, name)
                size = _whole_size(answer, start)
                if size is None:
                    raise ModelFileError(
                        f"the server of {self.where} does not answer range requests; download "
                        f"{name or 'the file'} and name it"
                    )
                return _first(answer, num_bytes), size

    def whole(self, name: str, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
        """A small file.

        Raises:
            NotFound: There is no such file, or the server cannot be reached.
            Unauthorized: It wants a login.
            ModelFileError: It is larger than `max_bytes`.
        """
        with _as_sentences(self.where, name):
            with self._client.stream("GET", self.base + name + self.query) as answer:
                self._check(answer, name)
                data = _first(answer, max_bytes + 1)
        if len(data) > max_bytes:
            raise ModelFileError(f"{name} of {self.where} has over {max_bytes} bytes; is it one?")
        return data

    def _check(self, answer: "httpx2.Response", name: str) -> None:
        status = answer.status_code
        what = f"{name} of {self.where}" if name else self.where
        if status in (401, 403):
            if not self.where.startswith("hf:"):
                raise Unauthorized(
                    f"the server refuses {what} (status {status}); download it and name the file"
                )
            raise Unauthorized(
                f"{self.where} wants you to log in or to accept its terms on its page: "
                "hf auth login, or set HF_TOKEN"
            )
        if status == 416:  # an empty file has no byte 0
            raise ModelFileError(f"{what} is empty; choose another file")
        if status >= 400:
            raise NotFound(f"{what} cannot be read: the server answers {status}; check the name")


def describe_gguf_at(files: RemoteFiles, names: Sequence[str], *, name: str | None) -> ModelSpec:
    """The GGUF model in one remote file, or in all parts of a split one, in order.

    Raises:
        BrimError: A file cannot be read, is damaged or no language model.
    """
    headers = [gguf_header_at(files, each)[0] for each in names]
    return describe_headers(headers, name or model_stem(posixpath.basename(names[0])).lower())


def describe_safetensors_at(files: RemoteFiles, names: Collection[str], *, name: str) -> ModelSpec:
    """The safetensors model among a repository's files.

    Raises:
        BrimError: A file cannot be read or is damaged, or there is no such model.
    """
    config = remote_json(files, "config.json")
    tensors: dict[str, SafeTensor] = {}
    if INDEX in names:
        index = remote_json(files, INDEX)
        for part in parts_of_index(index, f"{INDEX} of {files.where}"):
            tensors |= _safetensors_header(files, part)
        check_index(index, tensors, files.where)
    elif SINGLE in names:
        tensors = _safetensors_header(files, SINGLE)
    else:
        raise NotFound(
            f"{files.where} has neither .gguf files nor {SINGLE}; look for another repository of "
            f"the model, or name a quant to plan its config for: {files.where}:Q4_K_M"
        )
    return describe_tensors(config, tensors, name=name)


def remote_json(files: RemoteFiles, name: str) -> dict[str, Any]:
    """A JSON object from a remote file.

    Raises:
        BrimError: It cannot be read, or is something else.
    """
    return parse_json(f"{name} of {files.where}", files.whole(name))


def names_of_parts(name: str) -> list[str]:
    """All parts of the split file that `name` is a part of; the file alone if it is not split.

    Raises:
        ModelFileError: Its name says that it is a part which cannot be.

    Example:
        >>> names_of_parts("x-00002-of-00002.gguf")
        ['x-00001-of-00002.gguf', 'x-00002-of-00002.gguf']
    """
    match = SPLIT_NAME.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    check_part(name, int(match["number"]), count)
    suffix = name[-5:]
    return [f"{match['stem']}-{i:05}-of-{match['count']}{suffix}" for i in range(1, count + 1)]


def files_at(address: str) -> tuple[RemoteFiles, list[str]]:
    """The GGUF file at an address with what lies beside it, and the names of all its parts.

    Raises:
        NotFound: It is no http address of a .gguf file.
        ModelFileError: Its name says that it is a part which cannot be.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # brackets that hold no IPv6 address
        parts = urlsplit("")
    if not parts.netloc or not parts.path.lower().endswith(".gguf"):
        raise NotFound(f"{address:.100} is no address of a .gguf file; give https://HOST/NAME.gguf")
    folder, _, name = parts.path.rpartition("/")
    names = names_of_parts(name)
    # A password before the host is sent and never shown.
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{folder}"
    base = f"{parts.scheme}://{parts.netloc}{folder}/"
    # The hub's own links for downloads end in a query, which every part needs.
    query = f"?{parts.query}" if parts.query else ""
    return RemoteFiles(where, base, query=query), names


def gguf_header_at(files: RemoteFiles, name: str) -> tuple[GgufHeader, bytes]:
    """The header of a remote GGUF file, and the file's first bytes, at least up to its end.

    Raises:
        BrimError: The file cannot be read, is no GGUF file or damaged.
    """
    where = f"{name} of {files.where}"
    data, size = files.read(name, 0, FIRST_BYTES)
    while True:
        header = parse_gguf_header(where, data, size)
        if header is not None:
            return header, data
        if len(data) >= min(size, MAX_GGUF_HEADER_BYTES):
            raise ModelFileError(f"{where} has a header of over {len(data)} bytes; is it a model?")
        more, again = files.read(name, len(data), len(data))
        if again != size or not more:
            raise ModelFileError(f"{where} changed while it was read; try again")
        data += more


def _safetensors_header(files: RemoteFiles, name: str) -> dict[str, SafeTensor]:
    where = f"{name} of {files.where}"
    data, size = files.read(name, 0, SAFETENSORS_FIRST_BYTES)
    length = header_length(where, data[:8], size)
    if 8 + length > len(data):
        data += files.read(name, len(data), 8 + length - len(data))[0]
    return parse_header(Path(where), data[8 : 8 + length], size)


def _whole_size(answer: "httpx2.Response", start: int) -> int | None:
    """The file's size by the answer; None where the server sends something else than asked for."""
    if answer.status_code == 206:
        unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
        span, _, size = rest.partition("/")
        if unit == "bytes" and span.startswith(f"{start}-") and size.isdecimal():
            return int(size)
        return None
    # The whole file: usable where its beginning was wanted, and its size is said.
    length = answer.headers.get("Content-Length", "")
    return int(length) if start == 0 and length.isdecimal() else None


def _first(answer: "httpx2.Response", num_bytes: int) -> bytes:
    """At most so many bytes of a body, leaving the rest where it is."""
    data = bytearray()
    for piece in answer.iter_raw():
        data += piece
        if len(data) >= num_bytes:
            break
    return bytes(data[:num_bytes])


@contextmanager
def _as_sentences(where: str, name: str) -> Iterator[None]:
    import httpx2

    try:
        yield
    except (httpx2.RequestError, httpx2.InvalidURL) as exc:
        raise NotFound(
            f"{name or 'it'} of {where} cannot be read ({exc!s:.200}); check the connection"
        ) from exc
