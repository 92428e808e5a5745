"""What is known of a method before it is built: its name, cost and arguments. Config, help and tables are made of it.

A class registers itself by the keywords of its ``class`` line, see `Registration`. The files of `lesam_dist.optim` are
read for that, not run: what only reads a config or prints a help must not wait for torch. A class from elsewhere is
known once it was imported, or by its import path, ``my_package.my_module:MyMethod``.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lesam_dist.errors import UserError, unknown_name
from lesam_dist.optim.engine.arguments import NAMESPACE, Argument

if TYPE_CHECKING:
    from lesam_dist.optim.engine.base import SharpnessAware

_PACKAGE = "lesam_dist.optim"
_BASE = f"{_PACKAGE}.engine.base"


@dataclass(frozen=True)
class Registration:
    """The keywords of a method's ``class`` line; all of them literals.

    Attributes:
        name: in configs and on the command line, in lower case.
        along: what the weights are perturbed along, in words.
        passes: forward and backward passes a step, in words.
        keeps: what it keeps in memory besides the copy of the weights, in words.
        aliases: other names for it; the class's own, in lower case, is always one.
        budget: the argument that `CosineBudget` schedules, if any.
        one_pass: it perturbs before the gradient is known, see `SharpnessAware.look_ahead`.
        without: options of `Options` that it does not have.
    """

    name: str
    along: str
    passes: str = "2"
    keeps: str = ""
    aliases: tuple[str, ...] = ()
    budget: str = ""
    one_pass: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A method: what its class says of itself.

    Attributes:
        registration: the keywords of its ``class`` line.
        module, class_name: where its class is.
        arguments: its hyper-parameters by name, in the order of its signature.
    """

    registration: Registration
    module: str
    class_name: str
    arguments: Mapping[str, Argument]

    @property
    def name(self) -> str:
        return self.registration.name

    @property
    def names(self) -> tuple[str, ...]:
        """The name and all aliases."""
        return (self.name, self.class_name.lower(), *self.registration.aliases)

    def load(self) -> type[SharpnessAware]:
        """The class."""
        cls: type[SharpnessAware] = getattr(import_module(self.module), self.class_name)
        return cls


def methods() -> dict[str, Method]:
    """All methods by name: those of `lesam_dist.optim`, then those that were imported from elsewhere."""
    known = {method.name: method for method in built_in()}
    for cls in _imported():
        known.setdefault(cls.registration.name, describe(cls))
    return known


def find(name: str) -> Method:
    """The method of a name, an alias or an import path ``package.module:Class``; upper case and ``-`` do not matter.

    Raises:
        UserError: for a name that no method has, or a path where there is none.
    """
    if ":" in name:
        return _from_path(name)
    wanted = re.sub(r"[-_ ]", "", name.lower())
    known = methods()
    for method in known.values():
        if wanted in (re.sub("[-_ ]", "", other) for other in method.names):
            return method
    raise unknown_name("optimizer", name, known)


def _from_path(path: str) -> Method:
    module, _, class_name = path.partition(":")
    try:
        cls = getattr(import_module(module), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"optimizer '{path}' cannot be imported: {error}. Give package.module:Class of a class that Python finds "
            "(PYTHONPATH, or pip install -e)."
        ) from error
    if not hasattr(cls, "registration"):
        raise UserError(
            f"optimizer '{path}' is no registered method: derive it from a class of lesam_dist.optim, with "
            f"name= in its class line, as in `class {class_name}(SAM, name='...', along='...')`."
        )
    return describe(cls)


def describe(cls: Any) -> Method:
    """What a class that is imported says of itself."""
    return Method(cls.registration, cls.__module__, cls.__name__, arguments_of(cls))


@cache
def arguments_of(cls: Any) -> Mapping[str, Argument]:
    """The hyper-parameters of a class, from the signature of its ``__init__`` and its docstring."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    types = typing.get_type_hints(vars(owner)["__init__"], include_extras=True)
    texts = _texts(inspect.getdoc(owner) or "")
    return {
        name: Argument(name, types.get(name, Any), parameter.default, texts.get(name, ""))
        for name, parameter in inspect.signature(owner).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _imported() -> Iterator[type[SharpnessAware]]:
    """The registered subclasses that exist; importing nothing."""
    base = sys.modules.get(_BASE)
    waiting = list(base.SharpnessAware.__subclasses__()) if base else []
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if "registration" in vars(cls):
            yield cls


@cache
def built_in() -> tuple[Method, ...]:
    """The methods whose files are in `lesam_dist.optim`, read from their text."""
    sources = sorted((item for item in files(_PACKAGE).iterdir() if item.name.endswith(".py")), key=lambda x: x.name)
    classes: dict[str, tuple[str, ast.ClassDef]] = {}
    for item in sources:
        for node in ast.parse(item.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = (f"{_PACKAGE}.{item.name.removesuffix('.py')}", node)
    found = []
    for class_name, (module, node) in classes.items():
        keywords = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
        if "name" in keywords:
            found.append(Method(Registration(**keywords), module, class_name, _read_arguments(class_name, classes)))
    return tuple(found)


def _read_arguments(class_name: str, classes: Mapping[str, tuple[str, ast.ClassDef]]) -> Mapping[str, Argument]:
    """As `arguments_of`, from the text of the class or of the first base that has an ``__init__``."""
    node = classes[class_name][1]
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            texts, own = _texts(ast.get_docstring(node) or ""), statement.args
            return {
                arg.arg: Argument(
                    arg.arg,
                    eval(ast.unparse(arg.annotation), dict(NAMESPACE)) if arg.annotation else Any,
                    ast.literal_eval(default) if default else inspect.Parameter.empty,
                    texts.get(arg.arg, ""),
                )
                for arg, default in zip(own.kwonlyargs, own.kw_defaults, strict=True)
            }
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    return _read_arguments(bases[0], classes) if bases else {}


def _texts(docstring: str) -> dict[str, str]:
    """The lines of a docstring's ``Args:`` by argument."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", docstring, re.M)
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section[1], re.M) if section else []
    return {name.strip(): " ".join(text.split()).rstrip(".") for names, text in entries for name in names.split(",")}
