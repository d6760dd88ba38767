"""A model folder to a repository of the Hugging Face Hub, through huggingface_hub.

Only the three files of a model folder are sent, in one commit. Paths of this machine that training noted (where the
images lay) are cut down to their last name on the way.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import VitrailError
from vitrail.pretrained.model_card import without_paths
from vitrail.pretrained.model_folder import CARD, CONFIG, WEIGHTS, is_model_folder, read_model_folder, to_card
from vitrail.utils.text import one_line, printable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class UploadPlan:
    """What is sent where: the file's name in the repository, and its content or the file that holds it."""

    repo: str
    files: dict[str, bytes | Path]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }


def plan_upload(model: str | Path, repo: str) -> UploadPlan:
    """Read and check a model folder or run folder and collect the files that `push` uploads. Works offline.

    An unedited card is rewritten to name the repository; an edited one is sent unchanged.

    Raises:
        VitrailError: no such folder, a damaged one, or no name for a repository.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise VitrailError(f"{printable(repo)!r} is not a repository name: write org/name, or your own name for org")
    folder = _folder(Path(model).expanduser())
    contents = read_model_folder(folder)
    files: dict[str, bytes | Path] = {CARD: folder / CARD, CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
    if not (folder / CARD).is_file() or (folder / CARD).read_text(encoding="utf-8") == to_card(contents):
        files[CARD] = to_card(contents, repo).encode()
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    notes = record["vitrail"]["notes"]
    if without_paths(notes) != notes:
        record["vitrail"]["notes"] = without_paths(notes)
        files[CONFIG] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    return UploadPlan(repo, files)


def _folder(path: Path) -> Path:
    for folder in (path, path / "model"):
        if is_model_folder(folder):
            return folder
    what = "holds no model" if path.is_dir() else "is no folder" if path.exists() else "does not exist"
    raise VitrailError(f"{path} {what}: push takes a model folder or a run folder that `vitrail train` has written")


def push(
    plan: UploadPlan,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload; create the repository and the branch `revision` if needed. Returns the URL of the commit or pull request.

    Raises:
        VitrailError: no token, no connection, no permission, or whatever else the hub refuses; in one line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    repo = plan.repo
    if constants.HF_HUB_OFFLINE:
        raise VitrailError(f"cannot push to hf:{repo}: HF_HUB_OFFLINE is set; unset it to go online")
    if not get_token():
        raise VitrailError(f"cannot push to hf:{repo} without a token: `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    additions = [CommitOperationAdd(name, content) for name, content in plan.files.items()]
    try:
        if private:
            _refuse_public(api, repo)
        if not create_pr:
            api.create_repo(repo, private=private or None, exist_ok=True)
            if revision not in (None, "main"):
                api.create_branch(repo, branch=str(revision), exist_ok=True)
        commit = api.create_commit(
            repo,
            additions,
            commit_message=message or "Upload model with vitrail",
            revision=revision,
            create_pr=create_pr,
        )
    except VitrailError:
        raise
    except Exception as error:  # the connection too; whose error that is differs from version to version
        raise VitrailError(_explain(repo, revision, error)) from error
    return str(commit.pr_url or commit.commit_url)


def _refuse_public(api: "HfApi", repo: str) -> None:
    """A repository that is there keeps its visibility: what is to be private must not land in a public one."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo, timeout=10)
    except RepositoryNotFoundError:
        return
    if not info.private:
        raise VitrailError(
            f"hf:{repo} already exists and is public: make it private in its settings, or choose another"
        )


def _explain(repo: str, revision: str | None, error: BaseException) -> str:
    """One line for whatever went wrong. A file's failure comes wrapped in an error that does not say why."""
    from huggingface_hub import errors

    while not isinstance(error, errors.HfHubHTTPError) and isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__
    if not isinstance(error, errors.HfHubHTTPError):
        return f"cannot reach the hub for hf:{repo} ({one_line(error)}): connect and try again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"hf:{repo} has no revision {printable(revision or 'main')!r}: leave it out, or create the branch first"
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return "the hub does not accept the token: `hf auth login` with a new one, or correct HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no hf:{repo}, or this token has no access: check the name, or `hf auth login` with another"
    if status == 403:
        org = repo.partition("/")[0]
        return f"the hub forbids writing to hf:{repo}: use a token with write permission and an account in {org}"
    return f"the hub refuses hf:{repo}: {one_line(getattr(error, 'server_message', None) or error)}"
