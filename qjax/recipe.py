"""Recipe: which parameter gets what, as data."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from qjax.algorithms.base import Algorithm
from qjax.sites import Site
from qjax.spec import Spec


def is_gathered(sites: Sequence[Site]) -> bool:
    """Whether a parameter is looked up somewhere: embedding tables, tied heads included.

    For `Rule(..., where=is_gathered)`.
    """
    return any(site.primitive == "gather" for site in sites)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the parameters whose path matches become.

    Attributes:
      pattern: a regular expression that the whole path must match.
      spec: a Spec or its string; `None` leaves the parameter as it is.
      algorithm: how codes are chosen, such as `qjax.gptq()`; `None` rounds to nearest.
      where: a predicate on the parameter's sites that must hold too.
      axis: the contracted axis or axes, in place of what the sites say; needed where there are no
        sites.
      optional: whether the rule may match nothing at all; otherwise that is an error.

    Example:
      >>> qjax.Rule(r".*/down/kernel", "int8").spec.format
      'int8'
    """

    pattern: str
    spec: Spec | str | None
    algorithm: Algorithm | None = None
    where: Callable[[Sequence[Site]], bool] | None = dataclasses.field(default=None, kw_only=True)
    axis: int | tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)
    optional: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"rule pattern {self.pattern!r} is no regular expression: {error}"
            ) from error
        if self.spec is not None:
            object.__setattr__(self, "spec", Spec.parse(self.spec))
        if self.algorithm is not None:
            if not isinstance(self.algorithm, Algorithm):
                raise ValueError(
                    f"rule {self.pattern!r}: the algorithm must be what a factory such as "
                    f"qjax.gptq() returns, got {self.algorithm!r}"
                )
            if self.spec is None:
                raise ValueError(
                    f"rule {self.pattern!r} keeps what it matches (spec None), so "
                    f"{self.algorithm.name} has nothing to do; give it a spec"
                )

    def matches(self, path: str, sites: Sequence[Site]) -> bool:
        return re.fullmatch(self.pattern, path) is not None and (
            self.where is None or self.where(sites)
        )


class Recipe:
    """Rules in order; the first that matches a parameter decides.

    A bare Spec or spec string in place of a Recipe means: every parameter that a matmul uses gets
    it, except tables that are looked up (embeddings, tied heads), which are kept.

    Example:
      >>> keep_tables = qjax.Rule(r".*", None, where=qjax.is_gathered)
      >>> recipe = qjax.Recipe(keep_tables, qjax.Rule(r".*", "int4_g128"))
      >>> len(recipe.rules)
      2
    """

    def __init__(self, *rules: Rule) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ValueError(
                    f"a Recipe is made of Rules, got {rule!r}; write Rule(pattern, spec)"
                )
        self.rules = rules

    def __repr__(self) -> str:
        return f"Recipe({', '.join(map(repr, self.rules))})"

    @classmethod
    def of(cls, recipe: "Recipe | Spec | str") -> "Recipe":
        """A Recipe as it is; a Spec or its string as the recipe that it abbreviates."""
        if isinstance(recipe, Recipe):
            return recipe
        return cls(Rule(".*", None, where=is_gathered, optional=True), Rule(".*", recipe))

    def rule_for(self, path: str, sites: Sequence[Site]) -> Rule | None:
        """The first rule that matches, or None."""
        return next((rule for rule in self.rules if rule.matches(path, sites)), None)
