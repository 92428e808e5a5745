"""Which sample is read when, and by which process. Pure functions: nothing to save, nothing to restore.

NumPy may change between its versions what a seed gives: finish a run with the one that started it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Every use of randomness in this package draws from its own stream: SeedSequence(seed, (STREAM, epoch, ...)).
ORDER_STREAM, CROP_STREAM, CIFAR_STREAM, SYNTHETIC_STREAM, REPLACEMENT_STREAM = range(5)
AUGMENT_STREAM, ERASING_STREAM, MIXING_STREAM, LABEL_NOISE_STREAM, PAIRS_STREAM = range(5, 10)
PAIR_MIXING_STREAM, COLOR_STREAM, DOMAIN_STREAM, ADVERSARIAL_STREAM, DOMAIN_SPLIT_STREAM = range(10, 15)

_PHILOX_WORDS = 4  # random numbers of 64 bits that one value of Philox's counter gives


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """The order in which epoch ``epoch`` reads ``n`` samples, the same on every rank.

    Args:
        n: number of samples.
        seed: not negative.
        epoch: not negative.
        shuffle: a permutation drawn from ``(seed, epoch)``, or else ``0, 1, ..., n - 1``.

    Returns:
        int64 ``(n,)``.
    """
    order = np.arange(n, dtype=np.int64)
    if shuffle:
        generator_of(ORDER_STREAM, seed=seed, index=epoch).shuffle(order)
    return order


def windowed_order(blocks: Sequence[NDArray[np.int64]], *, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """An order of epoch ``epoch`` for data that is best read from front to back, the same on every rank.

    The blocks come in an order drawn from ``(seed, epoch)``; then ``window`` samples at a time are shuffled. This is
    less random than `epoch_order`: samples of one block come within a window or two of each other in every epoch.

    Args:
        blocks: the samples of each shard, as they are stored.
        seed: not negative.
        epoch: not negative.
        window: at least 1.

    Returns:
        int64 ``(N,)``, a permutation of all samples.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(ORDER_STREAM, epoch)))
    order = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    for begin in range(0, len(order), window):
        rng.shuffle(order[begin : begin + window])
    return order


def repeated_order(order: NDArray[np.int64], batch_size: int, repeats: int) -> NDArray[np.int64]:
    """An epoch's order with each sample several times in its batch, for repeated augmentation (Hoffer et al., 2020).

    Global batch ``i`` holds the next ``K = batch_size / repeats`` samples as ``s_0 .. s_(K-1) s_0 .. s_(K-1) ...``, so
    that neighbours differ. It has as many batches as the order without repeats, over the first of its samples.

    Returns:
        int64, a whole number of batches.
    """
    batches, distinct = len(order) // batch_size, batch_size // repeats
    return np.tile(order[: batches * distinct].reshape(batches, 1, distinct), (1, repeats, 1)).ravel()


def position_uniforms(stream: int, width: int, positions: range, *, seed: int, epoch: int) -> NDArray[np.float64]:
    """The random numbers of an epoch's samples, each a function of ``(seed, epoch, its position in the epoch)``.

    Philox (Salmon et al., 2011) makes numbers from a counter, so a rank draws those of its own samples alone. The
    number of processes changes neither what is drawn nor what a rank's part of it costs.

    Args:
        stream: one of the streams above.
        width: numbers per sample, the same in every call for this stream.
        positions: consecutive positions in the epoch's order.

    Returns:
        float64 ``(len(positions), width)``, uniform in [0, 1).
    """
    per_sample = -(-width // _PHILOX_WORDS)
    key = np.random.SeedSequence(seed, spawn_key=(stream, epoch)).generate_state(2, np.uint64)
    philox = np.random.Philox(key=key, counter=positions.start * per_sample)
    return np.random.Generator(philox).random((len(positions), per_sample * _PHILOX_WORDS))[:, :width]


def generator_of(stream: int, *, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one epoch or step, the same on every rank, as a generator of its own."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))


def replacements(n: int, position: int, *, seed: int, epoch: int) -> Iterator[int]:
    """Samples to read at ``position`` of an epoch in place of one that cannot be: the first, or else the second, ...

    A function of ``(seed, epoch, position)`` alone: whichever process meets the sample, and whenever.

    Args:
        n: number of samples.
        position: in the epoch's order, not negative.

    Yields:
        Numbers in ``range(n)``, without end and each as likely as any other.
    """
    key = np.random.SeedSequence(seed, spawn_key=(REPLACEMENT_STREAM, epoch)).generate_state(2, np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=position << 64))  # 2**64 draws for each position
    while True:
        yield int(generator.random() * n)


def rank_batches(
    order: NDArray[np.int64], *, batch_size: int, rank: int, world_size: int, train: bool
) -> list[NDArray[np.int64]]:
    """The batches of one rank in one epoch, as views of ``order``.

    Training: global batch ``i`` is ``order[i * B : (i + 1) * B]`` for the *global* ``B = batch_size``, and
    rank ``r`` takes its ``r``-th contiguous part of ``B / world_size`` samples. So a global batch holds the
    same samples for any number of processes. The last, incomplete global batch is dropped: every rank gets
    the same number of batches of the same size.

    Evaluation: rank ``r`` takes ``order[floor(r * n / W) : floor((r + 1) * n / W)]``, in batches of
    ``batch_size`` *on this rank*, the last one being partial. Every sample is read exactly once; a rank has
    no batches at all where there are fewer samples than ranks.
    """
    n = len(order)
    if train:
        share = batch_size // world_size
        first = rank * share
        return [order[i + first : i + first + share] for i in range(0, n - batch_size + 1, batch_size)]
    mine = order[rank * n // world_size : (rank + 1) * n // world_size]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
