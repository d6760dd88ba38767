"""The torch runtime.

Shapes: B batch, H W height and width, C channels, K classes, F features.
"""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import DeviceError, ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.inference.adaptive_threads import AdaptiveThreads
from vitrail.inference.cuda_graphs import CudaGraphs
from vitrail.inference.runtime import Images, Outputs, default_batch_size
from vitrail.layers.embed import PatchConv
from vitrail.models.base import ImageModel
from vitrail.utils.device import uses_bf16
from vitrail.utils.eval_view import eval_view
from vitrail.utils.fingerprint import model_fingerprint

Forward = Callable[[Tensor], Any]


class TorchRuntime:
    """A torch model in evaluation mode, whatever mode the model itself is in.

    precision: "off" for float32, "bf16" for bfloat16 autocast, "auto" for the faster one on this hardware (see
    `uses_bf16`). adapt_threads: in a long job on the CPU, compute with as many threads as are the fastest while other
    programs use the cores; the last bits of the results depend on it. cuda_graphs: record passes and replay them
    (`CudaGraphs`), for many small batches on CUDA; hooks then run in recordings alone. frozen: the parameters do not
    change while the runtime is in use, so that those of linear layers and convolutions of vitrail's models are rounded
    to bfloat16 once and not in every pass, with the same results, and half as much memory more. Else parameters,
    buffers and hooks are shared with the model; after a change of its modules, such as a new head, a new runtime is
    needed, which takes about 2 ms for a ViT-B.

    Raises:
        ModelError: weights that are not float32.
        DeviceError: `cuda_graphs` on another device.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        precision: str = "auto",
        name: str | None = None,
        adapt_threads: bool = False,
        cuda_graphs: bool = False,
        frozen: bool = False,
    ) -> None:
        self.model = self._shared = eval_view(model)
        self.preprocess = preprocess
        first = next(model.parameters())
        if first.dtype != torch.float32:
            kind = str(first.dtype).removeprefix("torch.")
            raise ModelError(f"{name or type(model).__name__} has weights in {kind}: call model.float() first")
        self.device = first.device
        self.bf16 = uses_bf16(model, self.device, precision)
        if frozen and self.bf16 and isinstance(model, ImageModel):  # external ones may switch autocast off in places
            self.model = _rounded(model)
        self.name = name or type(model).__name__
        self.num_classes = int(getattr(model, "num_classes", 0))
        self.num_features = int(getattr(model, "num_features", 0))
        self.default_batch_size = default_batch_size(preprocess, self.device.type)
        if cuda_graphs and self.device.type != "cuda":
            raise DeviceError(f"CUDA graphs need a CUDA device, and the model is on {self.device}")
        self._logits: Forward = self.model
        self._features: Forward = partial(_pre_logits, self.model)
        if cuda_graphs:
            self._logits, self._features = (CudaGraphs(each, self.model) for each in (self._logits, self._features))
        self._threads = AdaptiveThreads() if adapt_threads and self.device.type == "cpu" else None

    def logits(self, images: Images) -> Outputs:
        return self._run(self._logits, images)

    def features(self, images: Images) -> Outputs:
        return self._run(self._features, images)

    def fingerprint(self) -> str:
        preprocess = json.dumps(self.preprocess.to_dict(), sort_keys=True)
        return model_fingerprint(self._shared, self.name, preprocess, "bf16" if self.bf16 else "float32")

    def _run(self, forward: Forward, images: Images) -> Outputs:
        if self._threads is not None:
            return self._threads.run(partial(self._compute, forward), images)
        return self._compute(forward, images)

    def _compute(self, forward: Forward, images: Images) -> Outputs:
        with torch.inference_mode(), autocast(self.device, self.bf16):
            outputs: Outputs = forward(self._normalize(images)).float().cpu().numpy()
        return outputs

    def _normalize(self, images: Images) -> Tensor:
        """uint8 B H W C to normalised float32 B C H W on the model's device."""
        source = torch.from_numpy(images)
        if self.device.type == "cuda":
            source = source.pin_memory()  # the copy and the transfer take half as long as one from other memory
        pixels = source.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        # Not contiguous(): with one channel it keeps strides that convolutions take for channels-last.
        planes = torch.empty(pixels.shape, dtype=torch.uint8, device=self.device).copy_(pixels)
        return self.preprocess.normalize(planes)


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 or float32 for a forward pass, also inside another autocast context.

    Without autocast's cache of cast weights: it is shared by all threads, and training cannot use a tensor that was
    cast in inference mode.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def _rounded(model: ImageModel) -> nn.Module:
    """The model's `eval_view`, with parameters of layers in bfloat16, as autocast would cast them in every pass.

    Layers whose parameters are of another kind, or are computed by a hook, share theirs.
    """
    view = eval_view(model)
    for module in view.modules():
        if type(module) not in (nn.Linear, nn.Conv2d, PatchConv) or module._forward_pre_hooks:
            continue
        parameters = module._parameters
        if all(each is None or type(each.data) is Tensor for each in parameters.values()):
            rounded = {
                name: None if each is None else nn.Parameter(each.detach().bfloat16(), requires_grad=False)
                for name, each in parameters.items()
            }
            module.__dict__["_parameters"] = rounded
    return view


def _pre_logits(model: nn.Module, x: Tensor) -> Any:
    """The input of the head, by timm's interface where the model is not of vitrail."""
    if isinstance(model, ImageModel):
        return model.forward_pre_logits(x)
    if hasattr(model, "forward_head") and hasattr(model, "forward_features"):
        return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    if getattr(model, "num_classes", None) == 0:
        return model(x)
    raise ModelError(f"{type(model).__name__} has no forward_features and forward_head: its features are unknown")
