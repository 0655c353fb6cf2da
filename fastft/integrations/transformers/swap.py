"""An object given another class, and its own back: its `__dict__` stays as it is, bit for bit.

The other class is a subclass of its own with the same name. So `isinstance`, signatures, checkpoints and hooks go on as
before, copies and replicas are accelerated like the original (a function bound to the instance would run the original
in all of them), and nothing of any other object changes.
"""

from __future__ import annotations

from typing import Any, cast


class Swapped:
    """What all such classes have."""

    original: type
    """The object's own class."""
    facts: dict[str, Any]
    """What the object is to remember; its own, as the class is."""

    @classmethod
    def members(cls, original: type) -> dict[str, Any]:  # noqa: ARG003 # of those that override it
        """What the new class has beside this one's, made for `original`."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: a class made at run time is not found by its name."""
        return _again, (self.original, type(self).__bases__[0], dict(self.facts)), self.__dict__


def _again(original: type, mixin: type[Swapped], facts: dict[str, Any]) -> object:
    cls = _class(original, mixin, facts)
    return object.__new__(cls)


def _class(original: type, mixin: type[Swapped], facts: dict[str, Any]) -> type:
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {"original": original, "facts": facts, **mixin.members(original)}
    return type(original.__name__, (mixin, original), {**named, **own})


def swap(thing: Any, mixin: type[Swapped], **facts: Any) -> None:
    """Puts `mixin` before the class of a thing."""
    thing.__class__ = _class(type(thing), mixin, facts)


def swap_back(thing: object) -> None:
    """Gives a thing its own class back; nothing where it has it."""
    if isinstance(thing, Swapped):
        thing.__class__ = _without(type(thing))


def _without(cls: Any) -> type:
    """A swapped class -> the original; what was made on top of it since (torch's parametrizations and FSDP do so) ->
    the same on top of the original."""
    if "original" in vars(cls):
        return cast(type, cls.original)
    bases = tuple(_without(base) if issubclass(base, Swapped) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, own)


def own_class(thing: object) -> type:
    """The class that a thing has by itself."""
    return thing.original if isinstance(thing, Swapped) else type(thing)
