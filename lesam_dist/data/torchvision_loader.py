"""Load images with torchvision in worker processes: no NVIDIA library, any machine."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sized
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as F

from lesam_dist.data.decode import decode_rgb
from lesam_dist.data.erasing import erase
from lesam_dist.data.errors import Failure, reason_of
from lesam_dist.data.plan import Batch, Plan
from lesam_dist.data.reading import read_each
from lesam_dist.data.torchvision_augment import augment
from lesam_dist.data.torchvision_color import adjust
from lesam_dist.data.transform import Draws, Transform, crop_window
from lesam_dist.parallel.signals import heed_main_process, not_for_helpers

Decoded = tuple[Tensor, Tensor, list[Failure]]


class TorchvisionLoader:
    """See ``Loader``. Nothing is random here: crops and flips come with each batch from the plan.

    Workers decode to uint8, which goes to the device as it is (a quarter of the bytes); normalisation to
    float32 happens there. What stands in for a file that cannot be decoded is read in the main process.
    """

    def __init__(self, plan: Plan, device: torch.device, workers: int) -> None:
        self._plan = plan
        self._device = device
        self._mean, self._std = scale_of(plan.transform, device)
        self._epoch = _Epoch(plan)
        self._decoder = _Decoder(plan.transform)
        self._loader: DataLoader[Any] | None = DataLoader(
            self._decoder,
            sampler=self._epoch,  # yields whole batches as "indices", hence batch_size=None
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=_start_method() if workers > 0 else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=heed_main_process,
            generator=torch.Generator(),  # else every epoch draws from the global one, which is the model's
        )

    def __len__(self) -> int:
        return len(self._plan)

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        self._epoch.index, self._epoch.start = index, start
        with not_for_helpers():
            batches = iter(self._loader)
        for images, labels, failures in batches:
            batch = self._epoch.handed_out.popleft()
            if failures:
                self._replace(images, labels, failures, batch)
            images, labels = (part.to(self._device, non_blocking=True) for part in (images, labels))
            images = self._normalise(images)
            if batch.draws is not None:
                erase(images, batch.draws.hole)
            yield images, labels

    def state_dict(self) -> dict[str, Any]:
        return self._plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plan.load_state_dict(state)

    def close(self) -> None:
        self._loader = None  # its workers end with it

    def _normalise(self, images: Tensor) -> Tensor:
        """To float32. A CPU does it image by image, as its cache holds one, in a third of the time of a whole batch."""
        if images.is_cuda:
            return (images - self._mean).div_(self._std)
        normalised = torch.from_numpy(np.empty(images.shape, dtype=np.float32))  # NumPy's memory has huge pages
        for image, out in zip(images, normalised, strict=True):
            out.copy_(image).sub_(self._mean[0]).div_(self._std[0])
        return normalised

    def _replace(self, images: Tensor, labels: Tensor, failures: list[Failure], batch: Batch) -> None:
        """Fill in other samples, in place, until all can be decoded."""
        while failures:
            self._plan.meet(failures, len(batch))
            indices = [failure.index for failure in failures]
            batch = self._plan.mend(batch)
            images[indices], labels[indices], failed = self._decoder[batch.take(indices)]
            failures = [Failure(indices[each.index], each.path, each.reason, each.size) for each in failed]


def _start_method() -> BaseContext:
    """Not fork: a copy of a process that has threads (CUDA, NCCL, DALI) can hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # import torch once, not once per worker
    return context


class _Epoch(Sized):
    """The batches of epoch ``index`` from ``start`` on, iterated in the main process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.index = self.start = 0
        self.handed_out: deque[Batch] = deque()  # to the workers, in the order in which they come back

    def __len__(self) -> int:
        return max(0, len(self.plan) - self.start)

    def __iter__(self) -> Iterator[Batch]:
        self.handed_out.clear()
        for batch in self.plan.epoch(self.index, self.start):
            self.handed_out.append(batch)
            yield batch


class _Decoder(Dataset[Any]):
    """Batch to (uint8 images ``(B, 3, S, S)``, labels, what failed); runs in the workers and holds no list of files.

    Failures are returned, since DataLoader would wrap a raised one in the worker's traceback. Their images are not
    defined.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self._policy = transform.policy

    def __getitem__(self, batch: Batch) -> Decoded:
        size = self.transform.val_side if batch.draws is None else int(batch.draws.side[0])
        images = [torch.empty((3, size, size), dtype=torch.uint8)] * len(batch)
        failures: list[Failure] = []
        for i, data in enumerate(read_each(batch.paths, batch.parts)):
            if isinstance(data, OSError):
                failures.append(Failure(i, batch.paths[i], reason_of(data), None))
                continue
            try:
                image = torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)
            except Exception as error:  # Pillow raises whatever a broken file leads it to
                failures.append(Failure(i, batch.paths[i], reason_of(error), len(data)))
                continue
            images[i] = (
                evaluation_view(image, self.transform) if batch.draws is None else self._train(image, batch.draws, i)
            )
        # In a worker default_collate writes into the memory that the main process will read.
        return default_collate(images), torch.from_numpy(batch.labels), failures

    def _train(self, image: Tensor, draws: Draws, i: int) -> Tensor:
        area, ratio, position, flip, side = (values[i] for values in draws[:5])
        (in_height, in_width), bounds = image.shape[1:], self.transform.random_aspect_ratio
        top, left, height, width = crop_window(in_height, in_width, area, ratio, position, bounds)
        image = _resize(image[:, top : top + height, left : left + width], (int(side), int(side)))
        image = image.flip(-1) if flip else image
        if self._policy is not None:
            image = augment(image.contiguous(), self._policy, draws.operation[i], draws.level[i])
        return adjust(image, draws.color[i], draws.factor[i], int(draws.gray[i]))


def evaluation_view(image: Tensor, transform: Transform) -> Tensor:
    """An image as evaluation sees it, but for its scale: uint8 ``(3, H, W)`` to ``(3, S, S)``."""
    height, width = image.shape[1:]
    side = transform.val_side
    if not transform.val_keep_aspect:
        return _resize(image, (side, side))
    resize, short = transform.val_resize, min(height, width)
    image = _resize(image, (resize * height // short, resize * width // short))
    cropped: Tensor = F.center_crop(image, [side, side])
    return cropped


def scale_of(transform: Transform, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels in 0 to 255, each float32 ``(1, 3, 1, 1)``."""
    mean, std = (
        torch.tensor([255 * value for value in values], dtype=torch.float32, device=device).view(1, 3, 1, 1)
        for values in (transform.mean, transform.std)
    )
    return mean, std


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's ``resize`` with antialiasing, without the time that its checks take."""
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0]
