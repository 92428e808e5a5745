"""Load images with NVIDIA DALI: C++ threads on the CPU, or decoding and resizing on the GPU."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lesam_dist.data.dali_augment import operation_inputs
from lesam_dist.data.dali_graph import build_pipeline
from lesam_dist.data.dali_options import DaliOptions
from lesam_dist.data.dali_whole import Doubtful, find_failures
from lesam_dist.data.erasing import erase
from lesam_dist.data.errors import Failure
from lesam_dist.data.plan import Batch, Plan
from lesam_dist.data.reading import read_each


class DaliLoader:
    """See ``Loader``. DALI draws no random number: crops and flips come with each batch from the plan.

    So the pipeline has no state worth saving, and one pipeline reads any epoch after any other. It is built
    at the first batch, and anew after a file that could not be decoded, since DALI gives up what failed once: the
    batches in flight are then given to the new one again.

    DALI reads files itself. What lies in shards is read here, by a thread of its own, a batch ahead of DALI.
    """

    def __init__(self, plan: Plan, device: torch.device, workers: int, options: DaliOptions | None = None) -> None:
        self._plan, self._options = plan, options or DaliOptions()
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._threads = max(workers, 1)
        self._pipeline: Any = None
        self._batches: Iterator[Batch] = iter(())
        self._in_flight: deque[Batch] = deque()  # given to the pipeline, and not come out yet
        self._again: deque[Batch] = deque()  # to be given before the rest of `_batches`
        self._doubtful = Doubtful(self._threads)
        self._reader = ThreadPoolExecutor(1) if plan.folder.shards is not None else None
        self._reading: deque[tuple[Batch, Future[list[NDArray[np.uint8]]]]] = deque()

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
            images = images.permute(0, 3, 1, 2) if self._options.channels_last else images
            if batch.draws is not None:
                erase(images, batch.draws.hole)
            yield images, labels
        if self._on_gpu:  # whose memory the other loader needs now
            self._pipeline = None

    def state_dict(self) -> dict[str, Any]:
        return self._plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plan.load_state_dict(state)

    def close(self) -> None:
        self._pipeline = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

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
                failures = self._doubtful.failures(self._in_flight[0], edges[0].as_array()) if edges else []
                if not failures:
                    return self._in_flight.popleft(), outputs
            if failures:
                self._plan.meet(failures, len(self._in_flight[0]))
            self._pipeline = None
            self._again = deque([*self._in_flight, *(batch for batch, _ in self._reading), *self._again])
            self._in_flight.clear()
            self._reading.clear()

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
                options=self._options,
                edges=self._plan.bad is not None,
                encoded=self._reader is not None,
            )
        # Given the stream, DALI makes it wait for the outputs, and not the host.
        return self._pipeline.run(torch.cuda.current_stream(self._device) if self._on_gpu else None)

    def _find_failures(self) -> list[Failure]:
        """Those of the first batch in flight that has any: DALI tells only a position in some batch."""
        for batch in self._in_flight:
            if failures := find_failures(batch.paths, batch.parts):
                return failures
        return []

    def _rewind(self) -> None:
        """Throw away what is in flight of an epoch that was left halfway."""
        self._batches = iter(())
        self._again.clear()
        self._reading.clear()
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
        """The next batch as inputs of the graph; called by ``run``, some batches ahead."""
        files: list[NDArray[np.uint8]]
        if self._reader is None:
            batch = self._next_batch()
            files = [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in batch.paths]
        else:
            while len(self._reading) < 2:
                try:
                    batch = self._next_batch()
                except StopIteration:
                    break
                self._reading.append((batch, self._reader.submit(_read, batch)))
            if not self._reading:
                raise StopIteration
            batch, read = self._reading.popleft()
            files = read.result()
        self._in_flight.append(batch)
        if batch.draws is None:
            return files, batch.labels
        policy, draws = self._plan.transform.policy, batch.draws
        operations = () if policy is None else operation_inputs(policy, draws)
        colors: tuple[Any, ...] = ()
        if self._plan.transform.changes_color:
            colors = (draws.gray, draws.color, draws.factor) if draws.color.size else (draws.gray,)
        return files, batch.labels, *draws[:4], draws.side.astype(np.float32), *operations, *colors

    def _next_batch(self) -> Batch:
        return self._plan.mend(self._again.popleft()) if self._again else next(self._batches)


def _read(batch: Batch) -> list[NDArray[np.uint8]]:
    """Encoded images; of one that cannot be read a byte, which DALI refuses."""
    each = read_each(batch.paths, batch.parts)
    return [np.frombuffer(b"\0" if isinstance(data, OSError) else data or b"\0", np.uint8) for data in each]
