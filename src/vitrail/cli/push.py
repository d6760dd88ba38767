"""`vitrail push`."""

from typing import Annotated

import typer


def push(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a run folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="By default main.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with its card; vitrail, timm and transformers load it from there.

    Needs a token: `hf auth login`, or HF_TOKEN.

    Example: `vitrail push runs/photos me/my-photos --private`
    """
    from vitrail.pretrained.push import plan_upload
    from vitrail.pretrained.push import push as send

    plan = plan_upload(model, repo)
    if dry_run:
        sizes = plan.sizes()
        for name, size in sizes.items():
            print(f"{size:>15,}  {name}")
        print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files would go to {_where(repo, revision)}")
        return
    print(send(plan, private=private, revision=revision, message=message, create_pr=create_pr))


def _where(repo: str, revision: str | None) -> str:
    return f"hf:{repo}@{revision}" if revision else f"hf:{repo}"
