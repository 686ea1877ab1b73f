"""Checks the shapes and types of every call in the package, as jaxtyping does but cheaper.

Its import hook compiles two checks of each function, one of the arguments and one of all, and binds
the arguments for both. Here is one check, and only functions with shapes bind their arguments.
"""

import ast
import builtins
import functools
import sys
import typing
import zlib
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

BEARTYPE = beartype(conf=BeartypeConf(violation_type=TypeError))
SIZES = jaxtyping.jaxtyped("context")
DECORATOR = "_check_shapes_and_types"  # a name that every module sees
# How names of bytecode files end. It changes with this file, which decides what they hold.
BYTECODE = f".checked-{zlib.crc32(Path(__file__).read_bytes()):08x}.pyc"


def install() -> None:
    """Check all modules of the package that are imported from now on."""
    if sys.version_info < (3, 12):  # later ones know the members of a protocol
        typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)
    setattr(builtins, DECORATOR, checked)
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


def checked(thing: Any) -> Any:
    """A function that checks each call, or a dataclass that checks its fields."""
    if isinstance(thing, type):
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    hints = getattr(thing, "__annotations__", {})
    if not hints:
        return thing
    for name in hints:
        carrier = SimpleNamespace(__annotations__={name: hints[name]})
        try:
            get_type_hints(carrier, thing.__globals__)
        except NameError:  # what only type checkers import, or what stands further down
            hints[name] = Any
    function = BEARTYPE(thing)
    return with_equal_letters(function) if has_shapes([*hints.values()]) else function


def with_equal_letters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets equal letters stand for equal sizes in all arguments and the result of a call.

    `jaxtyped` as a decorator does it too, but binds the arguments for what this package never says.
    """

    @functools.wraps(function)
    def called(*arguments: Any, **named: Any) -> Any:
        with SIZES:
            return function(*arguments, **named)

    return called


def has_shapes(hint: Any) -> bool:
    """Whether a part of an annotation is like `Float[Tensor, "b d"]`."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else get_args(hint)
    return any(map(has_shapes, parts))


class Decorate(ast.NodeTransformer):
    """Puts the decorator closest to each function, and farthest from each class.

    Functions within functions are left to mypy: a check would be made anew each time the outer one
    is called, and that took a tenth of a run.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(ast.Name(DECORATOR, ast.Load()))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, ast.Name(DECORATOR, ast.Load()))
        return self.generic_visit(node)


class Loader(SourceFileLoader):
    """Keeps bytecode with the checks beside that without them, under another name."""

    def source_to_code(self, data: bytes, path: str, **_: Any) -> CodeType:
        tree = Decorate().visit(ast.parse(data))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def get_data(self, path: str) -> bytes:
        return super().get_data(path.replace(".pyc", BYTECODE))

    def set_data(self, path: str, data: bytes, **more: Any) -> None:
        super().set_data(path.replace(".pyc", BYTECODE), data, **more)


class Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "protoclip":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec
