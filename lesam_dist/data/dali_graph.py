"""The graph of operators that DALI runs: from a file, or its name, to a normalised image."""

from __future__ import annotations

from typing import Any

import numpy as np
import nvidia.dali
from nvidia.dali.pipeline import do_not_convert

from lesam_dist.data.dali_augment import OPERATION_INPUTS, augment_graph
from lesam_dist.data.dali_color import color_graph, color_inputs
from lesam_dist.data.dali_options import DaliOptions
from lesam_dist.data.dali_whole import DECODER
from lesam_dist.data.transform import ATTEMPTS, Transform

dali: Any = nvidia.dali  # its type stubs leave out much of what it exports
fn, math, types = dali.fn, dali.math, dali.types


def build_pipeline(
    transform: Transform,
    *,
    source: Any,
    train: bool,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
    options: DaliOptions | None = None,
    edges: bool = False,
    encoded: bool = False,
) -> Any:
    """The DALI pipeline from ``source`` (file names, labels and, for training, draws) to images and labels.

    Args:
        source: called without arguments; returns the inputs of one batch, or raises StopIteration.
        batch_size: the largest that ``source`` returns.
        device_id: CUDA device, or None to work on the CPU.
        options: of the pipeline; None: the defaults.
        edges: give out a third thing, on the CPU: the first and the last two bytes of each file.
        encoded: ``source`` gives the content of files, and not their names.
    """
    inputs = [(types.UINT8, 1), (types.INT64, 0)]  # type and dimensions of a sample: file, label
    if train:
        inputs += [(types.FLOAT64, 1)] * 3 + [(types.INT32, 0), (types.FLOAT, 0)]  # area, ratio, position, flip, side
    policy = transform.policy if train else None
    if policy is not None:
        inputs += OPERATION_INPUTS
    colors, jitters = train and transform.changes_color, sum(amount > 0 for amount in transform.color_jitter)
    first_of_colors = len(inputs) - 2
    if colors:
        inputs += color_inputs(jitters)
    options = options or DaliOptions()
    decoder = {**DECODER, **({"device": "cpu"} if device_id is None else options.decoder_arguments())}
    dtype, ndim = (list(column) for column in zip(*inputs, strict=True))

    def on_gpu(image: Any) -> Any:
        return image if device_id is None else image.gpu()  # where a decoder of its own has put it already, or not

    @dali.pipeline_def(enable_conditionals=policy is not None or colors)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        file, label, *draws = fn.external_source(source, num_outputs=len(inputs), dtype=dtype, ndim=ndim)
        if not encoded:
            # Not mapped into memory: an error of the file system would then be a signal that ends the process.
            file = fn.io.file.read(file, dont_use_mmap=True)
        shape = fn.peek_image_shape(file, adjust_orientation=False)[:2]
        if train:
            area, ratio, position, flip, side, *operations = draws[:first_of_colors]
            start, extent = crop_graph(shape, area, ratio, position, transform.random_aspect_ratio)
            image = on_gpu(fn.decoders.image_slice(file, start=start, shape=extent, axes=(0, 1), **decoder))
            image = fn.resize(image, size=fn.stack(side, side))
            if policy is not None:
                image, flip = augment_graph(fn.flip(image, horizontal=flip), policy, *operations), 0
            if colors:
                image = color_graph(image, jitters, *draws[first_of_colors:])
        else:
            flip, size = 0, transform.val_side
            region = {}  # all of it
            if transform.val_keep_aspect:
                region["roi_start"], region["roi_end"] = centre_graph(shape, transform.val_resize, size)
            # All of it, but after `shape`. Side by side a file that is no image ended the process (DALI 2.4): perhaps
            # as both operators failed at one time, which is a guess.
            extent = fn.cast(shape, dtype=types.INT32)
            image = on_gpu(fn.decoders.image_slice(file, start=(0, 0), shape=extent, axes=(0, 1), **decoder))
            image = fn.resize(image, size=(size, size), **region)
        image = fn.crop_mirror_normalize(
            image,
            mirror=flip,
            mean=[255 * mean for mean in transform.mean],
            std=[255 * std for std in transform.std],
            output_layout="HWC" if options.channels_last else "CHW",
        )
        outputs = [image, label if device_id is None else label.gpu()]
        if edges:
            two = {"shape": 2, "axes": 0, "out_of_bounds_policy": "pad"}  # of any file: see above
            last = fn.slice(file, start=fn.cast(file.shape()[0], dtype=types.INT32) - 2, **two)
            outputs.append(fn.cat(fn.slice(file, start=0, **two), last))
        return tuple(outputs)

    return graph(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=options.prefetch,
        set_affinity=options.affinity,
    )


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
