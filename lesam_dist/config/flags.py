"""The words of a command line as flags: ``--a.b text`` or ``--a.b=text``."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from lesam_dist.config.explain import expected, nearest_key, stray_word
from lesam_dist.config.methods import canonical, paths_read
from lesam_dist.config.strict_yaml import read_value
from lesam_dist.errors import UserError

_WITHOUT_VALUE = ("help", "print_config")
Flag = tuple[str, str | None]
"""A dotted path, and what stands behind it: None where nothing does."""


def read_flags(words: Sequence[str]) -> list[Flag]:
    """The flags in the order of the command line. ``-h`` is ``help``, and ``dry_run`` may stand alone.

    Raises:
        UserError: for a word that is no flag and behind none; a text with YAML aliases, which could expand without end.
    """
    flags: list[Flag] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            raise UserError(stray_word(word))
        path, given, text = word[2:].partition("=")
        value: str | None = text if given else None
        if not given and not _stands_alone(path) and rest and _is_value(rest[0]):
            value = rest.pop(0)
        if value is None and path == "dry_run":
            value = "true"
        if value is not None and _stands_alone(path):
            raise UserError(f"--{path} takes no value: it stands alone.")
        if value is not None and "&" in value and "*" in value and value.lstrip()[:1] in "[{&":
            raise UserError(f"--{path} has YAML aliases: write its values out.")
        flags.append((path, value))
    return flags


def divide(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own words, and the flags of `lesam-dist train` among them, whose names have a dot."""
    own: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, given, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(word)
            continue
        flags.append(word)
        if not given and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return own, flags


def require_values(flags: Sequence[Flag]) -> None:
    """Raise UserError for a flag with nothing behind it."""
    for path, text in flags:
        if text is None and not _stands_alone(path):
            if path != "config" and expected(path) is None:
                raise UserError(nearest_key(path))
            wanted = "a recipe's name or a YAML file" if path == "config" else expected(path)
            raise UserError(f"--{path} has no value: give it {wanted}.")


def values_of(flags: Sequence[Flag]) -> dict[str, str]:
    """The texts by canonical path; of several, the last.

    Raises:
        UserError: for an argument that is given in both of its spellings, with different texts.
    """
    texts: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for path, text in flags:
        if text is None or _stands_alone(path):
            continue
        key = canonical(path)
        if spelled.get(key, path) != path and read_value(texts[key]) != read_value(text):
            raise both_given(f"--{spelled[key]} {texts[key]}", f"--{path} {text}")
        texts[key], spelled[key] = text, path
    return texts


def both_given(first: str, second: str) -> UserError:
    """The error for two spellings of one argument."""
    return UserError(f"{first} and {second} are the same argument with different values: leave one of them out.")


def flags_for(method: str, others: Sequence[str], words: Sequence[str], base: str = "sgd") -> list[str]:
    """Those flags that this method reads, where some method among ``others`` reads the rest.

    Flags that none of them reads stay, to be refused. ``base`` is what the methods step with, unless a flag says so.
    """
    flags = read_flags(words)
    base = _last(flags, "optimizer.base") or base
    foreign = set().union(*(paths_read(other, base) for other in others)) - paths_read(method, base)
    return words_of([flag for flag in flags if canonical(flag[0]) not in foreign])


def words_of(flags: Sequence[Flag]) -> list[str]:
    """The words of a command line with these flags."""
    return [f"--{path}" if text is None else f"--{path}={text}" for path, text in flags]


def words_without(words: Sequence[str], paths: Container[str]) -> list[str]:
    """The words of a command line as they are, but for the flags of these canonical paths."""
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        path, given, _ = word.removeprefix("--").partition("=")
        takes_value = not given and path not in _WITHOUT_VALUE and rest and _is_value(rest[0])
        flag = [word, rest.pop(0)] if takes_value else [word]
        if not (word.startswith("--") and canonical(path) in paths):
            kept += flag
    return kept


def _last(flags: Sequence[Flag], path: str) -> str | None:
    found: Mapping[str, str | None] = dict(flags)
    return found.get(path)


def _stands_alone(path: str) -> bool:
    """Whether nothing may stand behind a flag: ``help.SECTION`` as well."""
    return path in _WITHOUT_VALUE or path.startswith("help.")


def _is_value(word: str) -> bool:
    """Whether a word can stand behind a flag: what begins with a dash only if it is a number, or the dash alone."""
    if not word.startswith("-") or word == "-":
        return True
    try:
        float(word)
    except ValueError:
        return False
    return True
