"""The models of the Hugging Face hub and of its normal cache on disk: GGUF files and checkpoints.

Metadata, cache layout, credentials and offline mode are huggingface_hub's; bytes are moved by
`hub_transfer`.  huggingface_hub is imported where it is used: importing it takes longer than
starting brim.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import brim
from brim.core.model import ModelSpec
from brim.errors import BrimError, InvalidRequest, NotFound
from brim.registry import remote
from brim.registry.config_json import spec_from_config
from brim.registry.describe import SPLIT_NAME, describe_gguf
from brim.registry.describe_safetensors import describe_directory
from brim.registry.hub_choice import (
    NOT_MODELS,
    HubFile,
    checkpoint_text_files,
    checkpoint_weight_files,
    choose,
    has_checkpoint,
    has_gguf,
)
from brim.registry.hub_transfer import Transfer, folder_of, refusal_of
from brim.registry.safetensors_header import (
    INDEX,
    SINGLE,
    has_safetensors,
    parts_of_index,
    read_json,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

SHA256 = re.compile(r"[0-9a-f]{64}")
"""It becomes a file's name, so nothing else is taken for one."""

INFO_TIMEOUT_S = 10.0
"""For one small answer from the hub; after it, what the cache holds is used."""


class Listing(NamedTuple):
    """What a repository has: by the hub or, where that cannot be asked, by the cache."""

    repo_id: str
    commit: str
    files: list[HubFile]
    snapshot: Path | None = None
    """The cache's directory of them, where only the cache could be looked into."""
    reason: str = ""
    """Why the hub could not be asked."""


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

    def look(self, repo_id: str) -> Listing:
        """A repository's files by the hub; those in the cache where the hub cannot be asked.

        Args:
            repo_id: `ORG/REPO`.

        Raises:
            InvalidRequest: `repo_id` is not of that form.
            NotFound: No such repository, or it cannot be reached and is not cached.
            Unauthorized: The repository wants a login or an accepted licence.
        """
        import httpx2
        from huggingface_hub import errors

        if not REPOSITORY.fullmatch(repo_id):
            raise InvalidRequest(f"'{repo_id}' is not of the form ORG/REPO; see the model's page")
        try:
            commit, files = self._list(repo_id)
        except errors.OfflineModeIsEnabled:
            return self._look_into_cache(repo_id, "HF_HUB_OFFLINE forbids asking the hub")
        except (httpx2.RequestError, httpx2.InvalidURL) as exc:
            return self._look_into_cache(repo_id, f"the hub cannot be reached ({exc})")
        except errors.HfHubHTTPError as exc:
            if exc.response.status_code < 500:
                raise refusal_of(repo_id, exc) from exc
            return self._look_into_cache(repo_id, f"the hub answers {exc.response.status_code}")
        except errors.HFValidationError as exc:
            raise InvalidRequest(f"'{repo_id}' cannot name a repository; check it") from exc
        except (ValueError, KeyError, TypeError):  # not JSON, or JSON of another service
            reason = "what answers for the hub is something else (a proxy's page?)"
            return self._look_into_cache(repo_id, reason)
        return Listing(repo_id, commit, files)

    def fetch(self, repo_id: str, quant: str | None = None) -> Path:
        """The repository's GGUF file (the first part of a split one), from the cache or the hub.

        Args:
            repo_id: `ORG/REPO`.
            quant: A quant's name or a file's, in any case; None takes the preferred one.

        Raises:
            BrimError: As `look` and `fetch_gguf`.
        """
        return self.fetch_gguf(self.look(repo_id), quant)

    def fetch_gguf(self, listing: Listing, quant: str | None = None) -> Path:
        """As `fetch`, of a repository that was looked at.

        Raises:
            NotFound: No such quant.
            BrimError: What `Transfer.bring` raises.
        """
        parts = _chosen(listing, quant)
        if listing.snapshot is not None:
            return listing.snapshot / parts[0].name
        transfer = self._transfer(listing)
        path = transfer.bring(parts)[0]
        transfer.note_main()
        return path

    def fetch_checkpoint(self, listing: Listing) -> Path:
        """The directory of a repository's safetensors model, from the cache or the hub.

        Brings weights, config, tokenizer and chat template; never code or another form.

        Raises:
            NotFound: The repository has no such model.
            ModelFileError: It lacks a part.
            BrimError: What `Transfer.bring` raises.
        """
        where = f"hf:{listing.repo_id}"
        if not has_checkpoint(listing.files):
            raise NotFound(f"{where} has no config.json with {SINGLE}; look for another repository")
        if listing.snapshot is not None:
            _check_is_whole(listing, listing.snapshot)
            return listing.snapshot
        transfer = self._transfer(listing)
        # The small ones first: the index names the parts, and a gate shows at the first file.
        texts = transfer.bring(checkpoint_text_files(listing.files, where))
        index = next((path for path in texts if path.name == INDEX), None)
        parts = [] if index is None else parts_of_index(read_json(index), str(index))
        weights = transfer.bring(checkpoint_weight_files(listing.files, parts, where))
        transfer.note_main()
        return weights[0].parent

    def describe(self, repo_id: str, quant: str | None, name: str | None) -> ModelSpec:
        """The repository's model from headers alone: as GGUF where it has that form.

        Args:
            repo_id: `ORG/REPO`.
            quant: As in `fetch`; of a repository without GGUF files, a quant to plan for.
            name: What clients will call it.

        Raises:
            BrimError: As `look`, `describe_gguf` and `describe_checkpoint`.
        """
        listing = self.look(repo_id)
        if has_gguf(listing.files):
            return self.describe_gguf(listing, quant, name)
        return self.describe_checkpoint(listing, quant, name)

    def describe_gguf(self, listing: Listing, quant: str | None, name: str | None) -> ModelSpec:
        """A repository's GGUF model; cached files are not asked for again.

        Raises:
            NotFound: No such quant, or a file cannot be read.
            Unauthorized: The repository wants a login or an accepted licence.
            ModelFileError: A header is damaged, or of no language model.
        """
        with self._located(listing, quant) as found:
            if isinstance(found, Path):
                return describe_gguf(found, name)
            return remote.describe_gguf_at(found.files, found.gguf, name=name)

    def describe_checkpoint(
        self, listing: Listing, quant: str | None, name: str | None
    ) -> ModelSpec:
        """A repository's safetensors model; with a quant, what its config would be in that.

        Raises:
            NotFound: There is none, or a file cannot be read.
            InvalidRequest: The quant is unknown.
            Unauthorized: The repository wants a login or an accepted licence.
            ModelFileError: A header is damaged, or of no language model.
        """
        name = name or listing.repo_id.partition("/")[2].lower()
        if quant is None and (directory := self._cached_checkpoint(listing)) is not None:
            return describe_directory(directory, name=name)
        with self._remote(listing) as files:
            if quant is not None:
                config = remote.remote_json(files, "config.json")
                return spec_from_config(config, quant=quant, name=name)
            names = frozenset(file.name for file in listing.files)
            return remote.describe_safetensors_at(files, names, name=name)

    @contextmanager
    def locate(self, repo_id: str, quant: str | None = None) -> Iterator[Path | Located]:
        """Where the repository's model lies: a GGUF file in the cache, or files on the hub.

        Args:
            repo_id: `ORG/REPO`.
            quant: As in `fetch`; ignored for a repository without GGUF files.

        Raises:
            BrimError: As `fetch`, but for what a transfer raises.
        """
        with self._located(self.look(repo_id), quant) as found:
            yield found

    def cached_files(self, repo_id: str | None = None) -> list[tuple[str, Path]]:
        """(repository, path) of cached GGUF files, one for each model, without asking the hub.

        Of a repository with several revisions only the current one is looked at.
        """
        found = []
        for repository, snapshot in self._snapshots(repo_id):
            for path in sorted(snapshot.rglob("*.gguf")):
                match = SPLIT_NAME.fullmatch(path.name)
                if not NOT_MODELS.search(path.name) and (not match or int(match["number"]) == 1):
                    found.append((repository, path))
        return found

    def cached_checkpoints(self) -> list[tuple[str, Path]]:
        """(repository, directory) of cached safetensors models, without asking the hub."""
        return [
            (repository, snapshot)
            for repository, snapshot in self._snapshots(None)
            if has_checkpoint(_files_in(snapshot))
        ]

    # --- steps ---------------------------------------------------------------------------------

    def _snapshots(self, repo_id: str | None) -> Iterator[tuple[str, Path]]:
        """Cached repositories with the directory of their current revision."""
        pattern = folder_of(repo_id) if repo_id else "models--*"
        for repository in sorted(self.cache_dir.glob(pattern)):
            snapshot = _current_snapshot(repository)
            if snapshot is not None:
                yield repository.name.removeprefix("models--").replace("--", "/"), snapshot

    def _look_into_cache(self, repo_id: str, reason: str) -> Listing:
        snapshot = _current_snapshot(self.cache_dir / folder_of(repo_id))
        files = _files_in(snapshot) if snapshot else []
        if not (has_gguf(files) or has_safetensors(file.name for file in files)):
            raise NotFound(
                f"hf:{repo_id} is not in the cache {self.cache_dir}, and {reason}; "
                "connect and try again, or give the path of a model on this machine"
            )
        return Listing(repo_id, "", files, snapshot, reason)

    @contextmanager
    def _located(self, listing: Listing, quant: str | None) -> Iterator[Path | Located]:
        parts = _chosen(listing, quant) if has_gguf(listing.files) else []
        gguf = tuple(file.name for file in parts)
        if gguf and (cached := self._cached(listing, gguf)):
            yield cached
            return
        with self._remote(listing) as source:
            yield Located(source, gguf, frozenset(file.name for file in listing.files))

    @contextmanager
    def _remote(self, listing: Listing) -> Iterator[remote.RemoteFiles]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not re-exported
            build_hf_headers,
        )

        if listing.snapshot is not None:
            raise NotFound(f"hf:{listing.repo_id} is not whole in the cache, and {listing.reason}")
        base = hf_hub_url(listing.repo_id, "", revision=listing.commit, endpoint=self._endpoint)
        headers = build_hf_headers(library_name="brim", library_version=brim.__version__)
        where = f"hf:{listing.repo_id}"
        with remote.RemoteFiles(where, base.rstrip("/") + "/", headers) as files:
            yield files

    def _cached(self, listing: Listing, parts: Sequence[str]) -> Path | None:
        """The first part, where all are in the cache."""
        if listing.snapshot is not None:
            return listing.snapshot / parts[0]
        transfer = self._transfer(listing)
        found = [path for part in parts if (path := transfer.cached(part)) is not None]
        return found[0] if len(found) == len(parts) else None

    def _cached_checkpoint(self, listing: Listing) -> Path | None:
        """The directory of a safetensors model that is in the cache as a whole."""
        if listing.snapshot is not None:
            _check_is_whole(listing, listing.snapshot)
            return listing.snapshot
        transfer = self._transfer(listing)
        config, single = transfer.cached("config.json"), transfer.cached(SINGLE)
        if config is None:
            return None
        if single is not None:
            return single.parent
        index = transfer.cached(INDEX)
        if index is None:
            return None
        parts = parts_of_index(read_json(index), str(index))
        return index.parent if all(map(transfer.cached, parts)) else None

    def _transfer(self, listing: Listing) -> Transfer:
        return Transfer(self._endpoint, self.cache_dir, listing.repo_id, listing.commit)

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


def _chosen(listing: Listing, quant: str | None) -> list[HubFile]:
    """The GGUF file that is meant, or all its parts; of the cache, it says that it is of that."""
    try:
        return choose(listing.files, quant, f"hf:{listing.repo_id}")
    except BrimError as exc:
        if listing.snapshot is None:
            raise
        raise NotFound(f"{exc.message} (looked into the cache only: {listing.reason})") from exc


def _check_is_whole(listing: Listing, snapshot: Path) -> None:
    """Refuse a download that broke off, where it cannot be continued.

    Raises:
        NotFound: A part is missing.
    """
    if (snapshot / SINGLE).is_file():
        return
    index = snapshot / INDEX
    has_index = index.is_file() or index.is_symlink()
    parts = parts_of_index(read_json(index), str(index)) if has_index else [SINGLE]
    if missing := [part for part in parts if not (snapshot / part).is_file()]:
        raise NotFound(
            f"{missing[0]} of hf:{listing.repo_id} is not in the cache, and {listing.reason}; "
            "connect and give the same command again: it goes on where it stopped"
        )


def _files_in(snapshot: Path) -> list[HubFile]:
    return [
        HubFile(name=path.relative_to(snapshot).as_posix())
        for path in sorted(snapshot.rglob("*"))
        if path.is_file() or path.is_symlink()
    ]


def _current_snapshot(repository: Path) -> Path | None:
    """The directory of the revision that `main` was when last seen, or the newest one there is."""
    snapshots = {path.name: path for path in repository.glob("snapshots/*") if path.is_dir()}
    try:
        return snapshots[(repository / "refs" / "main").read_text().strip()]
    except (OSError, UnicodeError, KeyError):
        return max(snapshots.values(), key=lambda path: path.stat().st_mtime, default=None)
