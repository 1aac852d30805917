"""Finds likely secrets in recipes and cluster files, which are copied into run folders, reports and logs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRET_KEY = re.compile(
    r"(?i)(^|[_.-])((api|access|secret|private|auth|account|encryption|signing|service|ssh|wandb|hf|aws)[_-]?key|token|secret|"
    r"passw(or)?d|pwd|passphrase|authorization|bearer|credentials?)$|^key$"
)
"""Names of keys whose values are secrets. `group_key` and the like name fields of data."""

_WORD_OF_A_TOKENIZER = re.compile(r"[<\[].*[>\]]|\W?")
"""Values such as `pad_token: <pad>` are not secrets."""

_SECRET_VALUE = re.compile(
    r"\w://[^/\s:@]*:[^/\s@]+@"  # a URL with a password
    r"|\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[A-Za-z0-9_-]{16,}"
    r"|\b(AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def refuse_secrets_in(values: Any, where: str) -> None:
    """Refuses values that look like secrets; called before any are written or shown.

    Raises:
        UserError: a key that names a secret and has a value, or a value that is one to look at; names the key, never the value.
    """
    found = list(dict.fromkeys(_secrets(values, "")))
    if found:
        from nexus_scale.contracts import UserError

        raise UserError(
            f"{where}: {', '.join(found)}: looks like a secret, and recipes and cluster files are copied into run folders, reports and "
            "logs. Remove it; programs read their keys from files or the environment (`wandb login` or WANDB_API_KEY, for example)"
        )


def _secrets(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    if depth > 100:
        return  # deeper than anything that is taken
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else f"{key}"
            is_number = (
                isinstance(inner, int | float) and not isinstance(inner, bool) and "token" not in str(key).lower()
            )
            is_text = isinstance(inner, str) and _WORD_OF_A_TOKENIZER.fullmatch(inner) is None
            if SECRET_KEY.search(str(key)) and (is_text or is_number):
                yield place
            else:
                yield from _secrets(inner, place, depth + 1)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _secrets(inner, f"{where}[{number}]", depth + 1)
    elif isinstance(value, str) and _SECRET_VALUE.search(value):
        yield where or "the value"
