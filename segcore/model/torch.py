"""TorchScript through torch, its only home."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

from segcore.errors import ModelError, one_line
from segcore.model.segmenter import Floats, Segmenter


class TorchSegmenter:
    """A TorchScript file, run in float32 without gradients. Raises ModelError where it does not load.

    The caller has checked the digest: an archive is only opened when its card vouches for it.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._threads = threads
        try:
            self._module = torch.jit.load(str(path), map_location=self._device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"{path} does not load as TorchScript: {one_line(error)}") from error
        self.device = threading.Lock()
        on = "CUDA" if self._device.type == "cuda" else f"CPU, {threads} threads"
        self.engine = f"torch {torch.__version__} ({on})"
        self.batch = 1 if self._device.type == "cpu" else 16

    def __call__(self, batch: Floats) -> Floats:
        try:
            with torch.inference_mode():
                # OpenMP keeps the number of threads per calling thread, so it is said in each of them.
                torch.set_num_threads(self._threads)
                out = self._module(torch.from_numpy(batch).to(self._device))
        except RuntimeError as error:
            raise ModelError(f"torch failed on a batch of shape {batch.shape}: {_cause(error)}") from error
        if not isinstance(out, torch.Tensor):
            raise ModelError(f"the network returns {type(out).__name__}, and segflow wants one tensor")
        return np.ascontiguousarray(out.float().cpu().numpy())


def _cause(error: RuntimeError) -> str:
    """TorchScript puts the cause at the end of a long trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else "unknown")


def _conforms(segmenter: TorchSegmenter) -> Segmenter:
    return segmenter
