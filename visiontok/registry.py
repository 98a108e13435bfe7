"""One generic registry: classes found by file, aliases, entry points, did-you-mean."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import inspect
import pkgutil
import warnings
from typing import Any, Generic, TypeVar, cast

from visiontok.errors import UnknownNameError, did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Finds the classes of one kind that live one per file in a package, and those that third parties offer.

    A class takes part if it is defined in a module of the package, has a public class name and a non-empty `name` in
    its own body. Nothing is imported before the first look-up.

    Args:
        kind: Word used in messages, e.g. `"reducer"`.
        package: Dotted path of the package whose modules are searched.
        entry_points: Entry-point group searched for third-party classes.
    """

    def __init__(self, kind: str, package: str, entry_points: str) -> None:
        self.kind = kind
        self.package = package
        self.entry_points = entry_points
        self._classes: dict[str, type[T]] = {}
        self._aliases: dict[str, str] = {}
        self._searched = False

    def names(self, pattern: str = "*") -> list[str]:
        """Returns the sorted names that match a shell-style pattern."""
        self._search()
        return sorted(name for name in self._classes if fnmatch.fnmatchcase(name, pattern))

    def get(self, name: str) -> type[T]:
        """Returns the class of that name or alias.

        Raises:
            UnknownNameError: No such name; the message offers the closest one and lists all.
        """
        self._search()
        key = _plain(name)
        key = self._aliases.get(key, key)
        if key not in self._classes:
            known = self.names()
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}.{did_you_mean(name, [*known, *self._aliases])} "
                f"Known: {', '.join(known) or 'none'}."
            )
        return self._classes[key]

    def by_class_name(self, class_name: str) -> type[T] | None:
        """Returns the class whose Python name is `class_name`, or None."""
        self._search()
        return next((cls for cls in self._classes.values() if cls.__name__ == class_name), None)

    def classes(self) -> list[type[T]]:
        """Returns every registered class, ordered by name."""
        return [self._classes[name] for name in self.names()]

    def register(self, cls: type[T]) -> type[T]:
        """Adds a class under its `name` and `aliases`; usable as a decorator.

        Raises:
            ValueError: The name or an alias belongs to another class.
        """
        name = _plain(vars(cls)["name"])
        aliases = [_plain(alias) for alias in vars(cls).get("aliases", ())]
        for key in (name, *aliases):
            owner = self._classes.get(self._aliases.get(key, key))
            if owner is not None and owner is not cls:
                raise ValueError(f"{self.kind} name {key!r} of {cls!r} is taken by {owner!r}; choose another name.")
        self._classes[name] = cls
        self._aliases.update(dict.fromkeys(aliases, name))
        return cls

    def _search(self) -> None:
        if self._searched:
            return
        package = importlib.import_module(self.package)
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{self.package}.{info.name}")
            for _, cls in inspect.getmembers(module, inspect.isclass):
                public = not getattr(cls, "__name__", "_").startswith("_")
                if public and cls.__module__ == module.__name__ and vars(cls).get("name"):
                    self.register(cast("type[T]", cls))
        # Only now: a search that an import error cut short must start anew, not leave half a registry.
        self._searched = True
        for entry in importlib.metadata.entry_points(group=self.entry_points):
            self._load(entry)

    def _load(self, entry: Any) -> None:
        # A broken plugin must not take every other method down with it, but may not vanish silently either.
        try:
            self.register(entry.load())
        except Exception as error:
            warnings.warn(f"{self.kind} plugin {entry.value!r} could not be loaded: {error}", stacklevel=4)


def _plain(name: str) -> str:
    return str(name).lower().replace("-", "_")
