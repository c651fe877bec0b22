"""Live views of the parameter groups and of the state of several optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, SupportsIndex, TypeVar

from torch import Tensor
from torch.optim import Optimizer

T = TypeVar("T")
Group = dict[str, Any]


class MergedGroups(list[Group]):
    """The parameter groups of several optimizers, one after another, as one list that writes through.

    A group stays with its optimizer. One put in another's place, or behind it, goes to that one's optimizer: what is
    appended is the last optimizer's.
    """

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        super().__init__()
        self._bases = bases
        self.refreshed()

    def refreshed(self) -> MergedGroups:
        """Itself, as the optimizers are now."""
        now = [group for base in self._bases for group in base.param_groups]
        if len(now) != len(self) or any(a is not b for a, b in zip(now, self, strict=True)):
            list.__setitem__(self, slice(None), now)
        return self

    def _write(self, change: Callable[[list[Group]], T]) -> T:
        groups = list(self.refreshed())
        owners = [i for i, base in enumerate(self._bases) for _ in base.param_groups]
        owner = dict(zip(map(id, groups), owners, strict=True))
        result = change(groups)
        replaces = len(groups) == len(owners)
        parts: list[list[Group]] = [[] for _ in self._bases]
        last = 0 if owners else len(parts) - 1
        for place, group in enumerate(groups):
            last = owner.get(id(group), owners[place] if replaces else last)
            parts[last].append(group)
        for base, part in zip(self._bases, parts, strict=True):
            base.param_groups[:] = part
        self.refreshed()
        return result

    def append(self, group: Group) -> None:
        self._write(lambda groups: groups.append(group))

    def extend(self, more: Iterable[Group]) -> None:
        more = list(more)
        self._write(lambda groups: groups.extend(more))

    def insert(self, place: SupportsIndex, group: Group) -> None:
        self._write(lambda groups: groups.insert(place, group))

    def pop(self, place: SupportsIndex = -1) -> Group:
        return self._write(lambda groups: groups.pop(place))

    def remove(self, group: Group) -> None:
        self._write(lambda groups: groups.remove(group))

    def clear(self) -> None:
        self._write(lambda groups: groups.clear())

    def __setitem__(self, place: Any, value: Any) -> None:
        self._write(lambda groups: groups.__setitem__(place, value))

    def __delitem__(self, place: Any) -> None:
        self._write(lambda groups: groups.__delitem__(place))

    def __iadd__(self, more: Iterable[Group]) -> MergedGroups:  # type: ignore[override, misc]
        self.extend(more)
        return self

    def sort(self, **options: Any) -> None:
        """Within each optimizer."""
        self._write(lambda groups: groups.sort(**options))

    def reverse(self) -> None:
        """Within each optimizer."""
        for base in self._bases:
            base.param_groups.reverse()
        self.refreshed()

    # A copy of the list is nobody's: copying an optimizer copies the optimizers in it.

    def __copy__(self) -> list[Group]:
        return list(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Group]:
        return copy.deepcopy(list(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class MergedState(MutableMapping[Any, Any]):
    """The states of several optimizers as one live mapping.

    A parameter's state is in the optimizer that owns it. What is not a parameter, such as the string keys that some
    optimizers put there, is in the first optimizer that has it, and a new one in the first of all.
    """

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.bases = bases

    def owner(self, key: Any) -> int:
        """Number of the optimizer whose state holds ``key``. Raises KeyError for a parameter of none."""
        for i, base in enumerate(self.bases):
            if key in base.state:
                return i
        if not isinstance(key, Tensor):
            return 0
        for i, base in enumerate(self.bases):
            if any(key is parameter for group in base.param_groups for parameter in group["params"]):
                return i
        raise KeyError(key)

    def _of(self, key: Any) -> Any:
        return self.bases[self.owner(key)].state

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in base.state for base in self.bases)

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(key for base in self.bases for key in base.state))

    def __len__(self) -> int:
        return len({key for base in self.bases for key in base.state})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"
