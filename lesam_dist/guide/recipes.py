"""`lesam-dist recipes`: lists recipes, looks for words in them, and prints what one sets."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence

import yaml

from lesam_dist.config.parser import Parser, examples
from lesam_dist.config.recipes import ALIASES, bases, compose, methods, methods_of, recipes, split
from lesam_dist.errors import UserError, one_line, unknown_name
from lesam_dist.guide.about import About, about, all_about, passes

_TEXT = """List the recipes for --config of `lesam-dist train` and `compare`. WORDS take those that have all of them: in
data set, network, method, base optimizer, what is needed, or the paper's table. The NAME of one recipe prints what it
sets, as a YAML file that --config reads, with its cost and needs."""
_WIDTH = 78
_LEGEND = """needs: "download" and "weights" are fetched by the run; DIR is yours, --data.root DIR; [NAME] is
pip install "lesam-dist[NAME]"."""
_SHORT = {"170 MB downloaded": "download", "--data.root DIR": "DIR"}


def recipes_command(argv: Sequence[str]) -> None:
    """Print recipes.

    Raises:
        UserError: for words that no recipe has.
    """
    words = parser().parse_args(list(argv)).words
    if len(words) == 1 and split(words[0]):
        print(one_recipe(words[0]), end="")
    elif len(words) == 1 and words[0] in bases():
        print("\n".join(_methods_table(about(words[0]), methods_of(words[0]))))
    else:
        print("\n".join(_list(words)))


def parser() -> Parser:
    """Its arguments."""
    epilog = examples("recipes", "recipes table 1 wrn28_10", "recipes cifar100_resnet18_lesam > mine.yaml")
    found = Parser("recipes", _TEXT, epilog)
    found.add_argument("words", metavar="WORD", nargs="*", help="what to look for, or the NAME of one recipe")
    return found


def one_recipe(name: str) -> str:
    """What a recipe sets, as YAML under comments that say what it is, needs and costs.

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    tree = compose(name)
    base, method = split(name) or ("", "")
    one = about(base)
    title = f"{name}: {one.data}, {one.network}, {method}"
    lines = [f"{title}{f' on {one.steps_with}' if method not in ('sgd', one.steps_with) else ''}."]
    lines += [f"Short for {base}_{method}."] if name in ALIASES else []
    tables = [table for table, with_methods in one.tables.items() if method in with_methods]
    lines.append(f"Of the paper: {', '.join(tables)}." if tables else "Beyond the paper.")
    steps = f" of {one.steps:,} steps" if one.steps else ""
    lines.append(f"Costs {one.epochs} epochs{steps}, a batch of {one.batch:,}, passes a step: {passes(method)}.")
    lines.append(f"Needs {_in_full(one)}.")
    wrapped = [textwrap.fill(line, _WIDTH, subsequent_indent="    ") for line in lines]
    wrapped += ["", f"train:             lesam-dist train --config {name}"]
    wrapped += [f"every field of it: lesam-dist train --config {name} --print_config"]
    wrapped += [f"time on GPUs:      lesam-dist plan --config {name} --gpus 8"]
    comments = "\n".join(f"# {line}".rstrip() for text in wrapped for line in text.split("\n"))
    return f"{comments}\n{yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)}"


def _list(words: Sequence[str]) -> Iterator[str]:
    wanted = [word for word in _joined(words) if word not in methods()]
    with_methods = [word for word in _joined(words) if word in methods()]
    found = [one for one in all_about() if all(_has(one, word) for word in wanted)]
    found = [one for one in found if all(method in methods_of(one.base) for method in with_methods)]
    if not found:
        raise _nothing(words, wanted)
    if len(found) == 1:
        yield from _methods_table(found[0], with_methods or methods_of(found[0].base))
        return
    rows = [("recipe", "epochs", "batch", "needs", "table")]
    for one in found:
        tables = [table for table, those in one.tables.items() if all(method in those for method in with_methods)]
        needs = ", ".join(_SHORT.get(need, need) for need in one.needs)
        rows.append((one.base, str(one.epochs), str(one.batch), needs, _numbers(tables)))
    yield from _aligned(rows)
    yield ""
    chosen = with_methods or methods()
    yield textwrap.fill(f"Behind each the method: _{', _'.join(chosen)}. {_LEGEND}", _WIDTH, break_on_hyphens=False)
    short = [f"{name} = {full}" for name, full in ALIASES.items()] if not words else []
    if short:
        yield textwrap.fill(f"Short: {', '.join(short)}.", _WIDTH)
    yield f"What one sets: lesam-dist recipes {found[0].base}_{with_methods[0] if with_methods else 'lesam'}"


def _methods_table(one: About, names: Sequence[str]) -> Iterator[str]:
    """Each recipe of a DATA_MODEL with its cost."""
    images = f", {one.images:,} training images" if one.images else ""
    yield textwrap.fill(f"{one.base}: {one.data}{images}, {one.network}, {one.epochs} epochs.", _WIDTH)
    yield f"needs: {_in_full(one)}"
    yield ""
    rows = [("method", "passes a step", "of the paper")]
    for name in names:
        tables = [table for table, with_methods in one.tables.items() if name in with_methods]
        rows.append((f"_{name}", passes(name), ", ".join(tables)))
    yield from _aligned(rows)
    yield ""
    yield f"What one sets: lesam-dist recipes {one.base}_{names[0] if len(names) == 1 else 'lesam'}"


def _in_full(one: About) -> str:
    """What it needs, with the command that brings an extra."""
    needs = [f'pip install "lesam-dist{need}"' if need.startswith("[") else need for need in one.needs]
    return ", ".join(needs) or "nothing but the packages of the trainer"


def _numbers(tables: Sequence[str]) -> str:
    """Of tables and sections alone, as "1, 4, 6": there is no room for more."""
    names = [table.removeprefix("Table ").replace("Section", "Sec.") for table in tables]
    return ", ".join(name for name in names if not name.startswith("Figure"))


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _joined(words: Sequence[str]) -> list[str]:
    """Words in lower case; "table 1" and "table1" are one."""
    text = re.sub(r"\b(table|section|figure)\s*(\d)", r"\1_\2", " ".join(words).lower().replace("-", "_"))
    return text.split()


def _has(one: About, word: str) -> bool:
    text = one.text.replace("-", "_")
    if found := re.fullmatch(r"(table|section|figure)_([\d.]+)", word):
        return re.search(rf"\b{found[1]} {re.escape(found[2])}(?![\d])", text) is not None
    return word in text


def _nothing(words: Sequence[str], wanted: Sequence[str]) -> UserError:
    """No recipe has all of the words: the first that none has, or that they do not meet."""
    unknown = [word for word in wanted if not any(_has(one, word) for one in all_about())]
    if not unknown:
        return UserError(f"no recipe has all of: {', '.join(map(one_line, words))}. Leave one of them out.")
    names = {name for one in all_about() for name in re.findall(r"[a-z]\w{3,}", one.text)} | {*methods()}
    if len(words) == 1 and (near := difflib.get_close_matches(words[0], [*recipes(), *bases()], n=1, cutoff=0.8)):
        return UserError(f"unknown recipe '{one_line(words[0])}': did you mean '{near[0]}'?")
    near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.5)
    if near:
        return unknown_name("recipe or word", unknown[0], names)
    return UserError(f"no recipe has '{one_line(unknown[0])}': `lesam-dist recipes` lists all.")
