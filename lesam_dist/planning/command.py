"""`lesam-dist plan`: what a run would take on machines that are not here."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesam_dist.config.command_line import read_command_line
from lesam_dist.config.parser import Parser, examples
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError, one_line
from lesam_dist.planning.batch import check_batch
from lesam_dist.planning.collectives import Link, Network
from lesam_dist.planning.hardware import DEVICES, Device, Shares, device_of, interconnect_of

if TYPE_CHECKING:
    from lesam_dist.planning.machine import Machine
    from lesam_dist.planning.predict import Case, Prediction

_MOST = 1_000_000
# Training and validation images: ImageNet-1K's where the config names no data set of its own.
_IMAGES = {
    "digits": (1438, 359),
    "digits_noisy": (300, 359),
    "mnist5k": (4000, 1000),
    "mnist5k_noisy": (1000, 1000),
    **dict.fromkeys(["cifar10", "cifar100"], (50_000, 10_000)),
}
_IMAGENET = (1_281_167, 50_000)


def plan(argv: Sequence[str]) -> None:
    """Show what the run would take, and write it where that is asked for.

    Raises:
        UserError: for anything wrong in ``argv``.
    """
    arguments, flags = _parser().parse_known_args(list(argv))
    device = None if arguments.calibrate else device_of(arguments.gpu)
    per_node = arguments.gpus_per_node or (device.per_node if device else 8)
    outside = interconnect_of(arguments.interconnect, per_node)
    config = read_command_line(["--config", arguments.config, *flags]).config
    counts = _counts(arguments.gpus)
    _require_possible(config, counts, arguments.batch_per_gpu)
    predict_and_report(arguments, config, device, outside, counts)


def predict_and_report(
    arguments: argparse.Namespace, config: Config, device: Device | None, outside: Link, counts: Sequence[int]
) -> None:
    """All that needs torch, behind what is refused; ``device`` None: this machine."""
    if device is None:
        from lesam_dist.planning.calibrate import calibrate

        if (device := calibrate()) is None:
            return
    rate = arguments.decode_rate
    if arguments.measure or (arguments.calibrate and rate is None):
        from lesam_dist.planning.input import measure_decode_rate

        rate = measure_decode_rate(config)
    _report(arguments, config, _machine(arguments, device, outside, rate), counts)


def _machine(arguments: argparse.Namespace, device: Device, outside: Link, rate: float | None) -> Machine:
    from lesam_dist.planning.machine import Machine

    measured = arguments.calibrate
    shares = Shares(1.0, 1.0, 1.0) if measured else Shares()
    if arguments.efficiency is not None:
        shares = replace(shares, products=arguments.efficiency)
    inside = Link(device.latency, device.link * shares.link)
    network = Network(inside, Link(outside.latency, outside.bandwidth * Shares().link), device.backend)
    per_node = arguments.gpus_per_node or device.per_node
    cores = device.cores if arguments.cores_per_gpu is None else arguments.cores_per_gpu
    return Machine(device, network, per_node, shares, cores, rate, arguments.hourly)


def _report(arguments: argparse.Namespace, config: Config, machine: Machine, counts: Sequence[int]) -> None:
    from lesam_dist.experiments.report import show
    from lesam_dist.planning.alternatives import cases
    from lesam_dist.planning.method import observe_run
    from lesam_dist.planning.predict import Case
    from lesam_dist.planning.profile import profile
    from lesam_dist.planning.report import as_numbers, change_table, plot, step_table, write_json

    per_gpu = arguments.batch_per_gpu
    train, val = _IMAGES.get(config.data.builtin or "", _IMAGENET)
    possible = [n for n in counts if per_gpu or n <= config.data.batch_size]
    network = profile(_with_batch(config, max(possible), per_gpu), max(possible))
    case = Case(config, network, observe_run(config), machine, (arguments.images or train, val))
    found = {n: _predict(case, n, per_gpu) for n in counts}
    first = min(possible)
    alone = _predict(replace(case, config=_of_one(config, first, per_gpu)), 1, None)
    if alone is None:  # cannot be: one process takes any batch
        raise UserError("nothing to predict")
    show(*step_table(found, alone.images_per_second))
    others = {a.name: (a, {n: _try(c, n, per_gpu and per_gpu * a.times) for n in counts}) for a, c in cases(case)}
    show(*change_table(found, {name: own for name, (_, own) in others.items()}, machine.device.memory))
    cautions: dict[str, list[str]] = {}
    for name, (alternative, own) in others.items():
        if any(own.values()):
            cautions.setdefault(alternative.caution, []).append(name)
    for caution, names in cautions.items():
        print(f"{', '.join(names)}: {caution}.")
    print(_statement(config, machine, case, first, found))
    if arguments.json:
        document = {
            "predicted": True,
            "config": asdict(config),
            "machine": asdict(machine),
            "flops_per_image": network.flops,
            "passes": case.method.passes,
            "alone": as_numbers(alone),
            "gpus": {str(n): as_numbers(p) for n, p in found.items()},
            "instead": {name: {str(n): as_numbers(p) for n, p in own.items()} for name, (_, own) in others.items()},
        }
        write_json(arguments.json, document)
    if arguments.plot:
        plot(arguments.plot, found, alone.images_per_second, f"{arguments.config} on {machine.device.name}")


def _statement(
    config: Config,
    machine: Machine,
    case: Case,
    first: int,
    found: dict[int, Prediction | None],
) -> str:
    """What the numbers are, and what they were made from."""
    device, shares = machine.device, machine.shares
    measured = " (measured here)" if shares.memory == 1 else ""
    lines = [
        "This is a prediction; nothing of this run was measured. It is made of the network's operators "
        f"({case.profile.flops / 1e9:.1f} GFLOP an image and pass, {case.method.passes:.3g} passes a step), each as "
        f"long as {100 * shares.products:.0f} % of the peak and {100 * shares.memory:.0f} % of the memory bandwidth of "
        f"{device.name}{measured} allow, and of alpha-beta times of collectives, at {100 * shares.link:.0f} % of the "
        f"links inside a node and {machine.network.outside.bandwidth:.3g} bytes/s between nodes: docs/planning.md."
    ]
    if None in found.values():
        lines.append(f"More GPUs than data.batch_size {config.data.batch_size} has images: no prediction.")
    images = f"that takes {config.data.batch_size // first} images alone" if not _grows(config, found) else "alone"
    lines.append(f"Efficiency: images/s of a GPU, of those of one {images}.")
    if config.schedule.image_size is not None:
        lines.append(f"All epochs at data.image_size {config.data.image_size}: schedule.image_size is left out.")
    worst = max((p for p in found.values() if p is not None), key=lambda p: p.total_memory)
    if worst.total_memory > device.memory:
        lines.append(
            f"warning: {worst.processes} GPUs need {worst.total_memory / 2**30:.1f} GiB each, and have "
            f"{device.memory / 2**30:.1f}: data.micro_batches, parallel.strategy fsdp or a smaller batch."
        )
    needed = max(p.needed for p in found.values() if p is not None)
    cores = min(machine.cores, config.data.workers)
    each = f"Input: a GPU takes up to {needed:,.0f} images/s, {needed / cores:,.0f} for each of {cores:g} cores"
    if machine.decode_rate is None:
        lines.append(f"{each}; what a core can do is not known: --decode_rate N, or --measure on such a machine.")
    else:
        keeps = "keeps up" if machine.decode_rate * cores >= needed else "does not keep up"
        lines.append(f"{each}; it decodes {machine.decode_rate:,.0f}, and {keeps}.")
    return "\n".join(lines)


def _grows(config: Config, found: dict[int, Prediction | None]) -> bool:
    return any(p is not None and p.batch != config.data.batch_size for p in found.values())


def _predict(case: Case, count: int, per_gpu: int | None) -> Prediction | None:
    if per_gpu is None and count > case.config.data.batch_size:
        return None
    return replace(case, config=_with_batch(case.config, count, per_gpu)).predict(count)


def _try(case: Case, count: int, per_gpu: int | None) -> Prediction | None:
    """An alternative's prediction; None where it does not go with so many GPUs."""
    try:
        return _predict(case, count, per_gpu)
    except UserError:
        return None


def _with_batch(config: Config, count: int, per_gpu: int | None) -> Config:
    if per_gpu is None:
        return config
    config = copy.deepcopy(config)
    config.data.batch_size = per_gpu * count
    return config


def _of_one(config: Config, first: int, per_gpu: int | None) -> Config:
    return _with_batch(config, 1, per_gpu or config.data.batch_size // first)


def _require_possible(config: Config, counts: Sequence[int], per_gpu: int | None) -> None:
    possible = [n for n in counts if per_gpu or n <= config.data.batch_size]
    for n in possible:
        check_batch(_with_batch(config, n, per_gpu), n)
    if not possible:
        raise UserError(
            f"--gpus {counts[0]} is more than data.batch_size {config.data.batch_size} has images: raise it, or let it "
            "grow with the GPUs by --batch_per_gpu N."
        )


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(_is_count(word.strip(), _MOST) for word in words):
        raise UserError(f"--gpus is '{one_line(text)}': give numbers of GPUs with commas between, e.g. 8,64,512.")
    return sorted({int(word) for word in words})


def _is_count(text: str, most: int) -> bool:
    """A whole number above 0; one of thousands of digits is too long for `int`."""
    return text.isdecimal() and len(text) < 100 and 0 < int(text) <= most


def _above_zero(flag: str, at_most: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= at_most or not math.isfinite(value):
            limit = f" and at most {at_most:g}" if math.isfinite(at_most) else ""
            raise UserError(f"{flag} is '{one_line(text)}': it must be a number above 0{limit}.")
        return value

    return read


def _count(flag: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not _is_count(text, 10**10):
            raise UserError(f"{flag} is '{one_line(text)}': it must be a whole number above 0.")
        return int(text)

    return read


def _parser() -> Parser:
    parser = Parser(
        "plan",
        "Predict what a run takes on any number of GPUs: time of a step and its parts, memory, epoch, run and price, "
        "and what other settings would change. Needs no GPU and no images. Every other flag is one of "
        "`lesam-dist train`. The model is in docs/planning.md.",
        examples("plan --config imagenet_resnet50_lesam --gpus 8,64,512 --gpu h100 --hourly 2.5"),
        usage="lesam-dist plan --config NAME_OR_FILE --gpus N1,N2,... [--gpu NAME] [--interconnect BANDWIDTH] "
        "[--SECTION.FIELD VALUE ...]",
    )
    flags: Iterable[tuple[str, dict[str, Any]]] = (
        ("--config", {"required": True, "help": "a recipe's name or a YAML file"}),
        ("--gpus", {"required": True, "help": "numbers of GPUs with commas between"}),
        ("--gpu", {"default": "h100", "help": f"{', '.join(DEVICES)} (default: h100)"}),
        (
            "--interconnect",
            {
                "default": "400gbit",
                "help": "bandwidth of each GPU to other nodes, e.g. 400gbit or 50GB/s, or of a whole node, e.g. "
                "100gbit/node (default: 400gbit)",
            },
        ),
        ("--gpus_per_node", {"type": _count("--gpus_per_node"), "help": "default: as the GPU's usual node has"}),
        (
            "--batch_per_gpu",
            {"type": _count("--batch_per_gpu"), "help": "let data.batch_size be so many images times the GPUs"},
        ),
        (
            "--images",
            {"type": _count("--images"), "help": "of training, an epoch (default: the recipe's data set, or ImageNet)"},
        ),
        ("--hourly", {"type": _above_zero("--hourly"), "help": "price of a GPU's hour, in any currency"}),
        (
            "--efficiency",
            {
                "type": _above_zero("--efficiency", 1.0),
                "help": "share of the peak that matrix products and convolutions reach (default: 0.5, an assumption)",
            },
        ),
        (
            "--cores_per_gpu",
            {"type": _above_zero("--cores_per_gpu"), "help": "CPU cores; data.workers of them are used"},
        ),
        ("--decode_rate", {"type": _above_zero("--decode_rate"), "help": "images per second that a core decodes"}),
        (
            "--measure",
            {
                "action": "store_true",
                "help": "measure --decode_rate on this machine, from data.root's images or generated ones",
            },
        ),
        (
            "--calibrate",
            {
                "action": "store_true",
                "help": "measure this machine in place of --gpu, in less than two minutes; under torchrun with its "
                "processes",
            },
        ),
        ("--json", {"type": Path, "metavar": "FILE", "help": "write every number there, in seconds and bytes"}),
        ("--plot", {"type": Path, "metavar": "FILE.png", "help": "draw the parts of a step and the throughput"}),
    )
    for flag, options in flags:
        parser.add_argument(flag, **options)
    return parser
