"""The images of a run: where they are, how they are batched, cropped and augmented, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lesam_dist.config.schema.label_noise import LabelNoiseConfig

DataBackend = Literal["auto", "dali", "torchvision"]
Builtin = Literal["digits", "digits_noisy", "mnist5k", "mnist5k_noisy", "digit_domains", "cifar10", "cifar100"]


@dataclass
class DataConfig:
    """The images, as ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, packed by `lesam-dist pack`, or CIFAR."""

    root: str | None = None
    """folder that holds train/ and val/, or packed shards, or the address of these (s3://BUCKET/FOLDER); for cifar10
    and cifar100 the folder that torchvision keeps them in"""
    builtin: Builtin | None = None
    """write this data set to root first if it is not there: scikit-learn's scanned digits; 300 of them with 20 % wrong
    labels and the same validation images; 5,000 images of MNIST (pip install 'lesam-dist[mnist]'), or 1,000 to train on
    with 20 % wrong labels; both, and printed digits, as three domains (task: domains); or CIFAR, which is
    downloaded, and kept on the device"""
    backend: DataBackend = "auto"
    """who reads, decodes and augments class folders; CIFAR needs neither. auto takes DALI where it is installed"""
    batch_size: int = 256
    """images per optimizer step, over all processes"""
    micro_batches: int = 1
    """parts that each process takes its share of a batch in, to save memory; their gradients are added up"""
    accumulation_mode: Literal["batch", "micro"] = "batch"
    """batch: one perturbation, from the gradient of all micro-batches; micro: one for each micro-batch (m-sharpness),
    which reduces gradients over the processes in every pass of each"""
    eval_batch_size: int = 256
    """images per forward in evaluation, per process"""
    image_size: int = 224
    """side of the square that the network sees, in pixels; CIFAR's 32 x 32 images are resized to it in the end"""
    val_resize: int = 256
    """short side that evaluation resizes to before the centre crop, in pixels (class folders)"""
    val_crop: int | None = None
    """side of that crop, in pixels; null takes image_size (class folders)"""
    val_keep_aspect: bool = True
    """false: evaluation resizes all of an image to that square, whatever its aspect, and crops nothing (class
    folders)"""
    random_area: tuple[float, float] = (0.08, 1.0)
    """range of the random crop's share of the image area (class folders)"""
    random_aspect_ratio: tuple[float, float] = (0.75, 4 / 3)
    """range of the random crop's width over height (class folders)"""
    crop_padding: int = 4
    """black pixels on each side of the image that the random crop may show (CIFAR)"""
    cutout: int = 0
    """side in pixels of a square at a random place that is set to the mean colour; 0 for none (CIFAR)"""
    cutout_probability: float = 1.0
    """share of the training images that get one (CIFAR)"""
    horizontal_flip: bool = True
    """flip half of the training images"""
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """change colours and shape of each training image, after crop and flip, by randaugment_ops operations of one
    magnitude (RandAugment), or by one of a random magnitude (TrivialAugment) (class folders)"""
    randaugment_ops: int = 2
    """operations on each image (randaugment)"""
    randaugment_magnitude: int = 9
    """how strong each is, 0 to 30 (randaugment)"""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """change brightness, contrast and saturation of each training image by up to this share, and turn its hue by up to
    this share of the circle (0.5 at most), in a random order; after auto_augment (class folders)"""
    grayscale: float = 0.0
    """share of the training images that become grey, 0 to 1; after color_jitter (class folders)"""
    random_erasing: float = 0.0
    """share of the training images of which a rectangle is set to the mean colour, 0 to 1 (class folders)"""
    mixup: float = 0.0
    """mix each training image, and its target, with another one: alpha of the Beta distribution of its share; 0 for
    never. Of mixup and cutmix, where both are on, each step takes one"""
    cutmix: float = 0.0
    """paste a rectangle of another training image, and mix the targets likewise: alpha of the Beta distribution of the
    share that stays; 0 for never"""
    mix_probability: float = 1.0
    """share of the steps in which mixup or cutmix is applied, above 0 and up to 1"""
    repeats: int = 1
    """times that each image of a batch is in it, each time augmented in another way. An epoch has as many steps as with
    1, so it reads one in so many of the images"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """per channel, on the scale 0 to 1"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """per channel, on the scale 0 to 1"""
    order: Literal["random", "sequential"] = "random"
    """random: each epoch in an order of its own; sequential: packed shards from front to back, which suits an object
    store or a slow disk, but shuffles less: shards come in an order of their own each epoch, and then shuffle_window
    images at a time are shuffled, so that images of one shard stay near each other"""
    shuffle_window: int = 16384
    """images that are shuffled together (sequential)"""
    workers: int = 4
    """decoding threads (DALI) or processes (torchvision) per process"""
    dali_decoder: Literal["gpu", "cpu"] = "gpu"
    """where DALI decodes JPEGs on a machine with a GPU: there, which takes some of its time, or in the workers"""
    dali_hardware_load: float = 0.65
    """share of the images that the GPU's hardware decoder takes, 0 to 1 (A100 and later, DALI)"""
    dali_preallocate: tuple[int, int] | None = None
    """width and height in pixels of the largest image, for which the hardware decoder makes room at the start; null
    lets it grow, which stops the GPU each time (DALI)"""
    dali_device_padding: int = 16
    """MiB of GPU memory that each decoding thread has from the start (DALI)"""
    dali_host_padding: int = 8
    """MiB of pinned memory that each decoding thread has from the start (DALI)"""
    dali_prefetch: int = 2
    """batches that DALI works on ahead"""
    dali_affinity: bool = False
    """bind each of DALI's threads to a core, which the environment variable DALI_AFFINITY_MASK may choose"""
    replay: bool = False
    """train on the first batch in every step, to measure how fast a run is that need not read images"""
    skip_list: str | None = None
    """file that `lesam-dist scan` wrote: the images in it are left out of both splits (class folders)"""
    max_bad_files: int = 10
    """training images that cannot be decoded and are replaced by others, over all processes and the whole run, before
    it stops; each is named and counted (class folders)"""
    label_noise: LabelNoiseConfig = field(default_factory=LabelNoiseConfig)
    """which training labels are wrong, if any"""


FOLDERS_ONLY = (
    "val_crop",
    "val_keep_aspect",
    "random_area",
    "random_aspect_ratio",
    "auto_augment",
    "randaugment_ops",
    "randaugment_magnitude",
    "color_jitter",
    "grayscale",
    "random_erasing",
)
CIFAR_ONLY = ("crop_padding", "cutout", "cutout_probability")
"""Fields of `DataConfig` that say how class folders alone, or CIFAR alone, are cropped and augmented."""
DALI_ONLY = (
    "dali_decoder",
    "dali_hardware_load",
    "dali_preallocate",
    "dali_device_padding",
    "dali_host_padding",
    "dali_prefetch",
    "dali_affinity",
)
"""Fields that say how DALI works."""
