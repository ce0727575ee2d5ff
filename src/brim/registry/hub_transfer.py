"""Moves files from the Hugging Face hub into its normal cache: continued, checked, then named.

The transfer of a large file is done here, because huggingface_hub drops a partial file when it is
interrupted and compares only sizes: the part that arrived is kept and continued, and the whole is
compared with the SHA-256 that the hub publishes before it gets its name.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import brim
from brim.errors import BrimError, DoesNotFit, ModelFileError, NotFound, Unauthorized
from brim.registry.hub_choice import HubFile

KEPT_FREE_BYTES = 1 << 30
"""Left free on the disk by a download: a full disk stops more than brim."""


class Transfer:
    """Brings files of one repository's revision into a cache.

    Args:
        endpoint: Another hub than the environment's.
        cache_dir: The cache.
        repo_id: `ORG/REPO`.
        commit: The revision.
    """

    def __init__(self, endpoint: str | None, cache_dir: Path, repo_id: str, commit: str) -> None:
        self._endpoint = endpoint
        self._cache_dir = cache_dir
        self._repo_id = repo_id
        self._commit = commit

    def bring(self, files: Sequence[HubFile]) -> list[Path]:
        """The files' places in the cache, each downloaded unless it is there.

        Raises:
            NotFound: One is gone from the hub.
            Unauthorized: The repository wants a login or an accepted licence.
            DoesNotFit: The disk is too full.
            ModelFileError: The transfer broke off, or what arrived is not what the hub published.
        """
        with transfer_errors(self._repo_id):
            missing = [file for file in files if self.cached(file.name) is None]
            if len(missing) > 1:  # a single file is checked by what of it is missing
                self._check_room_for(missing)
            return [self._download(file) for file in files]

    def cached(self, name: str) -> Path | None:
        """Where the cache has a file of this revision."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self._repo_id, name, cache_dir=self._cache_dir, revision=self._commit
        )
        return Path(found) if isinstance(found, str) else None

    def note_main(self) -> None:
        """Record which commit `main` is, as the library does, so that offline use finds it."""
        with transfer_errors(self._repo_id):
            ref = self._cache_dir / folder_of(self._repo_id) / "refs" / "main"
            ref.parent.mkdir(parents=True, exist_ok=True)
            if not ref.is_file() or ref.read_text() != self._commit:
                ref.write_text(self._commit)

    @property
    def _blobs(self) -> Path:
        return self._cache_dir / folder_of(self._repo_id) / "blobs"

    def _check_room_for(self, files: Sequence[HubFile]) -> None:
        """Refuse all of them before the first byte, rather than the last one after hours."""
        num_bytes = 0
        for file in files:
            partial = self._blobs / f"{file.sha256}.brim.incomplete"
            kept_bytes = partial.stat().st_size if partial.is_file() else 0
            num_bytes += max(0, (file.size_bytes or 0) - kept_bytes)
        self._blobs.mkdir(parents=True, exist_ok=True)
        _check_room(self._blobs, num_bytes, f"hf:{self._repo_id}")

    def _download(self, file: HubFile) -> Path:
        from huggingface_hub import constants, hf_hub_download

        if (cached := self.cached(file.name)) is not None:
            return cached
        size_bytes = file.size_bytes or 0
        # Larger files come only by the library's own protocol, which has no partial file to keep.
        if file.sha256 and 0 < size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            self._transfer(file, file.sha256, size_bytes)
        # Finds the blob that was just put there and links it into the snapshot.
        return Path(
            hf_hub_download(
                self._repo_id,
                file.name,
                revision=self._commit,
                cache_dir=self._cache_dir,
                endpoint=self._endpoint,
                library_name="brim",
                library_version=brim.__version__,
            )
        )

    def _transfer(self, file: HubFile, sha256: str, size_bytes: int) -> None:
        """Put a file's bytes where the cache looks for them, continuing what is there already."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not re-exported
            WeakFileLock,
            build_hf_headers,
        )

        repo_id, blob = self._repo_id, self._blobs / sha256
        lock = self._cache_dir / ".locks" / folder_of(repo_id) / f"{sha256}.brim.lock"
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
                    hf_hub_url(repo_id, file.name, revision=self._commit, endpoint=self._endpoint),
                    out,
                    resume_size=out.tell(),
                    # Compressed on the way, neither ranges nor sizes would be the file's.
                    headers=headers | {"Accept-Encoding": "identity"},
                    expected_size=size_bytes,
                    displayed_filename=file.name,
                )
            _check_sha256(partial, sha256, f"hf:{repo_id}, {file.name}")
            partial.replace(blob)


def folder_of(repo_id: str) -> str:
    """The cache's directory for a model repository."""
    return "models--" + repo_id.replace("/", "--")


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


def refusal_of(repo_id: str, exc: Exception) -> BrimError:
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
def transfer_errors(repo_id: str) -> Iterator[None]:
    """Failures of a transfer as sentences; what arrived stays for the next attempt."""
    import httpx2
    from huggingface_hub import errors

    again = "give the same command again: it goes on where this stopped"
    try:
        yield
    except errors.HfHubHTTPError as exc:
        if exc.response.status_code < 500:
            raise refusal_of(repo_id, exc) from exc
        raise ModelFileError(
            f"the transfer of hf:{repo_id} broke off: the hub answers {exc.response.status_code}; "
            f"{again}"
        ) from exc
    except (httpx2.RequestError, errors.LocalEntryNotFoundError) as exc:
        raise ModelFileError(f"the transfer of hf:{repo_id} broke off ({exc}); {again}") from exc
    except OSError as exc:
        raise ModelFileError(f"hf:{repo_id} cannot be stored ({exc}); {again}") from exc
