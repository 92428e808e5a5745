"""Load images with NVIDIA DALI: C++ threads on the CPU, or decoding and resizing on the GPU."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali
import torch
from nvidia.dali.pipeline import do_not_convert
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lesam_dist.data.dali_augment import OPERATION_INPUTS, augment_graph, operation_inputs
from lesam_dist.data.dali_whole import DECODER, Doubtful, find_failures
from lesam_dist.data.erasing import erase
from lesam_dist.data.errors import Failure
from lesam_dist.data.plan import Batch, Plan
from lesam_dist.data.transform import ATTEMPTS, Transform

dali: Any = nvidia.dali  # its type stubs leave out much of what it exports
fn, math, types = dali.fn, dali.math, dali.types

PREFETCH = 2  # batches that DALI works on ahead of the one being used


class DaliLoader:
    """See ``Loader``. DALI draws no random number: crops and flips come with each batch from the plan.

    So the pipeline has no state worth saving, and one pipeline reads any epoch after any other. It is built
    at the first batch, and anew after a file that could not be decoded, since DALI gives up what failed once: the
    batches in flight are then given to the new one again.
    """

    def __init__(self, plan: Plan, device: torch.device, workers: int) -> None:
        self._plan = plan
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._threads = max(workers, 1)
        self._pipeline: Any = None
        self._batches: Iterator[Batch] = iter(())
        self._in_flight: deque[Batch] = deque()  # given to the pipeline, and not come out yet
        self._again: deque[Batch] = deque()  # to be given before the rest of `_batches`
        self._doubtful = Doubtful(self._threads)

    def __len__(self) -> int:
        return len(self._plan)

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._rewind()
        self._batches = self._plan.epoch(index, start)
        while result := self._next():
            batch, outputs = result
            # No copy: DALI allocates new outputs for each batch, and they live as long as these tensors.
            with torch.cuda.device(self._device) if self._on_gpu else contextlib.nullcontext():
                images, labels = (from_dlpack(output.as_tensor()) for output in outputs[:2])
            if batch.draws is not None:
                erase(images, batch.draws.hole)
            yield images, labels

    def state_dict(self) -> dict[str, Any]:
        return self._plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plan.load_state_dict(state)

    def close(self) -> None:
        self._pipeline = None

    def _next(self) -> tuple[Batch, Any] | None:
        """The next batch and its outputs, without a file that cannot be decoded; None after the last one."""
        tried = False
        while True:
            try:
                outputs = self._run()
            except StopIteration:
                return None
            except RuntimeError:
                failures = self._find_failures()
                if not failures:
                    if tried:
                        raise  # not about a file, e.g. out of memory
                    tried = True  # a file that could not be read for a moment
            else:
                edges = outputs[2:]
                failures = self._doubtful.failures(self._in_flight[0].paths, edges[0].as_array()) if edges else []
                if not failures:
                    return self._in_flight.popleft(), outputs
            if failures:
                self._plan.meet(failures, len(self._in_flight[0]))
            self._pipeline = None
            self._again = deque([*self._in_flight, *self._again])
            self._in_flight.clear()

    def _run(self) -> Any:
        """The next batch's outputs, on the current stream."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                self._plan.transform,
                source=self._next_inputs,
                train=self._plan.train,
                batch_size=self._plan.local_batch_size,
                num_threads=self._threads,
                device_id=torch.zeros(0, device=self._device).get_device() if self._on_gpu else None,
                edges=self._plan.bad is not None,
            )
        # Given the stream, DALI makes it wait for the outputs, and not the host.
        return self._pipeline.run(torch.cuda.current_stream(self._device) if self._on_gpu else None)

    def _find_failures(self) -> list[Failure]:
        """Those of the first batch in flight that has any: DALI tells only a position in some batch."""
        for batch in self._in_flight:
            if failures := find_failures(batch.paths):
                return failures
        return []

    def _rewind(self) -> None:
        """Throw away what is in flight of an epoch that was left halfway."""
        self._batches = iter(())
        self._again.clear()
        if self._pipeline is not None:
            try:
                while True:
                    self._run()
            except StopIteration:
                self._pipeline.reset()
            except RuntimeError:  # a file of that epoch, which nobody waits for
                self._pipeline = None
        self._in_flight.clear()

    def _next_inputs(self) -> tuple[Any, ...]:
        """The next batch as inputs of the graph; called by ``run``, ``PREFETCH`` batches ahead."""
        batch = self._plan.mend(self._again.popleft()) if self._again else next(self._batches)
        self._in_flight.append(batch)
        paths = [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in batch.paths]
        if batch.draws is None:
            return paths, batch.labels
        policy, draws = self._plan.transform.policy, batch.draws
        inputs = (paths, batch.labels, *draws[:4], draws.side.astype(np.float32))
        return inputs if policy is None else (*inputs, *operation_inputs(policy, draws))


def build_pipeline(
    transform: Transform,
    *,
    source: Any,
    train: bool,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
    edges: bool = False,
) -> Any:
    """The DALI pipeline from ``source`` (file names, labels and, for training, draws) to images and labels.

    Args:
        source: called without arguments; returns the inputs of one batch, or raises StopIteration.
        batch_size: the largest that ``source`` returns.
        device_id: CUDA device, or None to work on the CPU.
        edges: give out a third thing, on the CPU: the first and the last two bytes of each file.
    """
    inputs = [(types.UINT8, 1), (types.INT64, 0)]  # type and dimensions of a sample: path, label
    if train:
        inputs += [(types.FLOAT64, 1)] * 3 + [(types.INT32, 0), (types.FLOAT, 0)]  # area, ratio, position, flip, side
    policy = transform.policy if train else None
    if policy is not None:
        inputs += OPERATION_INPUTS
    decoder = {"device": "cpu" if device_id is None else "mixed", **DECODER}
    dtype, ndim = (list(column) for column in zip(*inputs, strict=True))
    options = {"batch_size": batch_size, "num_threads": num_threads, "device_id": device_id}

    @dali.pipeline_def(enable_conditionals=policy is not None)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        path, label, *draws = fn.external_source(source, num_outputs=len(inputs), dtype=dtype, ndim=ndim)
        # Not mapped into memory: an error of the file system would then be a signal that ends the process.
        encoded = fn.io.file.read(path, dont_use_mmap=True)
        shape = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
        if train:
            area, ratio, position, flip, side, *operations = draws
            start, extent = crop_graph(shape, area, ratio, position, transform.random_aspect_ratio)
            image = fn.decoders.image_slice(encoded, start=start, shape=extent, axes=(0, 1), **decoder)
            image = fn.resize(image, size=fn.stack(side, side))
            if policy is not None:
                image, flip = augment_graph(fn.flip(image, horizontal=flip), policy, *operations), 0
        else:
            flip, size = 0, transform.val_side
            start, end = centre_graph(shape, transform.val_resize, size)
            # All of it, but after `shape`. Side by side a file that is no image ended the process (DALI 2.4): perhaps
            # as both operators failed at one time, which is a guess.
            extent = fn.cast(shape, dtype=types.INT32)
            image = fn.decoders.image_slice(encoded, start=(0, 0), shape=extent, axes=(0, 1), **decoder)
            image = fn.resize(image, size=(size, size), roi_start=start, roi_end=end)
        image = fn.crop_mirror_normalize(
            image,
            mirror=flip,
            mean=[255 * mean for mean in transform.mean],
            std=[255 * std for std in transform.std],
            output_layout="CHW",
        )
        outputs = [image, label if device_id is None else label.gpu()]
        if edges:
            two = {"shape": 2, "axes": 0, "out_of_bounds_policy": "pad"}  # of any file: see above
            last = fn.slice(encoded, start=fn.cast(encoded.shape()[0], dtype=types.INT32) - 2, **two)
            outputs.append(fn.cat(fn.slice(encoded, start=0, **two), last))
        return tuple(outputs)

    return graph(**options, prefetch_queue_depth=PREFETCH)


@do_not_convert
def crop_graph(shape: Any, area: Any, ratio: Any, position: Any, ratio_bounds: tuple[float, float]) -> tuple[Any, Any]:
    """``transform.crop_window`` as a DALI graph; returns ``(top, left)`` and ``(height, width)``, int32."""
    shape = fn.cast(shape, dtype=types.FLOAT64)
    height, width = shape[0], shape[1]
    a = width / height
    # Python numbers would enter the graph as float32; these two are not exact in it.
    low, high = (types.Constant(bound, dtype=types.FLOAT64) for bound in ratio_bounds)
    widest = math.clamp(a, low, high)
    area = fn.cat(area, fn.stack(math.min(a / widest, widest / a)))  # behind the candidates: the way out
    ratio = fn.cat(ratio, fn.stack(widest))
    index = types.Constant(np.arange(ATTEMPTS + 1, dtype=np.int32))
    misfit = (area * ratio > a) | (area * a > ratio)
    # Rounding may make even the way out a misfit: it stays the smallest index if nothing fits.
    first = fn.reductions.min(math.min(index + fn.cast(misfit, dtype=types.INT32) * ATTEMPTS, ATTEMPTS))
    s, r = area[first], ratio[first]
    pixels = s * (height * width)
    w = math.clamp(math.floor(math.sqrt(pixels * r) + 0.5), 1, width)
    h = math.clamp(math.floor(math.sqrt(pixels / r) + 0.5), 1, height)
    extent = fn.stack(h, w)
    start = math.floor(position * (shape - extent + 1))
    return fn.cast(start, dtype=types.INT32), fn.cast(extent, dtype=types.INT32)


def centre_graph(shape: Any, resize: int, crop: int) -> tuple[Any, Any]:
    """The part of the *original* image that torchvision's Resize + CenterCrop shows: start and end, float.

    Resizing just this part gives the same pixels as resizing all and cropping, since the filter still reads
    beyond its edge, and never makes the huge intermediate image that a thin one would need.
    """
    resized = resize * shape // fn.reductions.min(shape)
    margin = resized - crop
    # Python's round() of margin / 2, which is half to even: up if margin = 3 modulo 4.
    offset = (margin + (margin & (margin // 2) & 1)) // 2
    scale = fn.cast(shape, dtype=types.FLOAT) / fn.cast(resized, dtype=types.FLOAT)
    return offset * scale, (offset + crop) * scale
