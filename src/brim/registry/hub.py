"""Brings GGUF files from the Hugging Face hub into its normal cache on disk.

Metadata, cache layout, credentials and offline mode are huggingface_hub's.  The transfer of a large
file is done in this module, because the library drops a partial file when it is interrupted and
compares only sizes: here the part that arrived is kept and continued, and the whole is compared
with the SHA-256 that the hub publishes before it gets its name.

huggingface_hub is imported where it is used: importing it takes longer than starting brim.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import brim
from brim.core.model import ModelSpec
from brim.errors import (
    BrimError,
    DoesNotFit,
    InvalidRequest,
    ModelFileError,
    NotFound,
    Unauthorized,
)
from brim.registry import remote
from brim.registry.config_json import spec_from_config
from brim.registry.describe import SPLIT_NAME, describe_gguf
from brim.registry.hub_choice import NOT_MODELS, HubFile, choose, has_gguf

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

SHA256 = re.compile(r"[0-9a-f]{64}")
"""It becomes a file's name, so nothing else is taken for one."""

INFO_TIMEOUT_S = 10.0
"""For one small answer from the hub; after it, what the cache holds is used."""

KEPT_FREE_BYTES = 1 << 30
"""Left free on the disk by a download: a full disk stops more than brim."""


class Located(NamedTuple):
    """Where a repository's model can be read without downloading it."""

    files: remote.RemoteFiles
    """Open while it is in use."""
    gguf: tuple[str, ...]
    """The chosen GGUF file or all its parts in order; empty where the repository has none."""
    names: frozenset[str]
    """All files of the repository."""


class Hub:
    """The hub and the cache that the environment names (`HF_ENDPOINT`, `HF_HOME`, ...).

    Args:
        endpoint: Another hub than the environment's.
        cache_dir: Another cache than the environment's.
    """

    def __init__(self, *, endpoint: str | None = None, cache_dir: Path | None = None) -> None:
        self._endpoint = endpoint
        self._cache_dir = cache_dir

    @property
    def cache_dir(self) -> Path:
        """Where repositories are cached."""
        from huggingface_hub import constants

        return self._cache_dir or Path(constants.HF_HUB_CACHE)

    def fetch(self, repo_id: str, quant: str | None = None) -> Path:
        """The repository's GGUF file (the first part of a split one), from the cache or the hub.

        Args:
            repo_id: `ORG/REPO`.
            quant: A quant's name or a file's, in any case; None takes the preferred one.

        Raises:
            InvalidRequest: `repo_id` is not of that form.
            NotFound: No such repository or quant, or it cannot be reached and is not cached.
            Unauthorized: The repository wants a login or an accepted licence.
            DoesNotFit: The disk is too full.
            ModelFileError: The transfer broke off, or what arrived is not what the hub published.
        """
        found = self._find(repo_id, quant)
        if isinstance(found, Path):
            return found
        commit, files = found
        parts = choose(files, quant, f"hf:{repo_id}")
        with _transfer_errors(repo_id):
            paths = [self._download(repo_id, commit, file) for file in parts]
            self._note_main(repo_id, commit)
        return paths[0]

    def describe(self, repo_id: str, quant: str | None, name: str | None) -> ModelSpec:
        """The repository's model from headers alone; cached files are not asked for again.

        Args:
            repo_id: `ORG/REPO`.
            quant: As in `fetch`; of a repository without GGUF files, a quant to plan for.
            name: What clients will call it.

        Raises:
            NotFound: No such repository or quant, or it cannot be reached and is not cached.
            InvalidRequest: `repo_id` is not of that form, or a quant is unknown.
            Unauthorized: The repository wants a login or an accepted licence.
            ModelFileError: A header is damaged, or of no language model.
        """
        with self.locate(repo_id, quant) as found:
            if isinstance(found, Path):
                return describe_gguf(found, name)
            if found.gguf:
                return remote.describe_gguf_at(found.files, found.gguf, name=name)
            name = name or repo_id.partition("/")[2].lower()
            if quant is not None:
                config = remote.remote_json(found.files, "config.json")
                return spec_from_config(config, quant=quant, name=name)
            return remote.describe_safetensors_at(found.files, found.names, name=name)

    @contextmanager
    def locate(self, repo_id: str, quant: str | None = None) -> Iterator[Path | Located]:
        """Where the repository's model lies: a GGUF file in the cache, or files on the hub.

        Args:
            repo_id: `ORG/REPO`.
            quant: As in `fetch`; ignored for a repository without GGUF files.

        Raises:
            BrimError: As `fetch`, but for what a transfer raises.
        """
        found = self._find(repo_id, quant)
        if isinstance(found, Path):
            yield found
            return
        commit, files = found
        parts = choose(files, quant, f"hf:{repo_id}") if has_gguf(files) else []
        gguf = tuple(file.name for file in parts)
        if gguf and (cached := self._cached(repo_id, gguf, commit)):
            yield cached
            return
        with self._remote(repo_id, commit) as source:
            yield Located(source, gguf, frozenset(file.name for file in files))

    def cached_files(self, repo_id: str | None = None) -> list[tuple[str, Path]]:
        """(repository, path) of cached GGUF files, one for each model, without asking the hub.

        Of a repository with several revisions only the current one is looked at.
        """
        found = []
        folder = _folder(repo_id) if repo_id else "models--*"
        for repository in sorted(self.cache_dir.glob(folder)):
            snapshot = _current_snapshot(repository)
            for path in sorted(snapshot.rglob("*.gguf")) if snapshot else ():
                match = SPLIT_NAME.fullmatch(path.name)
                if not NOT_MODELS.search(path.name) and (not match or int(match["number"]) == 1):
                    found.append(
                        (repository.name.removeprefix("models--").replace("--", "/"), path)
                    )
        return found

    # --- steps of both -------------------------------------------------------------------------

    def _find(self, repo_id: str, quant: str | None) -> "Path | tuple[str, list[HubFile]]":
        """Commit and files by the hub; the cached file where the hub cannot be asked."""
        import httpx2
        from huggingface_hub import errors

        if not REPOSITORY.fullmatch(repo_id):
            raise InvalidRequest(f"'{repo_id}' is not of the form ORG/REPO; see the model's page")
        try:
            commit, files = self._list(repo_id)
        except errors.OfflineModeIsEnabled:
            return self._fetch_cached(repo_id, quant, "HF_HUB_OFFLINE forbids asking the hub")
        except (httpx2.RequestError, httpx2.InvalidURL) as exc:
            return self._fetch_cached(repo_id, quant, f"the hub cannot be reached ({exc})")
        except errors.HfHubHTTPError as exc:
            if exc.response.status_code < 500:
                raise _refusal(repo_id, exc) from exc
            return self._fetch_cached(repo_id, quant, f"the hub answers {exc.response.status_code}")
        except errors.HFValidationError as exc:
            raise InvalidRequest(f"'{repo_id}' cannot name a repository; check it") from exc
        except (ValueError, KeyError, TypeError):  # not JSON, or JSON of another service
            reason = "what answers for the hub is something else (a proxy's page?)"
            return self._fetch_cached(repo_id, quant, reason)
        return commit, files

    def _remote(self, repo_id: str, commit: str) -> remote.RemoteFiles:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not re-exported
            build_hf_headers,
        )

        base = hf_hub_url(repo_id, "", revision=commit, endpoint=self._endpoint)
        headers = build_hf_headers(library_name="brim", library_version=brim.__version__)
        return remote.RemoteFiles(f"hf:{repo_id}", base.rstrip("/") + "/", headers)

    def _cached(self, repo_id: str, parts: Sequence[str], commit: str) -> Path | None:
        """The first part, where all are in the cache."""
        from huggingface_hub import try_to_load_from_cache

        paths = [
            try_to_load_from_cache(repo_id, part, cache_dir=self.cache_dir, revision=commit)
            for part in parts
        ]
        found = [Path(path) for path in paths if isinstance(path, str)]
        return found[0] if len(found) == len(parts) else None

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._endpoint, library_name="brim", library_version=brim.__version__)

    def _list(self, repo_id: str) -> tuple[str, list[HubFile]]:
        """Current commit and files of a repository; ValueError where the answer makes no sense."""
        info = self._api().model_info(repo_id, files_metadata=True, timeout=INFO_TIMEOUT_S)
        files = []
        for entry in info.siblings or ():
            sha256 = entry.lfs.sha256 if entry.lfs else None
            if sha256 is not None and not SHA256.fullmatch(sha256):
                raise ValueError(f"{sha256!r} is no SHA-256")
            files.append(HubFile(name=entry.rfilename, size_bytes=entry.size, sha256=sha256))
        return info.sha or "main", files

    def _fetch_cached(self, repo_id: str, quant: str | None, reason: str) -> Path:
        snapshot = _current_snapshot(self.cache_dir / _folder(repo_id))
        paths = snapshot.rglob("*.gguf") if snapshot else ()
        names = [path.relative_to(snapshot or "").as_posix() for path in paths]
        if snapshot is None or not names:
            raise NotFound(
                f"hf:{repo_id} is not in the cache {self.cache_dir}, and {reason}; "
                "connect and try again, or give the path of a .gguf file"
            )
        try:
            parts = choose([HubFile(name=name) for name in names], quant, f"hf:{repo_id}")
        except BrimError as exc:
            raise NotFound(f"{exc.message} (looked into the cache only: {reason})") from exc
        return snapshot / parts[0].name

    def _download(self, repo_id: str, commit: str, file: HubFile) -> Path:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(
            repo_id, file.name, cache_dir=self.cache_dir, revision=commit
        )
        if isinstance(cached, str):
            return Path(cached)
        size_bytes = file.size_bytes or 0
        # Larger files come only by the library's own protocol, which has no partial file to keep.
        if file.sha256 and 0 < size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            self._transfer(repo_id, commit, file, file.sha256, size_bytes)
        # Finds the blob that was just put there and links it into the snapshot.
        return Path(
            hf_hub_download(
                repo_id,
                file.name,
                revision=commit,
                cache_dir=self.cache_dir,
                endpoint=self._endpoint,
                library_name="brim",
                library_version=brim.__version__,
            )
        )

    def _transfer(
        self, repo_id: str, commit: str, file: HubFile, sha256: str, size_bytes: int
    ) -> None:
        """Put a file's bytes where the cache looks for them, continuing what is there already."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not re-exported
            WeakFileLock,
            build_hf_headers,
        )

        blob = self.cache_dir / _folder(repo_id) / "blobs" / sha256
        lock = self.cache_dir / ".locks" / _folder(repo_id) / f"{sha256}.brim.lock"
        for directory in (blob.parent, lock.parent):
            directory.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            partial = blob.with_name(f"{sha256}.brim.incomplete")
            with partial.open("ab") as out:
                if out.tell() > size_bytes:
                    out.seek(0)
                    out.truncate()
                _check_room(blob.parent, size_bytes - out.tell(), file.name)
                headers = build_hf_headers(library_name="brim", library_version=brim.__version__)
                http_get(
                    hf_hub_url(repo_id, file.name, revision=commit, endpoint=self._endpoint),
                    out,
                    resume_size=out.tell(),
                    # Compressed on the way, neither ranges nor sizes would be the file's.
                    headers=headers | {"Accept-Encoding": "identity"},
                    expected_size=size_bytes,
                    displayed_filename=file.name,
                )
            _check_sha256(partial, sha256, f"hf:{repo_id}, {file.name}")
            partial.replace(blob)

    def _note_main(self, repo_id: str, commit: str) -> None:
        """Record which commit `main` is, as the library does, so that offline use finds it."""
        ref = self.cache_dir / _folder(repo_id) / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        if not ref.is_file() or ref.read_text() != commit:
            ref.write_text(commit)


def _folder(repo_id: str) -> str:
    """The cache's directory for a model repository."""
    return "models--" + repo_id.replace("/", "--")


def _current_snapshot(repository: Path) -> Path | None:
    """The directory of the revision that `main` was when last seen, or the newest one there is."""
    snapshots = {path.name: path for path in repository.glob("snapshots/*") if path.is_dir()}
    try:
        return snapshots[(repository / "refs" / "main").read_text().strip()]
    except (OSError, UnicodeError, KeyError):
        return max(snapshots.values(), key=lambda path: path.stat().st_mtime, default=None)


def _check_room(directory: Path, num_bytes: int, name: str) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if num_bytes + KEPT_FREE_BYTES > free_bytes:
        raise DoesNotFit(
            f"{name} needs {num_bytes / 1e9:.1f} GB more and {free_bytes / 1e9:.1f} GB are free at "
            f"{directory} (1 GB stays free); make room, or set HF_HOME to a directory elsewhere"
        )


def _check_sha256(path: Path, sha256: str, what: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        path.unlink()
        raise ModelFileError(
            f"{what} arrived damaged: its SHA-256 is {actual[:16]}…, the hub says {sha256[:16]}…; "
            "what arrived was deleted: try again"
        )


def _refusal(repo_id: str, exc: Exception) -> BrimError:
    """What a hub's answer below 500 means."""
    from huggingface_hub import errors

    status = exc.response.status_code if isinstance(exc, errors.HfHubHTTPError) else 0
    if isinstance(exc, errors.GatedRepoError) or status == 403:
        return Unauthorized(
            f"hf:{repo_id} wants you to accept its terms on its page, and to log in: "
            "hf auth login, or set HF_TOKEN"
        )
    if isinstance(exc, errors.RepositoryNotFoundError):
        return NotFound(
            f"there is no repository {repo_id} on the hub, or it is private; check the spelling, "
            "or log in: hf auth login"
        )
    if isinstance(exc, errors.EntryNotFoundError):
        return NotFound(f"a file of hf:{repo_id} is gone from the hub; try again")
    return NotFound(f"the hub refuses hf:{repo_id} with status {status}; try again later")


@contextmanager
def _transfer_errors(repo_id: str) -> Iterator[None]:
    """Failures of a transfer as sentences; what arrived stays for the next attempt."""
    import httpx2
    from huggingface_hub import errors

    again = "give the same command again: it goes on where this stopped"
    try:
        yield
    except errors.HfHubHTTPError as exc:
        if exc.response.status_code < 500:
            raise _refusal(repo_id, exc) from exc
        raise ModelFileError(
            f"the transfer of hf:{repo_id} broke off: the hub answers {exc.response.status_code}; "
            f"{again}"
        ) from exc
    except (httpx2.RequestError, errors.LocalEntryNotFoundError) as exc:
        raise ModelFileError(f"the transfer of hf:{repo_id} broke off ({exc}); {again}") from exc
    except OSError as exc:
        raise ModelFileError(f"hf:{repo_id} cannot be stored ({exc}); {again}") from exc
