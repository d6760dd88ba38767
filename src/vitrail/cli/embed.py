"""`vitrail embed`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated

import typer


def embed(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, a model folder, a name, hf:org/repo, a checkpoint.", show_default=False
        ),
    ],
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Images, folders (searched all the way down), patterns such as '*.jpg'."
        ),
    ],
    out: Annotated[str, typer.Option(help="The file to write: .npy or .parquet.")] = "features.npy",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in a batch; by default by their size.")] = None,
    img_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="See images at another size than in training: 384, or 320x192.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: the best that is there.")] = "auto",
) -> None:
    """Write the features of images to a file: the input of the model's classification head, float32.

    OUT.json beside it describes the model and lists the paths of an .npy file's rows and the images that could not be
    read. When the command is stopped or killed, the same command continues where it was.

    Example: `vitrail embed runs/photos holiday/ --out holiday.npy`
    """
    from vitrail.cli.source import open_model
    from vitrail.cli.tables import stderr, stdout
    from vitrail.inference.feature_file import embed_to_file

    classifier = open_model(model, device, img_size)
    try:
        result = embed_to_file(classifier.engine(), paths, out, batch_size=batch_size, progress=_progress)
    except KeyboardInterrupt:
        stderr().print("stopped; the same command continues from here")
        raise
    stdout().print(f"{result.images:,} images, {result.features:,} features each, in {result.path}")
    for skipped in result.skipped:
        stderr().print(f"skipped: {skipped['path']} {skipped['reason']}", style="yellow")


def _progress(done: int, total: int) -> AbstractContextManager[Callable[[int], None]]:
    from vitrail.cli.progress import progress
    from vitrail.cli.tables import stderr

    if done:
        stderr().print(f"continuing: {done:,} of {total:,} images are done")
    return progress("images", total - done)
