"""Every argument of every method, from the registry: how it may be written, what it may be, and whose it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml

from lesam_dist.config.command_line import dump, parse, read_command_line
from lesam_dist.config.methods import PLAIN, argument_paths, defaults
from lesam_dist.config.same_run import check_same_run
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.optim.engine.arguments import Argument, Range
from lesam_dist.optim.engine.registry import methods

METHODS = {name: method for name, method in methods().items() if method.module.startswith("lesam_dist.")}
ARGUMENTS = [(name, argument) for name, method in METHODS.items() for argument in method.arguments.values()]
EACH = pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=lambda v: v if isinstance(v, str) else v.name)


def limits(argument: Argument) -> tuple[type, Range | None]:
    """The type of an argument's values, and their range."""
    options = get_args(argument.type) if type(None) in get_args(argument.type) else (argument.type,)
    kind = next(option for option in options if option is not type(None))
    numbers = next((part for part in get_args(kind) if isinstance(part, Range)), None)
    return (get_args(kind)[0] if numbers else get_origin(kind) or kind), numbers


def inside(argument: Argument, rng: random.Random) -> Any:
    kind, numbers = limits(argument)
    if argument.choices:
        return rng.choice(argument.choices)
    if kind is bool:
        return rng.random() < 0.5
    low, high = (numbers.low, min(numbers.high, numbers.low + 9)) if numbers else (0, 9)
    return rng.randint(int(low), int(high)) if kind is int else rng.uniform(low, high)


def outside(argument: Argument, rng: random.Random) -> Iterator[Any]:
    """Of another type, not finite, beyond each end, and an end that is open."""
    kind, numbers = limits(argument)
    yield rng.choice(["much", [0.1], "2001-01-01"])
    yield 0.5 + rng.randint(0, 9) if kind in (int, bool) else float("inf")
    if numbers is None:
        return
    yield numbers.low - rng.uniform(1e-9, 9)
    yield from [numbers.low] if numbers.open_low else []
    if numbers.high < float("inf"):
        yield numbers.high + rng.uniform(1e-9, 9)
        yield from [numbers.high] if numbers.open_high else []


def with_argument(name: str, argument: str, value: Any) -> list[list[str]]:
    """Both spellings of a flag, a file of either shape, and a mapping; ``value`` is written as YAML."""
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    flag = ["--optimizer.name", name]
    return [
        [*flag, f"--optimizer.args.{argument}={text}"],
        [*flag, f"--optimizer.{argument}={text}"],
        [*flag, f"--optimizer.args={{{argument}: {text}}}"],
        ["--config", f"optimizer: {{name: {name}, {argument}: {text}}}\n"],
        ["--config", f"optimizer:\n  name: {name}\n  args: {{{argument}: {text}}}\n"],
    ]


def also_needed(name: str, argument: str, value: Any) -> list[str]:
    """What LE-SAM wants beside some of its arguments."""
    needs = {"plus_form": ["--optimizer.alpha=0.5"], "eta": ["--optimizer.adaptive=true"]}
    return needs.get(argument, []) if name == "lesam" and value not in ("paper", 0) else []


@EACH
def test_a_value_in_range_arrives(name: str, argument: Argument, seed: int) -> None:
    value = inside(argument, random.Random(seed))
    for flags in with_argument(name, argument.name, value):
        read = parse([*flags, *also_needed(name, argument.name, value)]).optimizer.args
        assert read[argument.name] == value
        assert type(read[argument.name]) is type(argument.typed(value))
        assert read.keys() == METHODS[name].arguments.keys()


@EACH
def test_a_value_out_of_range_is_refused(name: str, argument: Argument, seed: int) -> None:
    rng = random.Random(seed)
    for value in outside(argument, rng):
        flags = rng.choice(with_argument(name, argument.name, value))
        with pytest.raises(UserError, match=rf"^optimizer\.args\.{argument.name} is .*: it must be ") as error:
            parse(flags)
        if isinstance(value, float):
            assert f" is {value}: " in str(error.value) or f" is {value:g}: " in str(error.value)


@EACH
def test_null_is_the_default_or_a_value(name: str, argument: Argument) -> None:
    expected = None if argument.accepts(None) else argument.default
    for flags in with_argument(name, argument.name, None)[::3]:
        assert parse(flags).optimizer.args[argument.name] == expected


@pytest.mark.parametrize("name", [*METHODS, *PLAIN])
def test_an_argument_of_another_method_is_refused(name: str, seed: int) -> None:
    rng = random.Random(seed)
    own = METHODS[name].arguments if name in METHODS else {}
    others = {argument.name: argument.default for _, argument in ARGUMENTS if argument.name not in own}
    assert others
    for other, default in others.items():
        flags = rng.choice(with_argument(name, other, 0.25 if default is None else default))
        with pytest.raises(UserError, match=rf"optimizer\.args\.{other} is .* but {name} has no {other}, so it"):
            parse(flags)


def test_numbers_that_yaml_takes_for_texts(tmp_path: Path) -> None:
    for text in ("1e-12", "'1e-12'", "1.0e-12", "0.000000000001"):
        assert parse(["--optimizer.args.eps", text]).optimizer.args["eps"] == 1e-12
        (tmp_path / "mine.yaml").write_text(f"optimizer: {{eps: {text}}}\n")
        assert parse(["--config", str(tmp_path / "mine.yaml")]).optimizer.args["eps"] == 1e-12
    found = parse(["--optimizer.name", "esam", "--optimizer.rho", "1", "--optimizer.seed", "3.0"]).optimizer.args
    assert [(type(found[key]), found[key]) for key in ("rho", "seed")] == [(float, 1.0), (int, 3)]


ARGS = "--optimizer.args"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"{ARGS}.sigm", "1"], "unknown key 'optimizer.args.sigm': did you mean 'optimizer.args.sigma'?"),
        (["--optimizer.sigm", "1"], "unknown key 'optimizer.sigm': did you mean 'optimizer.sigma'?"),
        ([ARGS, "{sigm: 1}"], "unknown key 'optimizer.args.sigm': did you mean 'optimizer.args.sigma'?"),
        (["--config", "optimizer: {args: {sigm: 1}}\n"], "did you mean 'optimizer.args.sigma'?"),
        (["--config", "optimizer: {sigma: {a: 1}}\n"], "unknown key 'optimizer.sigma.a'"),
        (
            [f"{ARGS}.plus_form", "papre"],
            "it must be one of paper, released. Did you mean 'paper'?",
        ),
        ([ARGS, "3"], "optimizer.args is 3: it must be arguments in braces"),
        (["--config", "optimizer: {args: 3}\n"], "optimizer.args is 3: it must be arguments in braces"),
        ([f"{ARGS}.sigma"], "--optimizer.args.sigma has no value: give it a finite number >= 0"),
        (["--optimizer.name", "eigensam", f"{ARGS}.interval", "1000001"], "interval is 1000001: it must be at most"),
        (["--optimizer.sigma", "1", f"{ARGS}.sigma", "2"], "--optimizer.sigma 1 and --optimizer.args.sigma 2 are the"),
        ([ARGS, "{sigma: 1}", "--optimizer.sigma", "2"], "are the same argument with different values: leave one"),
        (
            ["--config", "optimizer: {sigma: 1, args: {sigma: 2}}\n"],
            "optimizer.sigma: 1 and optimizer.args.sigma: 2 are the same argument with different values",
        ),
        (["--optimizer.name", "nowhere:SAM"], "optimizer 'nowhere:SAM' cannot be imported: No module named 'nowhere'"),
        (["--optimizer.name", "torch.optim:SGD"], "optimizer 'torch.optim:SGD' is no registered method"),
        (["--optimizer.name", "adam"], "unknown optimizer 'adam': did you mean 'adamw'?"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(flags)
    assert message in str(error.value)


def test_both_spellings_with_one_value() -> None:
    flags = ["--optimizer.sigma", "0.2", "--optimizer.args.sigma=0.20"]
    assert parse(flags).optimizer.args["sigma"] == 0.2
    assert parse(["--config", "optimizer: {sigma: 0.2, args: {sigma: 0.2}}\n"]).optimizer.args["sigma"] == 0.2


@pytest.mark.parametrize("spelling", ["optimizer: {name: sam, rho: 0.3}", "optimizer: {name: sam, args: {rho: 0.3}}"])
def test_later_sources_win_however_they_are_spelled(spelling: str) -> None:
    recipe, file = ["--config", "cifar100_resnet18_sam"], ["--config", spelling + "\n"]
    assert parse(recipe).optimizer.args["rho"] == 0.1
    assert parse([*recipe, *file]).optimizer.args["rho"] == 0.3
    assert parse([*file, *recipe]).optimizer.args["rho"] == 0.1
    for flag in ("--optimizer.rho", "--optimizer.args.rho"):
        assert parse([*recipe, *file, flag, "0.4"]).optimizer.args["rho"] == 0.4
        assert parse([flag, "0.4", *recipe, *file, flag, "0.5"]).optimizer.args["rho"] == 0.5


def test_a_new_method_forgets_the_old_ones_values_and_says_so() -> None:
    read = read_command_line(["--config", "digits", "--optimizer.name", "fsam"])
    assert read.config.optimizer.args == defaults(METHODS["fsam"]), "F-SAM's sigma is no loss budget"
    assert read.notes == (
        "fsam on sgd instead of lesam on sgd: left out optimizer.args.sigma 0.1, optimizer.args.rho_max 0.2, "
        "schedule.anneal_start_epoch 4",
    )
    read = read_command_line(["--config", "digits", "--optimizer.name", "lesam"])
    assert (read.notes, read.config.optimizer.args["sigma"]) == ((), 0.1)


@pytest.mark.parametrize("name", [*METHODS, *PLAIN])
def test_what_is_printed_reads_back(name: str, seed: int) -> None:
    """All that the method reads, with its values, and nothing else."""
    rng = random.Random(seed)
    arguments = METHODS[name].arguments if name in METHODS else {}
    given = {key: inside(argument, rng) for key, argument in arguments.items() if not also_needed(name, key, 1)}
    given |= {"rho_min": given["rho"] / 2} if name == "gsam" else {}
    config = parse(["--optimizer.name", name, *(f"--optimizer.args.{key}={value}" for key, value in given.items())])
    assert parse(["--config", dump(config)]) == config
    section = yaml.safe_load(dump(config))["optimizer"]
    assert section.get("args", {}) == flatten_args(config.optimizer.args) == {**defaults_of(name), **given}
    assert not {path.removeprefix("optimizer.") for path in argument_paths() if ".args." not in path} & section.keys()


def flatten_args(args: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}


def defaults_of(name: str) -> dict[str, Any]:
    return defaults(METHODS[name]) if name in METHODS else {}


# What version 0.1 saved beside its weights: the arguments of all methods, flat, null for a method's own default.
OLD = {"sigma": 0.3, "rho_max": 0.2, "eps": 1e-12, "alpha": None, "plus_form": "paper", "rho": None, "adaptive": False}
OLD |= dict.fromkeys(("eta", "beta", "gamma", "lam", "interval", "power_steps", "rho_min"))


@pytest.mark.parametrize("name", [*METHODS, *PLAIN])
def test_a_checkpoint_of_the_old_shape_is_of_the_same_run(name: str, seed: int) -> None:
    rng = random.Random(seed)
    config = parse(["--optimizer.name", name])
    saved = {path: value for path, value in flatten(config).items() if ".args." not in path}
    saved |= {f"optimizer.{key}": value for key, value in OLD.items()}
    check_same_run(config, saved)
    for key, argument in METHODS[name].arguments.items() if name in METHODS else ():
        if key not in OLD or (OLD[key] is not None and name != "lesam"):
            continue
        value = inside(argument, rng)
        then = {**saved, f"optimizer.{key}": value}
        config.optimizer.args[key] = value
        check_same_run(config, then)
        config.optimizer.args[key] = other = argument.default
        if value != other:
            with pytest.raises(UserError) as error:
                check_same_run(config, then)
            assert f"optimizer.args.{key}: {value!r} then, {other!r} now" in str(error.value)


def test_names_of_one_method_are_of_the_same_run() -> None:
    saved = flatten(parse(["--optimizer.name", "fsam"]))
    for name in ("friendlysam", "FriendlySAM", "lesam_dist.optim.friendly:FriendlySAM"):
        config = parse(["--optimizer.name", name])
        assert config.optimizer.name == name, "as it was given"
        check_same_run(config, saved)
    with pytest.raises(UserError, match=r"optimizer\.name: 'fsam' then, 'sam' now"):
        check_same_run(parse(["--optimizer.name", "sam"]), saved)


def test_a_method_of_ones_own() -> None:
    name = ["--optimizer.name", "tests.halves:Halved"]
    config = parse([*name, "--optimizer.part", "0.2", "--optimizer.rho", "1"])
    assert config.optimizer.args == {"rho": 1.0, "part": 0.2}
    assert parse(["--config", dump(config)]) == config
    with pytest.raises(UserError, match=r"optimizer\.args\.part is 0: it must be a finite number > 0"):
        parse([*name, "--optimizer.args.part", "0"])
    with pytest.raises(UserError, match=r"unknown key 'optimizer\.prt': did you mean 'optimizer\.part'"):
        parse([*name, "--optimizer.prt", "1"])
