"""Weights from the Hugging Face Hub, through huggingface_hub and its cache.

A revision is resolved to a commit first, so that all files are of the same commit. Cached files need no network.
"""

import hashlib
import os
import re
from pathlib import Path

from vitrail.errors import WeightsError
from vitrail.pretrained.local import CARD, CONFIG, PROCESSOR, SUFFIXES, choose_weights, shard_names
from vitrail.utils.download import unreachable
from vitrail.utils.files import atomic_write_text
from vitrail.utils.text import one_line, printable

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def hub_weights(name: str, sha256: str | None = None) -> tuple[Path, str]:
    """Download the weights of "org/repo" or "org/repo@revision" with config and card. Returns weights file and commit.

    sha256: the expected checksum of the weights, or its first digits.

    Raises:
        WeightsError: no such repository or revision, no permission, no connection and not in the cache, a checksum that
            does not match, or no weights in it.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise WeightsError(f"hf:{printable(name)} is not a repository name: use hf:org/repo or hf:org/repo@revision")
    repo, _, revision = name.partition("@")
    commit, files = _files(repo, revision or "main")
    weights = choose_weights(files, f"hf:{name}")
    path = _download(repo, weights, commit)
    # A file that does not match stays in the cache: it may be a later version that other programs use.
    if sha256 is not None and not (found := _digest(path)).startswith(sha256):
        raise WeightsError(
            f"{weights} of hf:{name} does not match the catalog: its sha256 starts with {found[:12]} "
            f"instead of {sha256[:12]}"
        )
    for extra in (CONFIG, PROCESSOR, CARD):
        if extra in files:
            _download(repo, extra, commit)
    if weights.endswith(".index.json"):
        for shard in shard_names(path):
            _download(repo, shard, commit)
    if commit != (revision or "main"):
        atomic_write_text(_cache(repo) / "refs" / (revision or "main"), commit)  # for offline use
    return path, commit


def is_cached(name: str) -> bool:
    """Whether the weights of "org/repo" or "org/repo@revision" are in huggingface_hub's cache."""
    repo, _, revision = name.partition("@")
    folder = _cached(repo, revision or "main")
    if folder is None:
        return False
    try:
        path = folder / choose_weights((file.name for file in folder.iterdir()), repo)
        return (
            all((folder / shard).is_file() for shard in shard_names(path)) if path.suffix == ".json" else path.is_file()
        )
    except WeightsError:
        return False


def _files(repo: str, revision: str) -> tuple[str, set[str]]:
    """The commit and its files, from the hub, or from the cache if there is no connection."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    cached = _cached(repo, revision)
    if cached and cached.name == revision:  # a commit, which cannot change
        files = {file.name for file in cached.iterdir()}
        if any(file.endswith((*SUFFIXES, ".index.json")) for file in files):
            return revision, files
    try:
        if reason := hub_unreachable():
            raise ConnectionError(reason)
        info = HfApi(endpoint=endpoint()).model_info(repo, revision=revision, timeout=10)
    except HfHubHTTPError as error:
        raise WeightsError(hub_error(repo, revision, error)) from None
    except Exception as error:  # connection errors differ between versions of huggingface_hub
        if cached:
            return cached.name, {file.name for file in cached.iterdir()}
        raise WeightsError(_offline(repo, error)) from None
    names = {entry.rfilename for entry in info.siblings or () if "/" not in entry.rfilename}
    return info.sha or revision, names


def _download(repo: str, file: str, commit: str) -> Path:
    """One file, from the cache or the hub; new files are verified."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    known = try_to_load_from_cache(repo, file, revision=commit)
    if isinstance(known, str):
        return Path(known)
    try:
        path = Path(hf_hub_download(repo, file, revision=commit, endpoint=endpoint()))
    except LocalEntryNotFoundError as error:
        raise WeightsError(_offline(f"{repo}/{file}", error)) from None
    except HfHubHTTPError as error:
        raise WeightsError(hub_error(repo, commit, error)) from None
    except Exception as error:  # the connection or the disk
        raise WeightsError(f"cannot download {file} of hf:{repo}: {one_line(error)}") from None
    blob = path.resolve()  # the cache names large files by their sha256
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and _digest(blob) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise WeightsError(f"{file} of hf:{repo} was damaged in the download and was removed: try again")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(repo: str, revision: str) -> Path | None:
    """The folder of a revision in the cache, perhaps incomplete."""
    reference = _cache(repo) / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = _cache(repo) / "snapshots" / commit
    return folder if re.fullmatch(r"[\w.-]+", commit) and folder.is_dir() else None


def _cache(repo: str) -> Path:
    """A repository's folder in huggingface_hub's cache, with refs/ and snapshots/."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def endpoint() -> str | None:
    """HF_ENDPOINT, if set."""
    return os.environ.get("HF_ENDPOINT") or None


def hub_unreachable() -> str | None:
    """Why the hub cannot be asked, known within seconds; None if it can."""
    from huggingface_hub import constants

    return "offline mode is set" if constants.HF_HUB_OFFLINE else unreachable(endpoint() or constants.ENDPOINT)


def hub_error(repo: str, revision: str | None, error: BaseException) -> str:
    """One line for any exception of huggingface_hub."""
    from huggingface_hub import errors

    while not isinstance(error, errors.HfHubHTTPError) and isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__  # a failed upload is wrapped
    match error:
        case errors.GatedRepoError():
            return f"hf:{repo} is gated: accept its terms on its page, then `hf auth login`"
        case errors.RepositoryNotFoundError():
            return f"the hub has no hf:{repo}, or the token has no access: check the name, or `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"hf:{repo} has no revision {printable(revision or 'main')!r}: omit it, or create the branch first"
        case errors.EntryNotFoundError():
            return f"hf:{repo} does not have the file that it listed: try again"
        case errors.HfHubHTTPError():
            status = getattr(error.response, "status_code", None)
            if status == 401:
                return "the hub does not accept the token: `hf auth login` with a new one, or correct HF_TOKEN"
            if status == 403:
                return (
                    f"the hub forbids access to hf:{repo}: use a token with write permission for {repo.split('/')[0]}"
                )
            return f"the hub refuses hf:{repo}: {one_line(error.server_message or error)}"
    return f"cannot reach the hub for hf:{repo} ({one_line(error)}): check the connection and try again"


def _offline(what: str, error: Exception) -> str:
    return (
        f"cannot reach the hub for hf:{what}, which is not in the cache ({one_line(error, 80)}): check the connection, "
        f"set HF_HOME to a cache that has it, or use a local file"
    )
