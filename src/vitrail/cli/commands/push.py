"""`vitrail push`."""

from typing import Annotated

import typer


def push(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a run folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to; by default main.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without uploading.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with its card; vitrail, timm and transformers load it from there.

    Needs a token: `hf auth login`, or HF_TOKEN.

    Example: `vitrail push runs/photos me/my-photos --private`
    """
    from vitrail.pretrained.push import plan_upload
    from vitrail.pretrained.push import push as send
    from vitrail.utils.text import counted, plain

    plan = plan_upload(model, repo)
    if dry_run:
        sizes = plan.sizes()
        for name, size in sizes.items():
            print(f"{size:>15,}  {plain(name)}")
        target = f"hf:{repo}@{revision}" if revision else f"hf:{repo}"
        print(f"{sum(sizes.values()):>15,}  bytes in {counted(len(sizes), 'file')} to upload to {target}")
        return
    print(plain(send(plan, private=private, revision=revision, message=message, create_pr=create_pr)))
