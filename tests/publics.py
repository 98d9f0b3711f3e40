"""What dmapath shows to its users, read from its type stubs and sources: public functions, classes, methods, parameters."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import dmapath

ROOT = Path(dmapath.__file__).parent


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: str
    required: bool
    keyword: bool


@dataclass
class Function:
    """``name`` is "f", "Class.method" or "Class" (its constructor); ``kind``: plain, method, classmethod or property."""

    module: str
    name: str
    kind: str
    parameters: list[Parameter]

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Class:
    module: str
    name: str
    bases: list[str]
    methods: dict[str, Function] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _function(module: str, node: ast.FunctionDef, owner: str = "") -> Function:
    marks = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in node.decorator_list}
    kind = "property" if "property" in marks else "classmethod" if "classmethod" in marks else "method" if owner else "plain"
    a = node.args
    plain = [*a.posonlyargs, *a.args][1 if owner and "staticmethod" not in marks else 0 :]
    optional = len(a.defaults)
    out = [
        Parameter(p.arg, "" if p.annotation is None else ast.unparse(p.annotation), i < len(plain) - optional, False)
        for i, p in enumerate(plain)
    ]
    out += [
        Parameter(p.arg, "" if p.annotation is None else ast.unparse(p.annotation), d is None, True)
        for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    name = node.name if not owner else owner if node.name == "__init__" else f"{owner}.{node.name}"
    return Function(module, name, kind, out)


def _class(module: str, node: ast.ClassDef) -> Class:
    out = Class(module, node.name, [ast.unparse(b) for b in node.bases])
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (_is_public(item.name) or item.name.startswith("__")):
            out.methods[item.name] = _function(module, item, node.name)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _is_public(item.target.id):
            out.values.append(item.target.id)
    return out


@cache
def surface() -> tuple[dict[str, Function], dict[str, Class]]:
    """Functions and classes by their full names; a stub stands for the module beside it."""
    functions: dict[str, Function] = {}
    classes: dict[str, Class] = {}
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.pyi")]):
        module = ".".join(("dmapath", *path.relative_to(ROOT).with_suffix("").parts))
        if path.name.startswith("_") or (path.suffix == ".py" and path.with_suffix(".pyi").exists()):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and _is_public(node.name):
                classes[f"{module}.{node.name}"] = _class(module, node)
            elif isinstance(node, ast.FunctionDef) and _is_public(node.name):
                functions[f"{module}.{node.name}"] = _function(module, node)
    return functions, classes
