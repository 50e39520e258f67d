"""Vision transformers: ViT-Ti, ViT-S and ViT-B, with the class token and learned positions.

Here belong the encoder's block and its two parts, and the network that cuts images into patches.
"""

import math
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lats_optax.checks.options import check, check_choice
from lats_optax.models.layers import Network, check_images

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
"""Size -> channels of a token, and attention heads."""

# Beyond all published ones: deeper networks are a slip of the keyboard.
_DEEPEST = 100

# Xavier-uniform. Queries, keys and values lie in one kernel and are drawn as the square matrices
# that they are, for which the bound is that of fan-in alone: √(3 / inputs).
_XAVIER = nn.initializers.xavier_uniform()
_SQUARE = nn.initializers.lecun_uniform()


class Attention(nn.Module):
    """Multi-head self-attention: ``proj(softmax(q kᵀ / √d) v)`` of each head, d features wide.

    The one kernel of ``qkv``, (channels, 3 · channels), has all queries first, then all keys, then
    all values, each of them head by head.

    Attributes:
      heads: how many there are; they divide the channels.
      dtype: of the computation; the softmax is in float32 at least.

    Example:
      >>> import jax
      >>> x = jnp.ones((2, 5, 12))
      >>> params = jax.eval_shape(Attention(heads=3).init, jax.random.key(0), x)["params"]
      >>> params["qkv"]["kernel"].shape, params["proj"]["kernel"].shape
      ((12, 36), (12, 12))

    Source: Vaswani et al., "Attention Is All You Need" (NeurIPS 2017), section 3.2.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (batch, tokens, channels) to the same."""
        batch, tokens, channels = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_SQUARE)
        projected = dense(3 * channels, name="qkv")(x)
        each = (batch, tokens, 3, self.heads, channels // self.heads)
        queries, keys, values = jnp.moveaxis(projected.reshape(each), 2, 0)
        # The softmax of `jax.nn.dot_product_attention` is in float32 where the rest is in float64.
        at_least = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=at_least)
        weights = nn.softmax(scores / math.sqrt(queries.shape[-1])).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
        return dense(channels, name="proj")(mixed.reshape(x.shape))


class MLP(nn.Module):
    """``fc2(gelu(fc1(x)))``, with the exact GELU, ``x Φ(x)``.

    Attributes:
      hidden: hidden units.
      dtype: of the computation.

    Example:
      >>> import jax
      >>> init = MLP(hidden=48).init_with_output
      >>> jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 5, 12)))[0].shape
      (2, 5, 12)
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (…, channels) to the same."""
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_XAVIER)
        hidden = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        return dense(x.shape[-1], name="fc2")(hidden)


class Block(nn.Module):
    """A block of the encoder: ``h = x + attn(norm1(x))``, ``y = h + mlp(norm2(h))``.

    Attributes:
      heads: attention heads.
      hidden: hidden units of the MLP.
      dtype: of the computation.

    Example:
      >>> import jax
      >>> init = Block(heads=3, hidden=48).init
      >>> params = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 5, 12)))["params"]
      >>> sorted(params)
      ['attn', 'mlp', 'norm1', 'norm2']

    Source: Dosovitskiy et al. (ICLR 2021), equations 2 and 3.
    """

    heads: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (batch, tokens, channels) to the same."""
        x = x + Attention(self.heads, self.dtype, name="attn")(_norm("norm1", self.dtype)(x))
        return x + MLP(self.hidden, self.dtype, name="mlp")(_norm("norm2", self.dtype)(x))


class VisionTransformer(Network, kw_only=True):
    """ViT-Ti, ViT-S or ViT-B: patches as tokens, a class token, and the blocks of an encoder.

    A convolution maps each patch to a token; the class token comes first; learned positions are
    added; after the blocks and a last norm, the class token alone is classified. The table of
    positions has the size that the images have at initialization, and images of other sizes are an
    error after that. There are no batch statistics, and ``train`` changes nothing.

    Weights are drawn as in the paper's code: kernels Xavier-uniform, patches as Flax draws a
    convolution, positions normal at 0.02, the class token zero. The classifier, which is zero
    there, is drawn normal at 0.02: zeros would count as pruned.

    Attributes:
      size: ``"tiny"``, ``"small"`` or ``"base"``: 192, 384 or 768 channels, 3, 6 or 12 heads.
      depth: how many blocks there are.
      patch_size: height and width of a patch, in pixels.
      width: multiplier of the channels; the number of heads stays, so 0.5 halves their features.
      features: hidden units of the MLPs, by paths such as ``block1/mlp/fc1``; others of `Network`.

    Raises:
      ValueError: another size; ``depth`` or ``patch_size`` < 1; a width of whose channels the heads
        have no equal part; as `Network`; images are not (batch, height, width, channels) of whole
        patches, or of other sizes than at initialization.

    Example:
      >>> import jax
      >>> model = VisionTransformer(size="small", num_classes=1000)
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 224, 224, 3)))
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 1000), 22050664)

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition
    at Scale" (ICLR 2021); the sizes Ti and S are those of Touvron et al., "Training data-efficient
    image transformers & distillation through attention" (ICML 2021).
    """

    size: str
    depth: int = 12
    patch_size: int = 16
    classifier_bias: bool = True

    narrowest: ClassVar[int] = 192

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check_choice("size", self.size, SIZES)
        deep = _whole(self.depth) and 1 <= self.depth <= _DEEPEST
        check(deep, "depth", self.depth, f"1 to {_DEEPEST}")
        patches = _whole(self.patch_size) and self.patch_size >= 1
        check(patches, "patch_size", self.patch_size, "1 or more")
        super().__post_init__()
        channels, heads = SIZES[self.size]
        allowed = f"those at which its {heads} heads divide the channels, {channels} at width 1"
        check(self.channels(channels) % heads == 0, "width", self.width, allowed)

    @nn.nowrap
    def plan(self) -> dict[str, int]:
        """Hidden units of each block: four times the channels.

        >>> VisionTransformer(size="tiny", depth=2, num_classes=10).plan()
        {'block1/mlp/fc1': 768, 'block2/mlp/fc1': 768}
        """
        hidden = 4 * self.channels(SIZES[self.size][0])
        return {f"block{index}/mlp/fc1": hidden for index in range(1, self.depth + 1)}

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        del train
        check_images(images, least=self.patch_size)
        self._check_patches(images)
        width, heads = SIZES[self.size]
        x = nn.Conv(
            self.channels(width),
            (self.patch_size, self.patch_size),
            (self.patch_size, self.patch_size),
            padding="VALID",
            dtype=self.dtype,
            name="patch_embed",
        )(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        batch, patches, channels = x.shape
        normal = nn.initializers.normal(0.02)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, channels), jnp.float32)
        positions = self.param("pos_embed", normal, (1, 1 + patches, channels), jnp.float32)
        first = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, channels))
        x = jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)
        for layer, hidden in self.channels_of().items():
            name = layer.removesuffix("/mlp/fc1")
            x = Block(heads, hidden, self.dtype, name=name)(x)
        x = _norm("norm", self.dtype)(x[:, 0])
        return self.logits(x, normal)

    @nn.nowrap
    def _check_patches(self, images: Array) -> None:
        if any(size % self.patch_size for size in images.shape[1:3]):
            raise ValueError(
                f"images have shape {images.shape}; allowed: height and width that are multiples "
                f"of patch_size, {self.patch_size}."
            )
        rows, columns = (size // self.patch_size for size in images.shape[1:3])
        if self.has_variable("params", "pos_embed"):
            known = self.get_variable("params", "pos_embed").shape[1] - 1
            if known != rows * columns:
                raise ValueError(
                    f"images have shape {images.shape}, {rows * columns} patches; allowed: {known} "
                    "patches, for which the model has positions."
                )


def _norm(name: str, dtype: DTypeLike) -> nn.LayerNorm:
    # The variance from the mean of squares would be faster, and less exact than PyTorch's.
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
