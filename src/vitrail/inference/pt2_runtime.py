"""Models of `torch.export` (model.pt2) of an export. Importing this imports no torch.

Shapes: B batch, H W height and width, C channels.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.errors import ExportError
from vitrail.inference.runtime import Images, Outputs
from vitrail.utils.text import one_line

_OUTPUTS = ("logits", "probabilities", "features")


class Pt2Session:
    """A program of uint8 images B H W C with the outputs logits, probabilities and features, in float32 on the CPU.

    threads: those of torch are of the whole process, and are left as they are.

    Raises:
        ExportError: the file is not such a program.
    """

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        import torch

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's reader uses functions of torch that are deprecated
                program = torch.export.load(path)
        except Exception as error:  # of zipfile, pickle and torch
            raise ExportError(f"{path} is not a model for this version of torch: {one_line(error)}") from None
        self._torch = torch
        self._module: Any = program.module()
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        (images,) = program.graph_signature.user_inputs
        self.input_shape = _sizes(nodes[str(images)])
        found = [_sizes(nodes[str(name)]) for name in program.graph_signature.user_outputs]
        self.output_shapes = dict(zip(_OUTPUTS, found, strict=True))

    def run(self, images: Images, output: str) -> Outputs:
        """The output of this name, for images B H W C. May be called from several threads."""
        with self._torch.inference_mode():
            found: Outputs = self._module(self._torch.from_numpy(images))[_OUTPUTS.index(output)].numpy()
        return np.asarray(found, np.float32)


def _sizes(value: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)
