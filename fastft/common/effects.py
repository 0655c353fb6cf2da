"""Options that can have no effect are refused, or it is said: the conditions stand in the table of options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.common.options import Facts, without_effect


def check_effects(options: Any, facts: Facts | None = None, *, defaults: Mapping[str, Any] | None = None) -> None:
    """Refuses options that are not at their defaults and can have no effect, or warns of them.

    Args:
        options: of a command.
        facts: what is known beside them; without it nothing is said that is not refused.
        defaults: in place of those of the class, such as a recipe's.

    Raises:
        UserError: one has none.
    """
    for condition, line in without_effect(options, facts, defaults=defaults):
        if condition.refused:
            raise UserError(f"{line}; leave it out, or see to what it needs")
        if facts is not None:
            warn(line)
