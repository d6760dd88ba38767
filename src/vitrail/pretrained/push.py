"""Upload of a model folder to the Hugging Face Hub.

Only the three files of a model folder are sent, in one commit. Local paths in its notes are reduced to the file name.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import ConfigError, WeightsError
from vitrail.pretrained.hub import endpoint, hub_error
from vitrail.pretrained.local import CARD, CONFIG
from vitrail.pretrained.model_card import without_paths
from vitrail.pretrained.model_folder import WEIGHTS, find_model_folder, read_model_folder, to_card
from vitrail.utils.files import user_path
from vitrail.utils.text import printable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class UploadPlan:
    """The files to upload: name in the repository -> content, or the local file."""

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
        ConfigError: `repo` is not a repository name.
        WeightsError: there is no model folder, or it is damaged.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ConfigError(f"{printable(repo)!r} is not a repository name: use ORG/NAME or USER/NAME")
    path = user_path(model)
    folder = find_model_folder(path)
    if folder is None:
        what = "contains no model" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {what}: push takes a model folder or a run folder of `vitrail train`")
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
        WeightsError: no token, no connection, no permission, or another refusal of the hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    repo = plan.repo
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"cannot push to hf:{repo}: HF_HUB_OFFLINE is set; unset it to go online")
    if not get_token():
        raise WeightsError(f"cannot push to hf:{repo} without a token: `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint())
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
    except WeightsError:
        raise
    except Exception as error:  # connection errors differ between versions of huggingface_hub
        raise WeightsError(hub_error(repo, revision, error)) from error
    return str(commit.pr_url or commit.commit_url)


def _refuse_public(api: "HfApi", repo: str) -> None:
    """create_repo does not change the visibility of an existing repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo, timeout=10)
    except RepositoryNotFoundError:
        return
    if not info.private:
        raise WeightsError(
            f"hf:{repo} already exists and is public: make it private in its settings, or choose another"
        )
