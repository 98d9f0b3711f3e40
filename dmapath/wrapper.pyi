from typing import Any

RULE_BITS: dict[str, int]
api: Any

def fail_nth(n: int) -> int: ...
