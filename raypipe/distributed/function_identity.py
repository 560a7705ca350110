"""Describe a function by a text that changes when its result can change.

The text covers what the function can reach: its code, defaults and closure, the globals and
attributes of modules that the code names, the functions and classes among these with their base
classes, and the state of objects. Code of installed packages counts by its name alone. The text is
the same in every process: it holds no addresses, and sets are sorted.

What cannot be described, such as a lock or an open file, is collected by name, so that the caller
can report it.
"""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np

PLAIN = (str, int, float, complex, bool, bytes, type(None), type(...), type(NotImplemented))
MAX_DEPTH = 60
"""Levels below which objects are reported as unseen: linked lists, deeply nested structures."""
_INSTALLED = tuple(
    {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)
_INSTALLED_NAMES = {"site-packages", "dist-packages"}
"""Folders of installed packages also of another environment, which `sys.path` can name."""


class Describer:
    """Describes values; one instance for all values that are compared together.

    Attributes
    ----------
    unseen : set of str
        What the descriptions do not cover, each as one phrase.
    """

    def __init__(self) -> None:
        self.unseen: set[str] = set()
        self._open: dict[int, int] = {}
        self._done: dict[int, tuple[Any, str]] = {}

    def describe(self, value: Any, name: str = "") -> str:
        """Return the text of a value.

        Parameters
        ----------
        value : object
        name : str
            How the value is reached, for `unseen`.
        """
        if isinstance(value, PLAIN):
            return repr(value)
        key = id(value)
        if key in self._open:
            return f"<level {self._open[key]}>"
        if key in self._done:
            return self._done[key][1]
        if len(self._open) > MAX_DEPTH:
            return self._unseen(value, name)
        self._open[key] = len(self._open)
        try:
            text = self._text(value, name)
        except Exception:  # properties and reductions run code of their authors
            text = self._unseen(value, name)
        finally:
            del self._open[key]
        # with a long text, a hash: it is contained in many others
        text = text if len(text) < 1000 else hashlib.blake2b(_encoded(text)).hexdigest()[:48]
        self._done[key] = (value, text)  # holds the value, so that no other gets its id
        return text

    def _unseen(self, value: Any, name: str) -> str:
        kind = type(value)
        self.unseen.add(f"{name or 'a value'} ({kind.__module__}.{kind.__qualname__})")
        return f"unseen {kind.__qualname__}"

    def _text(self, value: Any, name: str) -> str:
        for accepts, describe in self._KINDS:
            if accepts(value):
                return describe(self, value, name)
        return self._object(value, name)

    def _all(self, values: Iterable[Any], name: str) -> list[str]:
        return [self.describe(value, name) for value in values]

    def _sequence(self, value: Any, name: str) -> str:
        return f"[{', '.join(self._all(value, name))}]"

    def _set(self, value: Any, name: str) -> str:
        return f"{{{', '.join(sorted(self._all(value, name)))}}}"

    def _dict(self, value: Any, name: str) -> str:
        items = (
            f"{self.describe(key, name)}: {self.describe(item, name)}"
            for key, item in value.items()
        )
        return f"{{{', '.join(items)}}}"

    def _array(self, value: Any, name: str) -> str:
        if value.dtype.hasobject:
            return f"array {value.shape} {self._all(value.reshape(-1).tolist(), name)}"
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()[:24]
        return f"array {value.dtype} {value.shape} {digest}"

    def _tensor(self, value: Any, name: str) -> str:
        return self.describe(value.detach().cpu().numpy(), name)

    def _partial(self, value: Any, name: str) -> str:
        parts = (value.func, value.args, value.keywords)
        return f"partial({', '.join(self._all(parts, name))})"

    def _module(self, value: ModuleType, name: str) -> str:
        # of a module's attributes, those count that a function names; see `_reached`
        return f"module {value.__name__}"

    def _code(self, value: CodeType, name: str) -> str:
        constants = self._all(value.co_consts, name)
        return f"code {value.co_code.hex()} {value.co_names} {constants}"

    def _method(self, value: Any, name: str) -> str:
        owner = self.describe(value.__self__, name)
        return f"{self.describe(value.__func__, name)} of {owner}"

    def _wrapped_method(self, value: Any, name: str) -> str:
        return f"{type(value).__name__} {self.describe(value.__func__, name)}"

    def _property(self, value: Any, name: str) -> str:
        parts = (value.fget, value.fset, value.fdel)
        return f"property {self._all(parts, name)}"

    def _function(self, value: Any, name: str) -> str:
        if installed(value.__module__):
            return f"{value.__module__}.{value.__qualname__}"
        name = value.__qualname__
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
        attributes = {key: item for key, item in vars(value).items() if key != "__wrapped__"}
        reached = [
            f"{path}={self.describe(item, f'{path} in {name}')}"
            for path, item in self._reached(value)
        ]
        return " ".join([name, *self._all(parts, name), self._dict(attributes, name), *reached])

    def _class(self, value: type, name: str) -> str:
        if installed(value.__module__):
            return f"{value.__module__}.{value.__qualname__}"
        bases = self._all(value.__mro__[1:], value.__qualname__)
        members = {
            key: item
            for key, item in vars(value).items()
            if key not in _GENERATED
            and not inspect.isgetsetdescriptor(item)
            and not inspect.ismemberdescriptor(item)
        }
        fields = members.get("__pydantic_fields__")
        if isinstance(fields, dict):  # a pydantic model generates everything else from them
            members = {key: item for key, item in members.items() if "__pydantic" not in key}
            members["fields"] = {
                key: [repr(field.annotation), field.default, field.metadata]
                for key, field in fields.items()
            }
        return f"{value.__qualname__} {bases} {self._dict(members, value.__qualname__)}"

    def _object(self, value: Any, name: str) -> str:
        """Describe an object by what it would be pickled as."""
        kind = type(value)
        if kind.__module__.split(".")[0] == "ray":
            return self._ray_object(value, name)
        if any("FileSystem" in base.__name__ for base in kind.__mro__):
            return kind.__qualname__  # its state holds credentials, which change without a reason
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None:  # such as a function with a cache
            return f"{kind.__qualname__} {self.describe(wrapped, name)}"
        reduction = copyreg.dispatch_table.get(kind)  # as for compiled patterns
        reduced = reduction(value) if reduction is not None else value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return f"{kind.__module__}.{reduced}"
        build, arguments, *rest = reduced
        state, items, pairs = [*rest, None, None, None][:3]
        inner = f"{name}: {kind.__qualname__}" if name else kind.__qualname__
        parts = [build, arguments, state, list(items or ()), list(pairs or ())]
        return f"{self.describe(kind)} {self._all(parts, inner)}"

    def _ray_object(self, value: Any, name: str) -> str:
        """Describe an object of Ray, whose text is complete unless it shows addresses."""
        shown = repr(value)
        if type(value).__name__.endswith("ObjectRef"):
            return self._unseen(value, name)
        if " at 0x" not in shown:
            return shown
        if dataclasses.is_dataclass(value):
            return " ".join(
                f"{field.name}={self.describe(getattr(value, field.name), name)}"
                for field in dataclasses.fields(value)
            )
        function = getattr(value, "_function", None)  # of a remote function
        return f"{type(value).__qualname__} {self.describe(function, name)}"

    def _reached(self, function: Any) -> Iterator[tuple[str, Any]]:
        """Yield path and value of each global, and attribute of a module, that the code names."""
        codes = list(_nested(function.__code__))
        names = sorted({name for code in codes for name in code.co_names})
        modules: dict[str, ModuleType] = {}
        for name in names:
            if name in function.__globals__:
                value = function.__globals__[name]
                if isinstance(value, ModuleType):
                    modules[name] = value
                else:
                    yield name, value
        for name in sorted({name for code in codes for name in _imported(code)}):
            module = self._imported_module(name, function)
            if module is not None:
                modules[name] = module
        seen: set[str] = set()
        while modules:
            path, module = modules.popitem()
            if installed(module.__name__) or module.__name__ in seen:
                continue
            seen.add(module.__name__)
            for name in names:
                value = vars(module).get(name, modules)
                if isinstance(value, ModuleType):
                    modules[f"{path}.{name}"] = value
                elif value is not modules:
                    yield f"{path}.{name}", value

    def _imported_module(self, name: str, function: Any) -> ModuleType | None:
        """Return a module that a function imports itself; one that is not loaded is unseen."""
        package = function.__globals__.get("__package__") or ""
        for candidate in (name, f"{package}.{name}".rstrip(".")):
            if candidate in sys.modules:
                return sys.modules[candidate]
        if not installed(name):
            self.unseen.add(f"the import of {name} in {function.__qualname__}")
        return None

    _KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Describer, Any, str], str]], ...] = (
        (lambda value: isinstance(value, np.ndarray), _array),
        (lambda value: type(value) in {list, tuple}, _sequence),
        (lambda value: type(value) in {set, frozenset}, _set),
        (lambda value: type(value) is dict, _dict),
        (lambda value: isinstance(value, functools.partial), _partial),
        (lambda value: isinstance(value, CodeType), _code),
        (lambda value: isinstance(value, ModuleType), _module),
        (lambda value: hasattr(value, "detach") and hasattr(value, "cpu"), _tensor),
        (inspect.ismethod, _method),
        (inspect.isfunction, _function),
        (inspect.isclass, _class),
        (lambda value: isinstance(value, classmethod | staticmethod), _wrapped_method),
        (lambda value: isinstance(value, property), _property),
    )


_GENERATED = frozenset(
    {"__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__abstractmethods__",
     "_abc_impl", "__static_attributes__", "__annotations__", "__annotate_func__"}
)  # fmt: skip
"""Attributes of classes that the interpreter adds, and those that change no result."""


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and those of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _imported(code: CodeType) -> list[str]:
    """Return the modules that import statements in a function name."""
    steps = dis.get_instructions(code)
    return [step.argval for step in steps if step.opname == "IMPORT_NAME" and step.argval]


@functools.cache
def installed(module: str | None) -> bool:
    """Return whether a module belongs to Python or an installed package, not to the user."""
    if not module or module == "__main__":
        return False
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in {"ray", "raypipe", "builtins"}:
        return True
    try:
        loaded = sys.modules.get(top)
        spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
    return any(
        place.startswith(_INSTALLED) or not _INSTALLED_NAMES.isdisjoint(Path(place).parts)
        for place in places
    )


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
