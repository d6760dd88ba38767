"""`vitrail embed`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated

import typer

from vitrail.cli.common.options import (
    BatchSizeOption,
    DeviceOption,
    ModelArgument,
    PathsArgument,
    PrecisionOption,
    SizeOption,
    WeightsOption,
    open_model,
)


def embed(
    model: ModelArgument,
    paths: PathsArgument,
    out: Annotated[str, typer.Option(help="The file to write: .npy or .parquet.")] = "features.npy",
    weights: WeightsOption = None,
    batch_size: BatchSizeOption = None,
    img_size: SizeOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = "auto",
) -> None:
    """Write the features of images to a file: the input of the model's classification head, float32.

    OUT.json in the same folder describes the model and lists the paths of an .npy file's rows and the images that could
    not be read. If the command is interrupted, running it again continues.

    Example: `vitrail embed runs/photos holiday/ --out holiday.npy`
    """
    from vitrail.cli.common.tables import print_skipped, stdout
    from vitrail.data.formats.objects import image_inputs
    from vitrail.feature_file import embed_to_file
    from vitrail.utils.text import counted

    classifier = open_model(model, device, img_size, precision, weights)
    try:
        result = embed_to_file(
            classifier.engine(adapt_threads=True, frozen=True),
            image_inputs(paths),
            out,
            batch_size=batch_size,
            progress=_progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; run the same command again to continue") from None
    stdout().print(f"{counted(result.images, 'image')}, {result.features:,} features each, in {result.path}")
    print_skipped(result.skipped)


def _progress(done: int, total: int) -> AbstractContextManager[Callable[[int], None]]:
    from vitrail.cli.common.progress import progress
    from vitrail.cli.common.tables import stderr

    if done:
        stderr().print(f"resuming after {done:,} of {total:,} images")
    return progress("images", total - done)
