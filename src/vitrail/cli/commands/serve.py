"""`vitrail serve`."""

import os
from typing import Annotated

import typer

from vitrail.cli.common.options import DeviceOption, ModelArgument, PrecisionOption


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with its own copy of the model.")] = 1,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="VITRAIL_TOKEN", metavar="TEXT", help="Bearer token that requests need.", show_default=False
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Origin of a web page that may call the service; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in responses; by default its folder's.", show_default=False)
    ] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, max=2047, help="Largest request, MB.")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of an image.")] = 50_000_000,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait; more are answered with 429.")] = 256,
    max_batch: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Images of a batch; by default measured at start.")
    ] = None,
    access_log: Annotated[bool, typer.Option(help="Print a JSON line for each request to stderr.")] = True,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="On CUDA: record passes and replay them.")] = False,
    device: DeviceOption = None,
    precision: PrecisionOption = "auto",
) -> None:
    """Answer HTTP requests, and show a page to drop images on.

    SIGTERM and Ctrl-C stop it after the requests that were accepted are answered.

    Example: `vitrail serve exports/photos --port 8080`
    """
    try:
        from vitrail.service.server import serve as run
    except ImportError as error:
        from vitrail.errors import DeviceError, how_to_install

        raise DeviceError(f"serving needs {error.name}: {how_to_install('serve')}") from None
    run(
        model,
        device=device or "auto",
        precision=precision,
        name=name,
        host=host,
        port=port,
        workers=workers,
        # An empty variable, which typer takes for none, is a secret that was not filled in: it is refused.
        token=os.environ.get("VITRAIL_TOKEN") if token is None else token,
        origins=tuple(origin or ()),
        max_body=max_body_mb * 1_000_000,
        max_pixels=max_pixels,
        max_queue=max_queue,
        max_batch=max_batch,
        access_log=access_log,
        cuda_graphs=cuda_graphs,
    )
