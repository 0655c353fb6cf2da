"""Parameters that a server does not take: a request is sent again without the one that the refusal names.

Hosted models know no `seed`, or no `temperature` but their own; others know the reply's room by another name. What was
left out of a request that then went well is left out of all that follow, said once, and recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastft.common.console import warn
from fastft.judging.wire import NoAnswerError

T = TypeVar("T")

_REFUSING = (400, 422, 501)


class Refusals:
    """What one server has refused.

    Args:
        optional: the parameters that a request can do without.
        model: the judge's name, for the warning.
        other_names: names under which a server may take a parameter that it refuses under its own.
    """

    def __init__(self, optional: Sequence[str], model: str, other_names: Mapping[str, str] | None = None) -> None:
        self._optional = tuple(optional)
        self._model = model
        self._other_names = dict(other_names or {})
        self._renamed: dict[str, str] = {}
        self._left_out: dict[str, None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are left out, by their first names."""
        return tuple(self._left_out)

    def remember(self, names: Sequence[str]) -> None:
        """Leaves parameters out from now on, without a word: they were refused in an earlier call."""
        self._left_out.update(dict.fromkeys(name for name in names if name in self._optional))

    def asked(self, payload: Mapping[str, Any], ask: Callable[[Mapping[str, Any]], T]) -> T:
        """What `ask` makes of the payload, without what the server refuses.

        Raises:
            NoAnswerError: it was refused for another reason, or failed.
        """
        # Of their own, since another thread may change them meanwhile; shared once a request went well.
        left_out, renamed = dict(self._left_out), dict(self._renamed)
        reasons: dict[str, str] = {}
        while True:
            try:
                result = ask({renamed.get(name, name): payload[name] for name in payload if name not in left_out})
            except NoAnswerError as failure:
                name = self._refused(failure, [name for name in payload if name not in left_out], renamed)
                if name is None:
                    raise
                other = self._other_names.get(name)
                if other is not None and name not in renamed and _names(failure, other):
                    renamed[name] = other
                else:
                    left_out[name] = None
                    reasons[name] = str(failure)
            else:
                self._keep(left_out, renamed, reasons)
                return result

    def _refused(self, failure: NoAnswerError, sent: Sequence[str], renamed: Mapping[str, str]) -> str | None:
        if failure.status not in _REFUSING:
            return None
        candidates = [name for name in sent if name in self._optional]
        return next((name for name in candidates if _names(failure, name) or _names(failure, renamed.get(name))), None)

    def _keep(self, left_out: Mapping[str, None], renamed: Mapping[str, str], reasons: Mapping[str, str]) -> None:
        for name in left_out:
            if name not in self._left_out:
                self._left_out[name] = None
                warn(f"{self._model} takes no {name} ({reasons[name]}): it is asked without")
        self._renamed.update(renamed)


def _names(failure: NoAnswerError, name: str | None) -> bool:
    """Whether the server's words name a parameter; `thinking` is said of `think`."""
    return name is not None and bool(re.search(rf"(?<![A-Za-z0-9_]){name}(?:ing)?(?![A-Za-z0-9_])", failure.reason))
