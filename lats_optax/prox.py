"""Proximal operators: pure functions ``(x, strength) -> z`` on arrays and pytrees.

An operator maps ``x`` to ``argmin_z 1/2 ||z - x||^2 + strength * penalty(z)``. Here belong the
operators, and for each of them the two facts that pruning needs to know: the *magnitude* of a
weight (the least strength that sends it to zero) and how to *lift* a weight to a point that the
operator sends there. Operators of groups by the terms of a layer are in `groups.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lats_optax import groups
from lats_optax.groups import GroupMagnitude, GroupOperator
from lats_optax.leaves import as_real, check_not_negative, over_leaves, positive_zero, widen


class Operator(Protocol):
    """A proximal operator: ``operator(x, strength)``, on one array or on a pytree."""

    def __call__(self, x: Any, strength: Any, /) -> Any:
        """Apply the operator."""


def prox_l1(x: Any, strength: Any = 1.0) -> Any:
    """Soft thresholding, the proximal operator of the L1 norm.

    ``S_d(x) = argmin_z 1/2 (z - x)^2 + d |z| = sign(x) max(|x| - d, 0)``

    Args:
      x: a real array, or a pytree of them.
      strength: d >= 0: a scalar, an array that broadcasts against each leaf, or a pytree of these
        that matches ``x`` (or is a prefix of it). In the units of ``x``.

    Returns:
      What ``x`` is, with its shapes and dtypes. Zeros are +0.0; NaN and infinity propagate as
      IEEE arithmetic has it (``inf - inf`` is NaN).

    Raises:
      ValueError: a strength given as a number is negative, or its structure or shape does not
        match.
      TypeError: ``x`` is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_l1(jnp.array([-3.0, -0.5, 0.5, 2.0]), 1.0)
      Array([-2.,  0.,  0.,  1.], dtype=float32)

    Source: Parikh and Boyd, "Proximal Algorithms" (2014), section 6.5.2.
    """
    return over_leaves(_soft_threshold, x, strength)


def prox_non_negative_l1(x: Any, strength: Any = 1.0) -> Any:
    """The proximal operator of the L1 norm restricted to the non-negative numbers.

    ``argmin_{z >= 0} 1/2 (z - x)^2 + d z = max(x - d, 0)``

    Args:
      x: a real array, or a pytree of them.
      strength: d >= 0, as in :func:`prox_l1`.

    Returns:
      What ``x`` is, with its shapes and dtypes; no entry is negative.

    Raises:
      ValueError: as :func:`prox_l1`.
      TypeError: as :func:`prox_l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_non_negative_l1(jnp.array([-3.0, 0.5, 2.0]), 1.0)
      Array([0., 0., 1.], dtype=float32)

    Source: Parikh and Boyd, "Proximal Algorithms" (2014), section 6.5.2.
    """
    return over_leaves(_non_negative, x, strength)


def prox_elastic_net(x: Any, strength: Any = 1.0, *, l2: float = 1.0) -> Any:
    """The proximal operator of the elastic net.

    ``argmin_z 1/2 (z - x)^2 + d (|z| + l2/2 z^2) = S_d(x) / (1 + d l2)``

    Args:
      x: a real array, or a pytree of them.
      strength: d >= 0, as in :func:`prox_l1`.
      l2: weight of the quadratic part relative to the L1 part, >= 0. With scikit-learn's
        ``alpha`` and ``l1_ratio``: ``d = alpha * l1_ratio``, ``l2 = (1 - l1_ratio) / l1_ratio``.

    Returns:
      What ``x`` is, with its shapes and dtypes.

    Raises:
      ValueError: as :func:`prox_l1`, and if ``l2`` is a negative number.
      TypeError: as :func:`prox_l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_elastic_net(jnp.array([-3.0, 0.5, 2.0]), 1.0, l2=1.0)
      Array([-1. ,  0. ,  0.5], dtype=float32)

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net" (2005).
    """
    check_not_negative("l2", l2)
    return over_leaves(_elastic_net, x, strength, l2=l2)


def prox_group_lasso(
    x: Any, strength: Any = 1.0, *, axes: int | Sequence[int] | None = None
) -> Any:
    """The proximal operator of the group lasso, block soft thresholding.

    For each group g of |g| weights:
    ``argmin_z 1/2 ||z - x_g||^2 + d sqrt|g| ||z|| = x_g max(1 - d sqrt|g| / ||x_g||, 0)``

    Args:
      x: a real array, or a pytree of them; each leaf has groups of its own.
      strength: d >= 0: a scalar, or an array that broadcasts against the leaf reduced over
        ``axes`` with these axes kept, or a pytree of these that matches ``x``.
      axes: the axes of a leaf that lie within one group; the remaining ones number the groups.
        Default: all but the last, which in Flax's layouts makes every output channel or unit a
        group.

    Returns:
      What ``x`` is, with its shapes and dtypes; whole groups are zero. Squares are summed as they
      are: in float32 a group whose norm is below about 1e-19 counts as zero.

    Raises:
      ValueError: as :func:`prox_l1`, and if a leaf lacks one of ``axes``.
      TypeError: as :func:`prox_l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[8.0, 0.5], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
      >>> prox_group_lasso(kernel, 1.0, axes=0)
      Array([[6., 0.],
             [0., 0.],
             [0., 0.],
             [0., 0.]], dtype=float32)

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables"
    (2006), equation 2.4.
    """
    return groups.Axes(axes)(x, strength)


def prox_l0(x: Any, strength: Any = 1.0) -> Any:
    """Hard thresholding, the proximal operator of the number of non-zeros.

    ``argmin_z 1/2 (z - x)^2 + d [z != 0] = x where |x| > sqrt(2 d), else 0``

    Args:
      x: a real array, or a pytree of them.
      strength: d >= 0, as in :func:`prox_l1`, in the units of ``x`` squared.

    Returns:
      What ``x`` is, with its shapes and dtypes. Of the two minimizers at ``|x| = sqrt(2 d)`` the
      sparse one.

    Raises:
      ValueError: as :func:`prox_l1`.
      TypeError: as :func:`prox_l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_l0(jnp.array([-3.0, 1.0, 2.0]), 0.5)
      Array([-3.,  0.,  2.], dtype=float32)

    Source: Blumensath and Davies, "Iterative thresholding for sparse approximations" (2008).
    """
    return over_leaves(_hard_threshold, x, strength)


# --- what pruning needs to know of an operator ------------------------------------------------


class Rule(NamedTuple):
    """The magnitude and the lift of an operator, with the operator's own keyword arguments."""

    magnitude: Callable[..., jax.Array] | None
    lift: Callable[..., jax.Array]


def register(
    operator: Operator,
    *,
    magnitude: Callable[..., jax.Array] | None = None,
    lift: Callable[..., jax.Array] | None = None,
) -> None:
    """Tell the library what it needs to know of an operator of your own.

    Args:
      operator: the function that is given as ``operator=``, perhaps within a
        ``functools.partial`` whose keywords are then passed on to the two functions below.
      magnitude: ``magnitude(x)``: for each entry of an array the least strength that sends it to
        zero, in the shape of ``x``. ``target_sparsity`` takes its quantile; without it, naming a
        sparsity is an error.
      lift: ``lift(w, strength)``: an x with ``operator(x, strength) == w``, where there is one.
        It gives the first latent weights under a threshold that does not begin at zero. Default:
        the weights themselves.

    Example:
      >>> import jax.numpy as jnp
      >>> def prox_box(x, strength):
      ...     return jnp.where(jnp.abs(x) <= strength, 0.0, x)
      >>> register(prox_box, magnitude=jnp.abs)
      >>> magnitude(prox_box)(jnp.array([-2.0, 1.0]))
      Array([2., 1.], dtype=float32)
    """
    _RULES[operator] = Rule(magnitude, lift or _keep)


def magnitude(operator: Operator) -> Callable[[jax.Array], jax.Array]:
    """The function that gives, for each weight, the least strength that sends it to zero.

    Args:
      operator: one of this module's operators, a ``functools.partial`` of one, or an operator
        that was given to :func:`register`.

    Returns:
      A function of one array that returns an array of the same shape, at least float32: in the
      precision in which the operators compare with the strength.

    Raises:
      ValueError: nothing is known of the operator.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> by_column = functools.partial(prox_group_lasso, axes=0)
      >>> magnitude(by_column)(jnp.array([[8.0], [0.0], [0.0], [0.0]]))
      Array([[4.],
             [4.],
             [4.],
             [4.]], dtype=float32)
    """
    rule, keywords = _rule(operator)
    if isinstance(rule, GroupOperator):
        return GroupMagnitude(rule)
    if rule.magnitude is None:
        raise ValueError(
            f"operator: the magnitude of a weight under {operator!r} is not known, so no sparsity "
            "can be named; tell it with lats_optax.prox.register(operator, magnitude=...)"
        )
    least = functools.partial(rule.magnitude, **keywords)
    # A magnitude rounded to sixteen bits would name a threshold that misses the weight it is of.
    return lambda x: least(widen(as_real(x)))


def lift(operator: Operator) -> Callable[[jax.Array, Any], jax.Array]:
    """The function ``(w, strength) -> x`` with ``operator(x, strength) == w`` where possible.

    ``w + d sign(w)`` for :func:`prox_l1`: the first latent weights when the threshold does not
    begin at zero.

    Args:
      operator: any operator; for one of which nothing is known the weights are left as they are.

    Returns:
      A function of an array and a scalar that returns an array of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> lift(prox_l1)(jnp.array([-1.0, 0.0, 2.0]), 0.5)
      Array([-1.5,  0. ,  2.5], dtype=float32)
    """
    rule, keywords = _rule(operator)
    if isinstance(rule, GroupOperator):
        return rule.lift
    return functools.partial(rule.lift, **keywords)


# --- one array ----------------------------------------------------------------------------------


def _soft_threshold(x: jax.Array, d: jax.Array) -> jax.Array:
    # A comparison, not max(): NaN fails it and passes on. Two selections are cheaper than sign().
    return jnp.where(jnp.abs(x) - d <= 0, 0.0, jnp.where(x > 0, x - d, x + d))


def _non_negative(x: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.where(x - d <= 0, 0.0, x - d)


def _elastic_net(x: jax.Array, d: jax.Array, *, l2: float) -> jax.Array:
    shrunk = _soft_threshold(x, d)
    # An infinite d times an l2 of zero has no value; a zero needs no division.
    return jnp.where(shrunk == 0, 0.0, positive_zero(shrunk / (1 + d * l2)))


def _hard_threshold(x: jax.Array, d: jax.Array) -> jax.Array:
    kept = jnp.where(jnp.isnan(d), d, x)
    return jnp.where(_hard_magnitude(x) <= d, 0.0, kept)


# --- magnitudes and lifts -----------------------------------------------------------------------


def _elastic_magnitude(x: jax.Array, *, l2: float = 1.0) -> jax.Array:
    del l2
    return jnp.abs(x)


def _elastic_lift(w: jax.Array, d: Any, *, l2: float = 1.0) -> jax.Array:
    return w * (1 + d * l2) + d * jnp.sign(w)


def _non_negative_magnitude(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _hard_magnitude(x: jax.Array) -> jax.Array:
    # A square that underflows is still that of a weight which a strength of zero leaves alone.
    tiny = jnp.finfo(x.dtype).tiny  # type: ignore[no-untyped-call]
    return jnp.where(x == 0, 0.0, jnp.maximum(jnp.square(x) / 2, tiny))


def _keep(w: jax.Array, d: Any, **_: Any) -> jax.Array:
    del d
    return jnp.array(w)


_RULES: dict[Any, Rule] = {
    prox_l1: Rule(jnp.abs, lambda w, d: w + d * jnp.sign(w)),
    prox_non_negative_l1: Rule(
        _non_negative_magnitude, lambda w, d: w + jnp.where(w > 0, d, jnp.zeros_like(d))
    ),
    prox_elastic_net: Rule(_elastic_magnitude, _elastic_lift),
    prox_l0: Rule(_hard_magnitude, _keep),
}


def _rule(operator: Operator) -> tuple[Rule | GroupOperator, dict[str, Any]]:
    keywords: dict[str, Any] = {}
    function: Any = operator
    while isinstance(function, functools.partial):
        keywords = {**function.keywords, **keywords}
        function = function.func
    if function is prox_group_lasso:
        function = groups.Axes(**keywords)
    if isinstance(function, GroupOperator):
        return function, {}
    return _RULES.get(function, Rule(None, _keep)), keywords
