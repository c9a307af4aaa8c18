"""Pickled modules: the result of `state_dict()`, without their classes.

A module is recognised by the shape of its state: `_parameters`, `_buffers` and `_modules` are
dicts. Names and order are torch's: own parameters, own persistent buffers, then the modules inside.
A module under two names is listed twice, as in torch. Values that a class computes in
`get_extra_state` or in hooks cannot be known, and are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shardkit.checkpoint.entries import OtherKind
from shardkit.pickles.numpy_arrays import is_tensor
from shardkit.pickles.objects import Dict, Opaque, key_text
from shardkit.pickles.torch_tensors import NonDense


@dataclass(frozen=True, slots=True)
class Item:
    """Something in a module.

    Attributes:
        name: from the outermost module on, dotted.
        value: what it is.
        aside: why it is no part of the state dict; empty if it is one.
        is_deep: whether it is a container; tensors in it may have names elsewhere, as those of
            another module have.
    """

    name: str
    value: object
    aside: str = ""
    is_deep: bool = False


def module_state(value: object) -> Dict | None:
    """The `__dict__` of a module, if *value* has the shape of one."""
    match value:
        case Dict():
            return value if all(isinstance(value.get(name), Dict) for name in _SHAPE) else None
        case Opaque():
            # fx.GraphModule keeps it in its arguments; classes with slots keep it in a tuple.
            inner = (
                part
                for state in (*value.states, *value.args)
                for part in (state if isinstance(state, tuple) else (state,))
            )
            return next(
                (
                    part
                    for part in inner
                    if isinstance(part, Dict) and module_state(part) is not None
                ),
                None,
            )
    return None


def module_items(
    outermost: Dict,
    visited: Callable[[int], None],
    holds: Callable[[object], bool] = lambda value: False,
) -> Iterator[Item]:
    """What the module with this state holds.

    Args:
        outermost: as from `module_state`.
        visited: told the length of the name of each module that is looked at, so that the caller
            can put an end to it: modules that share modules can have more names than there is time
            for.
        holds: says of an attribute whether it is a container with tensors, near or far; such
            attributes are given too.
    """
    names: list[str] = []
    states = [outermost]
    stack = [_filled(outermost, "_modules")]
    yield from _own("", outermost, holds)
    while stack:
        for name, child in stack[-1]:
            prefix = ".".join([*names, name])
            visited(len(prefix))
            state = module_state(child)
            if state is None:
                yield Item(prefix, child)
            elif any(state is above for above in states):
                yield Item(prefix, child, "a module that contains itself")
            else:
                yield from _own(prefix + ".", state, holds)
                names.append(name)
                states.append(state)
                stack.append(_filled(state, "_modules"))
                break
        else:
            stack.pop()
            states.pop()
            del names[-1:]


def packed_class(value: object) -> str | None:
    """The class of a `torch.ScriptObject`, which packs the weights of a quantised module; None for
    anything else.
    """
    match value:
        case Opaque(name="torch.ScriptObject", states=[(_, str(name))]):
            return name
        case Opaque(name="torch.ScriptObject"):
            return "torch.ScriptObject"
    return None


def is_quantised(value: object) -> bool:
    """Whether *value* is a module such as the quantised convolutions of torch, which give a tuple
    with their quantised weight to pickle instead of their `__dict__`.
    """
    states = value.states if isinstance(value, Opaque) else ()
    parts = (part for state in states if isinstance(state, tuple) for part in state)
    return any(isinstance(part, NonDense) and part.kind is OtherKind.QUANTISED for part in parts)


_ATTRIBUTE = "an attribute of a module, which is not part of the state dict"
_SHAPE = ("_parameters", "_buffers", "_modules")


def _own(prefix: str, state: Dict, holds: Callable[[object], bool]) -> Iterator[Item]:
    """The parameters and buffers of one module, and tensors that it keeps beside them."""
    yield from (Item(prefix + name, value) for name, value in _filled(state, "_parameters"))
    passing = _passing(state)
    for name, value in _filled(state, "_buffers"):
        yield Item(
            prefix + name,
            value,
            "a non-persistent buffer, which is not part of the state dict"
            if name in passing
            else "",
        )
    for key, value in state.items():
        if packed_class(value) is not None:
            yield Item(prefix + key_text(key), value)
        elif _is_weight(value):
            yield Item(prefix + key_text(key), value, _ATTRIBUTE)
        elif key not in _SHAPE and holds(value):
            yield Item(prefix + key_text(key), value, _ATTRIBUTE, is_deep=True)


def _filled(state: Dict, kind: str) -> Iterator[tuple[str, object]]:
    """The places of one *kind* that are not empty."""
    places = state[kind]
    assert isinstance(places, Dict)  # by module_state
    return ((key_text(key), value) for key, value in places.items() if value is not None)


def _passing(state: Dict) -> frozenset[object]:
    names = state.get("_non_persistent_buffers_set")
    items = names.items if isinstance(names, Opaque) else None
    return frozenset(name for name in items or () if isinstance(name, str))


def _is_weight(value: object) -> bool:
    """Whether it is a tensor, or a flat collection of them."""
    if isinstance(value, list | tuple):
        return any(is_tensor(item) for item in value)
    return is_tensor(value)
