"""BERT as a sentence encoder: a transformer whose outputs are averaged to one unit vector a sentence.

A post-norm transformer encoder (Devlin et al. 2019, arXiv:1810.04805): with x the sum of the embeddings of
token, position and segment, normalised, every layer computes

    x <- norm(x + attention(x)),    x <- norm(x + down(gelu(up(x))))

The embedding of a sentence is the mean of x over its tokens, divided by its norm (Reimers and Gurevych 2019,
arXiv:1908.10084). `load_sentence_encoder` reads the folder of such a model from safetensors.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlimit.models.torch_state import State, read_safetensors

PADDING = 0
# What `load_sentence_encoder` understands of a configuration; anything else is another network.
REQUIRED = {"model_type": "bert", "hidden_act": "gelu"}


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(width / heads)) v over the tokens of a sentence, head by head; four dense layers.

    Args:
        width: of the model, a multiple of num_heads.
        num_heads: heads.
        rngs: random keys for the kernels.
    """

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, hidden: jax.Array, present: jax.Array) -> jax.Array:
        """(batch, positions, width) to the same shape; present: (batch, positions), False at padding."""
        heads = (*hidden.shape[:2], self.num_heads, -1)
        query, key, value = (f(hidden).reshape(heads) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bihd,bjhd->bhij", query, key) / np.sqrt(query.shape[-1])
        scores = jnp.where(present[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhij,bjhd->bihd", nnx.softmax(scores), value)
        return self.out(mixed.reshape(*hidden.shape[:2], -1))


class EncoderLayer(nnx.Module):
    """norm(x + attention(x)), then norm(x + down(gelu(up(x)))).

    Args:
        width: of the model.
        num_heads: heads of the attention.
        inner: width between `up` and `down`.
        epsilon: of the normalisation.
        rngs: random keys for the kernels.
    """

    def __init__(self, width: int, num_heads: int, inner: int, epsilon: float, *, rngs: nnx.Rngs):
        self.attention = Attention(width, num_heads, rngs=rngs)
        self.attention_norm = _norm(width, epsilon, rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.norm = _norm(width, epsilon, rngs)

    def __call__(self, hidden: jax.Array, present: jax.Array) -> jax.Array:
        """(batch, positions, width) to the same shape; present: (batch, positions), False at padding."""
        hidden = self.attention_norm(hidden + self.attention(hidden, present))
        return self.norm(hidden + self.down(nnx.gelu(self.up(hidden), approximate=False)))


class SentenceEncoder(nnx.Module):
    """Unit vectors of sentences, from their tokens.

    With width d, inner width m and L layers, the layers have L (4 d^2 + 2 d m) kernel weights; the embedding
    tables another (vocabulary + positions + 2) d.

    Args:
        vocabulary: number of tokens; token 0 is padding.
        max_positions: the longest sentence, in tokens.
        width: d, a multiple of num_heads.
        num_heads: heads of the attention.
        num_layers: L.
        inner: m.
        epsilon: of the normalisation.
        rngs: random keys for kernels and tables.

    Raises:
        ValueError: a size below 1, or a width that the heads do not divide.

    Examples:
        >>> model = SentenceEncoder(50, 8, width=12, num_heads=3, num_layers=2, inner=24, rngs=nnx.Rngs(0))
        >>> embeddings = model(jnp.array([[7, 3, 9, 0], [5, 0, 0, 0]]))  # the second has one token
        >>> embeddings.shape, jnp.linalg.norm(embeddings, axis=1).round(5).tolist()
        ((2, 12), [1.0, 1.0])
    """

    def __init__(
        self,
        vocabulary: int,
        max_positions: int,
        *,
        width: int,
        num_heads: int,
        num_layers: int,
        inner: int,
        epsilon: float = 1e-12,
        rngs: nnx.Rngs,
    ):
        sizes = vocabulary, max_positions, width, num_heads, num_layers, inner
        if min(sizes) < 1 or width % num_heads:
            raise ValueError(
                "vocabulary, max_positions, width, num_heads, num_layers and inner must be at least 1, and "
                f"width a multiple of num_heads; got {sizes}."
            )
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(max_positions, width, rngs=rngs)
        self.segments = nnx.Embed(2, width, rngs=rngs)
        self.norm = _norm(width, epsilon, rngs)
        self.layers = nnx.List(
            EncoderLayer(width, num_heads, inner, epsilon, rngs=rngs) for _ in range(num_layers)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeddings (batch, width) of norm 1.

        Args:
            tokens: integers (batch, positions), filled up with 0 behind each sentence, which has at least one
                token.

        Raises:
            ValueError: another type or shape, or more positions than the model has.
        """
        limit = self.positions.num_embeddings
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2 or tokens.shape[1] > limit:
            raise ValueError(
                f"tokens must be integers of shape (batch, at most {limit}), got {tokens.dtype} of shape "
                f"{tokens.shape}."
            )
        present = tokens != PADDING
        positions = self.positions(jnp.arange(tokens.shape[1]))
        hidden = self.norm(self.tokens(tokens) + positions + self.segments(jnp.zeros(1, int)))
        for layer in self.layers:
            hidden = layer(hidden, present)
        total = jnp.sum(jnp.where(present[..., None], hidden, 0), axis=1)
        return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def load_sentence_encoder(folder: str | Path) -> SentenceEncoder:
    """A sentence encoder from the folder of a BERT model with mean pooling, in the layout of its authors.

    Read are config.json and model.safetensors. The pooler, which mean pooling does not use, is left out.

    Args:
        folder: as `sentence-transformers/all-MiniLM-L6-v2` has it, with float32 weights.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: another kind of network, a damaged file, or names or shapes that do not fit.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    different = {name: config.get(name) for name, value in REQUIRED.items() if config.get(name) != value}
    if different or config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{folder} must hold a BERT with gelu and absolute positions, got {different or config}."
        )
    model = SentenceEncoder(
        config["vocab_size"],
        config["max_position_embeddings"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_hidden_layers"],
        inner=config["intermediate_size"],
        epsilon=config["layer_norm_eps"],
        rngs=nnx.Rngs(0),
    )
    state = read_safetensors(folder / "model.safetensors")
    for prefix, module in _modules(model):
        _assign(module, prefix, state)
    left = [name for name in state if not name.startswith("pooler.") and not name.endswith("position_ids")]
    if left:
        raise ValueError(f"{folder} holds what this network has no place for: {', '.join(sorted(left))}.")
    return model


def _norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, a difference of two means, loses digits.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def _modules(model: SentenceEncoder) -> Iterator[tuple[str, nnx.Module]]:
    """The file's name of every module that holds arrays."""
    yield "embeddings.word_embeddings", model.tokens
    yield "embeddings.position_embeddings", model.positions
    yield "embeddings.token_type_embeddings", model.segments
    yield "embeddings.LayerNorm", model.norm
    for number, layer in enumerate(model.layers):
        prefix = f"encoder.layer.{number}"
        yield f"{prefix}.attention.self.query", layer.attention.query
        yield f"{prefix}.attention.self.key", layer.attention.key
        yield f"{prefix}.attention.self.value", layer.attention.value
        yield f"{prefix}.attention.output.dense", layer.attention.out
        yield f"{prefix}.attention.output.LayerNorm", layer.attention_norm
        yield f"{prefix}.intermediate.dense", layer.up
        yield f"{prefix}.output.dense", layer.down
        yield f"{prefix}.output.LayerNorm", layer.norm


def _assign(module: nnx.Module, prefix: str, state: State) -> None:
    """Moves the module's arrays from the state into it; kernels are stored (out, in)."""
    matrix = "embedding" if isinstance(module, nnx.Embed) else "kernel"
    names = {"weight": "scale" if isinstance(module, nnx.LayerNorm) else matrix}
    if not isinstance(module, nnx.Embed):
        names["bias"] = "bias"
    for name, attribute in names.items():
        variable: nnx.Variable = getattr(module, attribute)
        key, like = f"{prefix}.{name}", variable.get_value()
        if key not in state:
            raise ValueError(f"model.safetensors has no {key}.")
        array = state.pop(key)
        array = array.T if isinstance(module, nnx.Linear) and array.ndim == 2 else array
        if array.shape != like.shape or array.dtype != np.float32:
            raise ValueError(
                f"{key} must be float32 of shape {like.shape} (in the layout of this package), got "
                f"{array.dtype} of shape {array.shape}."
            )
        variable.set_value(jnp.asarray(array))
