"""A parser of PromQL that also checks types, for the expressions of the dashboard and the alert rules.

Operators, precedences, aggregations and the functions below as in Prometheus' documentation ("Querying"). It says of an
expression which series it reads and which labels it names; `PromQLError` says where one is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Type = Literal["scalar", "vector", "matrix", "string"]

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<duration>(?:\d+(?:ms|[smhdwy]))+)(?![A-Za-z0-9_])
    | (?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)
    | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<name>[A-Za-z_][A-Za-z0-9_:]*)
    | (?P<op>=~|!~|==|!=|<=|>=|[-+*/%^<>=(){}\[\],:@])
    )""",
    re.VERBOSE,
)
_AGGREGATIONS = {
    "sum": 1, "min": 1, "max": 1, "avg": 1, "group": 1, "stddev": 1, "stdvar": 1, "count": 1, "count_values": 2,
    "bottomk": 2, "topk": 2, "quantile": 2,
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[Type, ...]] = {
    **dict.fromkeys(("rate", "irate", "increase", "delta", "idelta", "deriv", "changes", "resets"), ("matrix",)),
    **{f"{name}_over_time": ("matrix",) for name in ("avg", "min", "max", "sum", "count", "last", "present", "stddev")},
    **dict.fromkeys(("abs", "ceil", "floor", "exp", "ln", "sqrt", "absent", "sort", "sort_desc"), ("vector",)),
    "absent_over_time": ("matrix",),
    "quantile_over_time": ("scalar", "matrix"),
    "predict_linear": ("matrix", "scalar"),
    "histogram_quantile": ("scalar", "vector"),
    "clamp_max": ("vector", "scalar"),
    "clamp_min": ("vector", "scalar"),
    "scalar": ("vector",),
    "vector": ("scalar",),
    "time": (),
}
_COMPARISONS = ("==", "!=", "<=", "<", ">=", ">")
# Loosest first; `^` is apart, for it binds to the right.
_LEVELS: tuple[tuple[str, ...], ...] = (("or",), ("and", "unless"), _COMPARISONS, ("+", "-"), ("*", "/", "%"))
_SET_OPERATORS = ("or", "and", "unless")
_MATCHES = ("=", "!=", "=~", "!~")


class PromQLError(ValueError):
    """An expression that Prometheus would refuse."""


@dataclass
class Query:
    """What an expression reads: metrics in order of appearance, and every label that it matches or groups by."""

    type: Type = "vector"
    metrics: list[str] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)


def parse(expression: str) -> Query:
    """Parses and checks one expression.

    Raises:
        PromQLError: with the offending token.
    """
    return _Parser(expression).whole()


class _Parser:
    def __init__(self, text: str):
        self._tokens = _tokens(text)
        self._at = 0
        self.query = Query()

    def whole(self) -> Query:
        self.query.type = self._binary(0)
        if self._kind is not None:
            raise PromQLError(f"unexpected {self._word!r} after the expression")
        return self.query

    # -- tokens ---------------------------------------------------------------------------------------

    @property
    def _kind(self) -> str | None:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else None

    @property
    def _word(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else "the end"

    def _take(self, *words: str) -> str | None:
        if self._kind in ("op", "name") and self._word in words:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return None

    def _need(self, word: str) -> None:
        if self._take(word) is None:
            raise PromQLError(f"expected {word!r}, found {self._word!r}")

    def _need_kind(self, kind: str) -> str:
        if self._kind != kind:
            raise PromQLError(f"expected a {kind}, found {self._word!r}")
        self._at += 1
        return self._tokens[self._at - 1][1]

    # -- operators ------------------------------------------------------------------------------------

    def _binary(self, level: int) -> Type:
        if level == len(_LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while (operator := self._take(*_LEVELS[level])) is not None:
            returns_bool = self._modifiers(operator)
            left = _combined(operator, left, self._binary(level + 1), returns_bool)
        return left

    def _unary(self) -> Type:
        if self._take("-", "+") is not None:
            return _numeric("a sign", self._unary())
        left = self._postfix()
        if self._take("^") is not None:
            returns_bool = self._modifiers("^")
            return _combined("^", left, self._unary(), returns_bool)
        return left

    def _modifiers(self, operator: str) -> bool:
        """`bool`, `on (...)`, `ignoring (...)`, `group_left (...)`; whether `bool` was there."""
        returns_bool = self._take("bool") is not None
        if returns_bool and operator not in _COMPARISONS:
            raise PromQLError(f"bool after {operator!r}, which does not compare")
        if self._take("on", "ignoring") is not None:
            self._labels()
            if self._take("group_left", "group_right") is not None:
                if operator in _SET_OPERATORS:
                    raise PromQLError(f"no grouping for {operator!r}")
                if self._word == "(":
                    self._labels()
        return returns_bool

    def _labels(self) -> None:
        self._need("(")
        while self._take(")") is None:
            self.query.labels.add(self._need_kind("name"))
            if self._word != ")":
                self._need(",")

    # -- operands -------------------------------------------------------------------------------------

    def _postfix(self) -> Type:
        found, plain = self._operand()
        if self._take("[") is not None:
            if found != "vector":
                raise PromQLError(f"a range of a {found}")
            self._need_kind("duration")
            if self._take(":") is not None:
                if self._kind == "duration":
                    self._at += 1
            elif not plain:
                raise PromQLError("a range of an expression needs a step: [5m:15s]")
            self._need("]")
            found = "matrix"
        if self._take("offset") is not None:
            self._take("-")
            self._need_kind("duration")
        return found

    def _operand(self) -> tuple[Type, bool]:
        """The operand's type, and whether it is a plain selector."""
        if self._kind in ("number", "string"):
            found: Type = "scalar" if self._kind == "number" else "string"
            self._at += 1
            return found, False
        if self._take("(") is not None:
            inner = self._binary(0)
            self._need(")")
            return inner, False
        if self._word == "{":
            raise PromQLError("a selector without a metric's name")
        name = self._need_kind("name")
        if name in _AGGREGATIONS:
            return self._aggregation(name), False
        if self._word == "(":
            return self._call(name), False
        self.query.metrics.append(name)
        if self._take("{") is not None:
            self._matchers()
        return "vector", True

    def _matchers(self) -> None:
        while self._take("}") is None:
            self.query.labels.add(self._need_kind("name"))
            how = self._take(*_MATCHES)
            if how is None:
                raise PromQLError(f"expected one of {_MATCHES}, found {self._word!r}")
            value = self._need_kind("string")[1:-1]
            if how in ("=~", "!~"):
                _check_regex(value)
            if self._word != "}":
                self._need(",")

    def _aggregation(self, name: str) -> Type:
        grouped = self._take("by", "without")
        if grouped:
            self._labels()
        arguments = self._arguments()
        if len(arguments) != _AGGREGATIONS[name] or arguments[-1] != "vector":
            raise PromQLError(f"{name} of {arguments}; it takes {_AGGREGATIONS[name]}, a vector last")
        if not grouped and self._take("by", "without"):
            self._labels()
        return "vector"

    def _call(self, name: str) -> Type:
        if name not in _FUNCTIONS:
            raise PromQLError(f"unknown function {name!r}")
        arguments = tuple(self._arguments())
        if arguments != _FUNCTIONS[name]:
            raise PromQLError(f"{name} of {arguments}; it takes {_FUNCTIONS[name]}")
        return "scalar" if name in ("scalar", "time") else "vector"

    def _arguments(self) -> list[Type]:
        self._need("(")
        found: list[Type] = []
        while self._take(")") is None:
            found.append(self._binary(0))
            if self._word != ")":
                self._need(",")
        return found


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise PromQLError(f"cannot read {text[at : at + 20]!r}")
        found.append((match.lastgroup, match.group(match.lastgroup)))
        at = match.end()
    if not found:
        raise PromQLError("empty")
    return found


def _numeric(what: str, found: Type) -> Type:
    if found not in ("scalar", "vector"):
        raise PromQLError(f"{what} of a {found}")
    return found


def _combined(operator: str, left: Type, right: Type, returns_bool: bool) -> Type:
    for side in (left, right):
        _numeric(repr(operator), side)
    both_scalars = left == right == "scalar"
    if operator in _SET_OPERATORS and not left == right == "vector":
        raise PromQLError(f"{operator!r} between {left} and {right}")
    if operator in _COMPARISONS and both_scalars and not returns_bool:
        raise PromQLError(f"two scalars compared by {operator!r} need bool")
    return "scalar" if both_scalars else "vector"


def _check_regex(value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise PromQLError(f"no regular expression: {value!r}: {error}") from error
