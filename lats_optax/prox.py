"""Proximal operators: pure functions ``(x, strength) -> z`` on arrays and pytrees.

An operator maps ``x`` to ``argmin_z 1/2 ||z - x||^2 + strength * penalty(z)``. Here belong the
operators, and for each of them the two facts that pruning needs to know: the *magnitude* of a
weight (the least strength that sends it to zero) and how to *lift* a weight to a point that the
operator sends there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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
    return _over_leaves(_soft_threshold, x, strength)


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
    return _over_leaves(_non_negative, x, strength)


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
    _check_not_negative("l2", l2)
    return _over_leaves(_elastic_net, x, strength, l2=l2)


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
    return _over_leaves(_group_lasso, x, strength, axes=axes)


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
    return _over_leaves(_hard_threshold, x, strength)


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
    if rule.magnitude is None:
        raise ValueError(
            f"operator: the magnitude of a weight under {operator!r} is not known, so no sparsity "
            "can be named; tell it with lats_optax.prox.register(operator, magnitude=...)"
        )
    least = functools.partial(rule.magnitude, **keywords)
    # A magnitude rounded to sixteen bits would name a threshold that misses the weight it is of.
    return lambda x: least(_widen(_as_real(x)))


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
    return jnp.where(shrunk == 0, 0.0, _positive_zero(shrunk / (1 + d * l2)))


def _group_lasso(x: jax.Array, d: jax.Array, *, axes: int | Sequence[int] | None) -> jax.Array:
    # The magnitude itself is compared with d, so that a threshold taken from the magnitudes prunes
    # the group that it was taken from.
    rms = _group_rms(x, axes)
    _check_broadcasts(d, rms.shape)
    excess = rms - d
    # (rms - d) / rms keeps its sign where 1 - d / rms would round to zero; where rms is infinite
    # only the latter has a value.
    safe = jnp.where(rms == 0, 1.0, rms)
    kept = jnp.where(jnp.isinf(rms), 1 - d / safe, excess / safe)
    return jnp.where(excess <= 0, 0.0, _positive_zero(x * kept))


def _hard_threshold(x: jax.Array, d: jax.Array) -> jax.Array:
    kept = jnp.where(jnp.isnan(d), d, x)
    return jnp.where(_hard_magnitude(x) <= d, 0.0, kept)


def _group_rms(x: jax.Array, axes: int | Sequence[int] | None) -> jax.Array:
    """The root mean square of each group, ``||x_g|| / sqrt|g|``, its axes kept."""
    axes = _group_axes(x.ndim, axes)
    squares = jnp.mean(jnp.square(x), axis=axes, keepdims=True)
    # The square root has no derivative at zero; a zero group stays where it is.
    return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))


def _group_axes(ndim: int, axes: int | Sequence[int] | None) -> tuple[int, ...]:
    if axes is None:
        return tuple(range(ndim - 1))
    axes = tuple(np.atleast_1d(axes).tolist())
    for axis in axes:
        if not (isinstance(axis, int) and -ndim <= axis < ndim):
            raise ValueError(f"axes: {axis} is not an axis of a leaf with {ndim} dimensions")
    if len({axis % ndim for axis in axes}) != len(axes):
        raise ValueError(f"axes: {axes} names an axis of a leaf with {ndim} dimensions twice")
    return tuple(axis % ndim for axis in axes)


# --- magnitudes and lifts -----------------------------------------------------------------------


def _group_magnitude(x: jax.Array, *, axes: int | Sequence[int] | None = None) -> jax.Array:
    return jnp.broadcast_to(_group_rms(x, axes), x.shape)


def _group_lift(w: jax.Array, d: Any, *, axes: int | Sequence[int] | None = None) -> jax.Array:
    rms = _group_rms(w, axes)
    return jnp.where(rms == 0, w, w * (1 + d / jnp.where(rms == 0, 1.0, rms)))


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
    prox_group_lasso: Rule(_group_magnitude, _group_lift),
    prox_l0: Rule(_hard_magnitude, _keep),
}


def _rule(operator: Operator) -> tuple[Rule, dict[str, Any]]:
    keywords: dict[str, Any] = {}
    function: Any = operator
    while isinstance(function, functools.partial):
        keywords = {**function.keywords, **keywords}
        function = function.func
    return _RULES.get(function, Rule(None, _keep)), keywords


# --- pytrees ------------------------------------------------------------------------------------


def _over_leaves(function: Callable[..., jax.Array], x: Any, strength: Any, **keywords: Any) -> Any:
    for leaf in jax.tree.leaves(strength):
        _check_not_negative("strength", leaf)

    def one(leaf: Any, d: Any) -> jax.Array:
        leaf = _as_real(leaf)
        # Sixteen-bit weights are thresholded in float32, so that d is not rounded to their grid.
        wide = _widen(leaf)
        d = jnp.asarray(d, wide.dtype)
        _check_broadcasts(d, leaf.shape)
        z = function(wide, d, **keywords)
        return z if z.dtype == leaf.dtype else _positive_zero(z.astype(leaf.dtype))

    try:
        strengths = jax.tree.broadcast(strength, x)
    except ValueError as error:
        raise ValueError(
            f"strength: the structure {jax.tree.structure(strength)} is neither a scalar nor that "
            f"of x, {jax.tree.structure(x)}"
        ) from error
    return jax.tree.map(one, x, strengths)


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which weights of a float dtype are compared with a threshold."""
    # promote_types would refuse sixteen-bit types under strict promotion.
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def _as_real(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x: {x.dtype} is complex; proximal operators take real arrays")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def _positive_zero(z: jax.Array) -> jax.Array:
    # What underflows, in a product or in a cast, may have become -0.0. The difference is +0.0 and
    # has the derivative of z, which a zero within a living group needs.
    return jnp.where(z == 0, z - lax.stop_gradient(z), z)


def _check_broadcasts(d: jax.Array, shape: tuple[int, ...]) -> None:
    try:
        fits = np.broadcast_shapes(d.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"strength: its shape {d.shape} does not broadcast against {shape}")


def _check_not_negative(name: str, value: Any) -> None:
    # Only what is on the host: a device array may be traced, and reading it would block.
    if isinstance(value, int | float | np.ndarray | np.generic) and np.any(np.asarray(value) < 0):
        raise ValueError(f"{name}: {value} is negative; allowed are numbers >= 0")
