"""Recipes of low-precision training, as data: how each operand of the three GEMMs is cast."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

from qjax.formats import FORMATS
from qjax.recipes import ROUTER
from qjax.sites import Site

SCALES = ("current", "delayed", "power_of_two", "nvfp4")


class Cast(NamedTuple):
    """How one operand of a GEMM becomes codes and scales.

    Attributes:
      format: a row of `FORMATS` of one plane, such as "fp8_e4m3".
      block: elements that share a scale. `()`: the whole tensor; `None`: all contracted ones (a
        row); an int: neighbors along the innermost contracted axis; `(c, f)`: tiles of the
        innermost contracted and the last other axis.
      scale: "current" (amax of the block / largest code), "delayed" (the same from the largest amax
        of earlier steps, whole tensors only), "power_of_two" (MX: E8M0, rounded up so that nothing
        saturates), "nvfp4" (E4M3 scales of blocks under one float32 of the tensor).
      stochastic: round up with the probability of the remainder in place of to nearest.
      hadamard: first rotate neighbors along the contraction, 16 at a time, by one fixed random
        Hadamard matrix; both operands of a GEMM must do so, and the rotations cancel.
    """

    format: str
    block: tuple[int, ...] | int | None = ()
    scale: str = "current"
    stochastic: bool = False
    hadamard: bool = False


Pair = tuple[Cast | None, Cast | None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What runs in which precision; a named one is the start of your own (`dataclasses.replace`).

    Attributes:
      name: what it is called in listings.
      output: casts of (x, w) in y = x @ w; `None` in place of a Cast leaves an operand as it is.
      input_grad: casts of (g, w) in the gradient of x.
      weight_grad: casts of (x, g) in the gradient of w.
      overrides: (regular expression, recipe, its name or `None` for dense) pairs; the first whose
        expression matches the whole path of a parameter decides, before the defaults below.
      keep_head: whether the last matmul with a parameter runs dense, if there are others.
      keep_first, keep_last: how many numbered layers ("layers_0", "blocks/11") run dense at either
        end. Layers that a scan iterates over are one, and none of them is kept.
      history: steps that delayed scaling remembers.
      margin: delayed scales leave room for amax * 2^margin.

    Looked-up tables (tied heads included) and parameters of a "router" run dense unless overridden.

    Example:
      >>> ours = dataclasses.replace(RECIPES["current"], overrides=((".*/down/kernel", "rowwise"),))
      >>> ours.output[1]
      Cast(format='fp8_e4m3', block=(), scale='current', stochastic=False, hadamard=False)
    """

    name: str
    output: Pair
    input_grad: Pair
    weight_grad: Pair
    overrides: "tuple[tuple[str, Recipe | str | None], ...]" = ()
    keep_head: bool = True
    keep_first: int = 0
    keep_last: int = 0
    history: int = 1024
    margin: int = 0

    def __post_init__(self) -> None:
        where = f"recipe {self.name!r}"
        for gemm in ("output", "input_grad", "weight_grad"):
            pair = getattr(self, gemm)
            for how in pair:
                if how is not None:
                    _check(how, f"{where}, {gemm}")
            if len({how is not None and how.hadamard for how in pair}) > 1:
                raise ValueError(
                    f"{where}, {gemm}: a rotation cancels only if both operands are rotated; set "
                    "hadamard in both casts or in none"
                )
        for how in (self.output[1], self.input_grad[1]):
            if how is not None and (how.stochastic or how.hadamard):
                raise ValueError(
                    f"{where}: weights are cast once for all their uses, to nearest and unrotated; "
                    "only x and g may set stochastic, and hadamard in weight_grad"
                )
        if self.history < 1:
            raise ValueError(f"{where}: history must be at least 1 step, is {self.history}")
        for pattern, _ in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{where}: override {pattern!r} is no regular expression: {error}"
                ) from error

    @property
    def delayed(self) -> bool:
        """Whether any cast takes its scale from earlier steps."""
        pairs = (*self.output, *self.input_grad, *self.weight_grad)
        return any(how is not None and how.scale == "delayed" for how in pairs)

    @staticmethod
    def of(recipe: "Recipe | str") -> "Recipe":
        """The named recipe; a Recipe passes through.

        Raises:
          ValueError: listing the names, if there is none like it.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if recipe not in RECIPES:
            near = difflib.get_close_matches(str(recipe), RECIPES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"no recipe {recipe!r}{hint}; the recipes are {', '.join(RECIPES)}")
        return RECIPES[recipe]


def _check(how: Cast, where: str) -> None:
    if how.format not in FORMATS or not isinstance(FORMATS[how.format].storage, str):
        known = ", ".join(n for n, f in FORMATS.items() if isinstance(f.storage, str))
        raise ValueError(f"{where}: format {how.format!r} cannot be trained in; choose of {known}")
    if how.scale not in SCALES:
        raise ValueError(f"{where}: scale {how.scale!r} is none of {', '.join(SCALES)}")
    if how.scale == "delayed" and (how.block != () or FORMATS[how.format].integer):
        raise ValueError(f"{where}: delayed scaling is for whole tensors (block=()) in FP8")


def _three(x: Cast | None, w: Cast | None, g: Cast | None, wgrad: Pair | None = None) -> dict:
    """One cast per tensor, whichever GEMM it enters."""
    return {
        "output": (x, w),
        "input_grad": (g, w),
        "weight_grad": (x, g) if wgrad is None else wgrad,
    }


_E4M3, _E5M2 = Cast("fp8_e4m3"), Cast("fp8_e5m2")
_ROW = Cast("fp8_e4m3", None)
_TILE = Cast("fp8_e4m3", 128)  # 1x128 along the contraction
_MX = Cast("mxfp8", 32, "power_of_two")
_NV = Cast("nvfp4", 16, "nvfp4")
_later = lambda how: how._replace(scale="delayed")
_noisy = lambda how: how._replace(stochastic=True)
_turned = lambda how: how._replace(hadamard=True)

# Sources: TransformerEngine (current, delayed: E4M3 forward, E5M2 gradients), torchao float8
# (rowwise, E4M3 throughout), DeepSeek-V3 (block, arXiv:2412.19437, section 3.3), MXFP8
# (arXiv:2506.08027: E4M3 throughout, scales rounded up), NVFP4 (arXiv:2509.25149: 2-D weight
# scales, rotated weight-gradient inputs, stochastic rounding of gradients, ends dense).
RECIPES: Mapping[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("current", **_three(_E4M3, _E4M3, _E5M2)),
        Recipe("delayed", **_three(_later(_E4M3), _later(_E4M3), _later(_E5M2))),
        Recipe("rowwise", **_three(_ROW, _ROW, _ROW)),
        Recipe("rowwise_high_precision_wgrad", **_three(_ROW, _ROW, _ROW, (None, None))),
        Recipe("block", **_three(_TILE, _TILE._replace(block=(128, 128)), _TILE)),
        Recipe("mxfp8", **_three(_MX, _MX, _MX)),
        Recipe(
            "nvfp4",
            **_three(
                _NV,
                _NV._replace(block=(16, 16)),
                _noisy(_NV),
                (_turned(_NV), _turned(_noisy(_NV))),
            ),
            keep_first=1,
            keep_last=1,
        ),
        Recipe(
            "int8", **_three(Cast("int8", None), Cast("int8", None), _noisy(Cast("int8", None)))
        ),
    )
}


class Use(NamedTuple):
    """One use of a parameter: where its state is held, and the recipe it runs in.

    Attributes:
      key: the parameter's path; from its second use on with "#2", "#3", ... behind it.
      site: which axes the use contracts.
      shape: of the parameter.
      recipe: `None` for dense.
      why: the reason, where it runs dense.
    """

    key: str
    site: Site
    shape: tuple[int, ...]
    recipe: Recipe | None
    why: str

    @property
    def stacked(self) -> tuple[int, ...]:
        """The lengths of the axes that scans iterate over."""
        return tuple(self.shape[a] for a in self.site.stacked_axes)


_MATMULS = ("dot_general", "ragged_dot_general")


def plan(
    sites: Mapping[str, Site], shapes: Mapping[str, tuple[int, ...]], recipe: Recipe
) -> tuple[Use, ...]:
    """What becomes of each site, by key, in program order.

    Raises:
      ValueError: if an override matches no parameter, or no matmul would run in the recipe.
    """
    for pattern, _ in recipe.overrides:
        if not any(re.fullmatch(pattern, s.path) for s in sites.values()):
            known = ", ".join(dict.fromkeys(s.path for s in sites.values()))
            raise ValueError(
                f"override {pattern!r} of recipe {recipe.name!r} matches no parameter with a "
                f"matmul or lookup; these have: {known or 'none'}"
            )
    matmuls = [s for s in sites.values() if s.primitive in _MATMULS]
    context = _Context(
        frozenset(s.path for s in sites.values() if s.primitive == "gather"),
        matmuls[-1].path if len({s.path for s in matmuls}) > 1 else None,
        _layers([s.path for s in matmuls]),
    )
    uses = []
    for key, site in sites.items():
        chosen, why = _decide(site, recipe, context)
        uses.append(Use(key, site._replace(input_key=""), shapes[site.path], chosen, why))
    if not any(u.recipe is not None for u in uses):
        seen = "; ".join(f"{u.key}: {u.why}" for u in uses)
        raise ValueError(
            f"no matmul of the loss function would run in recipe {recipe.name!r}: "
            f"{seen or 'it uses no array of its first argument in a matmul'}"
        )
    return tuple(uses)


class _Context(NamedTuple):
    gathered: frozenset[str]
    head: str | None
    layers: dict[str, list[int]]  # what stands before a layer's number: the numbers


_NUMBER = re.compile(r"^(.*?[^0-9])([0-9]+)(?=/)")


def _layers(paths: list[str]) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {}
    for path in paths:
        if match := _NUMBER.match(path):
            found.setdefault(match[1], set()).add(int(match[2]))
    return {prefix: sorted(numbers) for prefix, numbers in found.items()}


def _decide(site: Site, recipe: Recipe, context: _Context) -> tuple[Recipe | None, str]:
    if site.primitive not in _MATMULS:
        return None, f"{site.primitive} runs dense"
    for pattern, chosen in recipe.overrides:
        if re.fullmatch(pattern, site.path):
            why = f"override {pattern!r}" if chosen is None else ""
            return None if chosen is None else Recipe.of(chosen), why
    if site.path in context.gathered:
        return None, "kept: it is looked up as well"
    if re.fullmatch(ROUTER, site.path):
        return None, "kept: a router"
    if recipe.keep_head and site.path == context.head:
        return None, "kept: the last matmul"
    if match := _NUMBER.match(site.path):
        numbers = context.layers[match[1]]
        first, last = numbers[: recipe.keep_first], numbers[len(numbers) - recipe.keep_last :]
        if int(match[2]) in (*first, *last):
            return None, "kept: a first or last layer"
    return recipe, ""
