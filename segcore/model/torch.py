"""Networks in torch: TorchScript, torch.export, and classes whose weights lie in safetensors."""

from __future__ import annotations

import threading
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segcore.box import Box
from segcore.errors import CardError, ModelError, one_line
from segcore.model.archive import open_export, read_state
from segcore.model.card import Artifact, NetworkClass
from segcore.model.probe import Network, Trace, noise
from segcore.model.segmenter import Floats, Segmenter, failure


def load_module(artifact: Artifact, path: Path) -> torch.nn.Module:
    """The network of an artifact. Raises ModelError where it does not load, CardError where it is not allowed.

    The caller has checked the digest: an archive is only opened when its card vouches for it.
    """
    try:
        if artifact.format == "torchscript":
            module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            if "aten::from_file" in str(module.inlined_graph):
                raise ModelError(f"{path} reads or writes files (aten::from_file), which no network needs")
            return module
        if artifact.format == "torch-export":
            return open_export(path)
        assert artifact.network is not None
        module = build(artifact.network)
        module.load_state_dict(read_state(path))
        return module.eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{path} does not load as {artifact.format}: {one_line(error)}") from error


def build(network: NetworkClass) -> torch.nn.Module:
    """A network of an allowed class, its weights random. Raises CardError, or ModelError without its package."""
    home, _, name = network.name.rpartition(".")
    package = home.partition(".")[0]
    try:
        found = getattr(import_module(home), name, None)
    except ImportError as error:
        raise ModelError(
            f"the network is {network.name}, and {error.name} does not import; run `pip install {error.name}`"
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__.startswith(package)):
        raise CardError(f"{network.name} is no network of {package}; see its documentation for their names")
    arguments: dict[str, Any] = dict(network.arguments)
    for key, value in arguments.items():
        if value and ("pretrained" in key or "url" in key):
            raise CardError(
                f"{network.name}: the argument {key} fetches weights, and those come from a file; leave it out"
            )
    if package == "segmentation_models_pytorch":
        # Its default is to fetch an encoder's weights, and those are in the file already.
        arguments["encoder_weights"] = None
    try:
        return found(**arguments).eval()
    except Exception as error:  # whatever a constructor makes of arguments that it does not like
        raise CardError(f"{network.name} does not take {arguments}: {one_line(error)}") from error


class TorchSegmenter:
    """A module that turns one tensor into one, run in float32 without gradients."""

    def __init__(self, module: torch.nn.Module, threads: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._threads = threads
        if self._device.type == "cuda":
            # TF32 keeps 10 bits of a float32: too few for the scores of tiles to be those of the whole.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._module = module.to(self._device)
        self.device = threading.Lock()
        on = "CUDA" if self._device.type == "cuda" else f"CPU, {threads} threads"
        self.engine = f"torch {torch.__version__} ({on})"
        self.batch = 1 if self._device.type == "cpu" else 16

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        try:
            with torch.inference_mode():
                # OpenMP keeps the number of threads per calling thread, so it is said in each of them.
                torch.set_num_threads(self._threads)
                # A copy: a module may change its input in place, and whoever asks may want it again.
                out = self._module(torch.tensor(batch, device=self._device))
        except Exception as error:  # whatever the module's own code raises
            raise failure("torch", f"a batch of shape {batch.shape}", _cause(error)) from error
        if not isinstance(out, torch.Tensor):
            raise ModelError(
                f"the network returns {type(out).__name__}, and segflow wants one tensor, the scores: put it into a "
                f"module that returns just these"
            )
        return np.ascontiguousarray(out.float().cpu().numpy())

    def release(self) -> None:
        """There is nothing to give back on a CPU; on a GPU, what torch keeps for the next window."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class TorchNetwork(TorchSegmenter):
    """A module under the probe. A NaN in its input marks whatever an output depends on, in one forward pass.

    Convolution, pooling, normalisation, the usual activations and interpolation all carry NaN.
    """

    def __init__(self, module: torch.nn.Module, channels: int, threads: int) -> None:
        super().__init__(module, threads)
        self.channels = channels
        self.spatial: tuple[int | None, ...] | None = None
        self.parameters = sum(parameter.numel() for parameter in module.parameters())

    def footprint(self, marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(np.isnan(self(self._image(marked))).any(axis=(0, 1)))

    def flooding(self, marked: NDArray[np.bool_]) -> tuple[str, ...]:
        with _FloodWatch() as watch:
            self(self._image(marked))
        return tuple(f"{name} ({count} times)" if count > 1 else name for name, count in watch.found.items())

    def trace(self, shape: tuple[int, ...]) -> Trace:
        image = noise((1, self.channels, *shape))
        with FlopCounterMode(display=False) as flops:
            self(image)
        with _SizeWatch(len(shape)) as sizes:
            self(image)
        smallest = zip(*(sizes.found or [shape]), strict=True)
        downsampling = tuple(max(1, round(n / min(axis))) for n, axis in zip(shape, smallest, strict=True))
        return Trace(downsampling, flops.get_total_flops())

    def _image(self, marked: NDArray[np.bool_]) -> Floats:
        image = noise((1, self.channels, *marked.shape))
        image[:, :, marked] = np.nan
        return image


class _FloodWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators whose output is NaN everywhere though none of their inputs is.

    Behind such an operator the NaN are taken back to where they were before it, so that the next is found as well.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_image(value)]
        before = [torch.isnan(value) for value in given]
        out = func(*args, **(kwargs or {}))
        marks = any(bool(mark.any()) for mark in before) and not any(bool(mark.all()) for mark in before)
        name = func._overloadpacket.__name__
        if func.is_view or _sees_windows(name) or not _is_image(out) or not marks or not bool(torch.isnan(out).all()):
            return out
        self.found[name] += 1
        same = next((mark for mark in before if mark.shape == out.shape), None)
        fresh = torch.randn_like(out)
        return fresh if same is None else fresh.masked_fill(same, float("nan"))


def _sees_windows(name: str) -> bool:
    """Whether an operator sees windows of what it gets, or cuts a piece out of it, and so never everything."""
    parts = ("conv", "pool", "upsample", "index", "gather", "slice", "unfold", "pad")
    return "adaptive" not in name and any(part in name for part in parts)


class _SizeWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the spatial size of whatever convolutions and poolings return, of those that are more than one pixel."""

    def __init__(self, ndim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ndim = ndim
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        name = func._overloadpacket.__name__
        if _is_image(first) and first.ndim == self._ndim + 2 and ("conv" in name or "pool" in name):
            size = tuple(first.shape[2:])
            if "adaptive" not in name and max(size) > 1:
                self.found.append(size)
        return out


def _is_image(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1


def _cause(error: Exception) -> str:
    """TorchScript puts the cause at the end of a long trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else "unknown")


def _conforms(segmenter: TorchSegmenter, probe: TorchNetwork) -> tuple[Segmenter, Network]:
    return segmenter, probe
