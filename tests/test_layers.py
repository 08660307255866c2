"""RMSNorm, FeedForward, Attention and Block against Keras' and PyTorch's own, and what a Keras user expects of a layer."""
import keras
import numpy as np
import pytest
from keras import ops

from llama_nb.attention import Attention
from llama_nb.block import Block, FeedForward, RMSNorm
from llama_nb.block import listening

DTYPES = ["float32", "bfloat16"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}    # of values about 1; bfloat16 has 8 significant bits, 1/256 of a value
HEADS = [(1, 1, 8), (4, 4, 16), (8, 2, 16), (9, 3, 8), (6, 1, 4)]    # n_heads, n_kv_heads, head_dim


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numbers(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def attention(heads, dtype="float32", dim=48, **options):
    keras.utils.set_random_seed(1)
    layer = Attention(*heads, dtype=dtype, name="attention", **options)
    layer.build((None, None, dim))
    return layer


def block():
    keras.utils.set_random_seed(2)
    layer = Block(Attention(8, 2, 6, name="attention"), FeedForward(64, name="feed_forward"), eps=1e-6, name="block")
    layer.build((None, None, 48))
    return layer


LAYERS = {"norm": lambda: RMSNorm(1e-6), "feed_forward": lambda: FeedForward(64), "attention": lambda: Attention(8, 2, 6), "block": block}


@pytest.fixture(params=LAYERS)
def layer(request):
    keras.utils.set_random_seed(0)
    layer = LAYERS[request.param]()
    layer(random(1, 2, 48))
    return layer


# Against others' own layers, with the same weights.

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1, 1e4])
def test_rms_norm_is_keras(dtype, size):
    ours, theirs = RMSNorm(1e-6, dtype=dtype), keras.layers.RMSNormalization(epsilon=1e-6, dtype=dtype)
    for layer in (ours, theirs):
        layer.build((None, None, 96))
        layer.set_weights([random(96, seed=1)])
    x = size * random(2, 5, 96)
    np.testing.assert_allclose(numbers(ours(x)), numbers(theirs(x)), atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_torch(dtype):
    torch = pytest.importorskip("torch")
    ours = RMSNorm(1e-6, dtype=dtype)
    ours.build((None, 96))
    ours.set_weights([random(96, seed=1)])
    x = random(2, 5, 96)
    theirs = torch.nn.functional.rms_norm(torch.tensor(x).to(getattr(torch, dtype)), (96,), torch.tensor(random(96, seed=1)).to(getattr(torch, dtype)), eps=1e-6)
    np.testing.assert_allclose(numbers(ours(x)), theirs.float().numpy(), atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward_is_torch(dtype):
    torch = pytest.importorskip("torch")
    keras.utils.set_random_seed(1)
    layer = FeedForward(64, dtype=dtype)
    x = random(2, 5, 48)
    ours = layer(x)
    w1, w2, w3 = (torch.tensor(numbers(matrix.kernel)).to(getattr(torch, dtype)) for matrix in (layer.w1, layer.w2, layer.w3))
    wide = torch.tensor(x).to(getattr(torch, dtype))
    theirs = (torch.nn.functional.silu(wide @ w1) * (wide @ w3)) @ w2
    np.testing.assert_allclose(numbers(ours), theirs.float().numpy(), atol=TOLERANCE[dtype])


def assert_agrees_with_keras(heads, theirs, dtype):
    "Our attention against a layer of Keras' own with the same weights."
    ours = attention(heads, dtype)
    x = random(2, 7, 48)
    theirs.build(x.shape, x.shape)
    theirs.set_weights([np.reshape(value, variable.shape) for value, variable in zip(ours.get_weights(), theirs.weights)])
    np.testing.assert_allclose(numbers(ours(x)), numbers(theirs(x, x, use_causal_mask=True)), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [heads for heads in HEADS if heads[0] == heads[1]])
def test_attention_is_keras_multi_head_attention(heads, dtype):
    theirs = keras.layers.MultiHeadAttention(heads[0], heads[2], use_bias=False, dtype=dtype)
    assert_agrees_with_keras(heads, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_keras_group_query_attention(heads, dtype):
    theirs = keras.layers.GroupQueryAttention(head_dim=heads[2], num_query_heads=heads[0], num_key_value_heads=heads[1], use_bias=False, dtype=dtype)
    assert_agrees_with_keras(heads, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_torch(heads, dtype):
    torch = pytest.importorskip("torch")
    n_heads, n_kv_heads, head_dim = heads
    layer, x = attention(heads, dtype), random(2, 7, 48)
    wq, wk, wv, wo = (torch.tensor(numbers(matrix.kernel)).to(getattr(torch, dtype)) for matrix in (layer.wq, layer.wk, layer.wv, layer.wo))
    wide = torch.tensor(x).to(getattr(torch, dtype))
    q, k, v = ((wide @ w).unflatten(-1, (count, head_dim)).transpose(1, 2) for w, count in ((wq, n_heads), (wk, n_kv_heads), (wv, n_kv_heads)))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    theirs = mixed.transpose(1, 2).flatten(2) @ wo
    np.testing.assert_allclose(numbers(layer(x)), theirs.float().numpy(), atol=TOLERANCE[dtype])


# What attention may see.

@pytest.mark.parametrize("heads", HEADS)
def test_later_tokens_do_not_matter(heads):
    layer, x = attention(heads), random(1, 9, 48)
    changed = np.concatenate([x[:, :5], random(1, 4, 48, seed=1)], axis=1)
    before, after = numbers(layer(x)), numbers(layer(changed))
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1).min() > 1e-2


def test_earlier_tokens_do_matter():
    layer, x = attention((8, 2, 6)), random(1, 9, 48)
    changed = np.concatenate([random(1, 1, 48, seed=1), x[:, 1:]], axis=1)
    assert np.abs(numbers(layer(x)) - numbers(layer(changed))).max(axis=-1).min() > 1e-4


class Cache:
    "Room for a fixed number of places, the unused ones filled with large numbers, which nobody may see."

    def __init__(self, places):
        self.places, self.kept = places, {}

    def update(self, k, v, start):
        for name, new in (("k", k), ("v", v)):
            new = numbers(new)
            room = self.kept.setdefault(name, np.full((*new.shape[:2], self.places, new.shape[3]), 1e3, "float32"))
            room[:, :, start:start + new.shape[2]] = new
        return ops.convert_to_tensor(self.kept["k"]), ops.convert_to_tensor(self.kept["v"])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cuts", [(9,), (1,) * 9, (5, 1, 3)], ids=str)
def test_in_pieces_with_a_cache_as_at_once(heads, cuts):
    layer, x, cache, start, found = attention(heads), random(2, 9, 48), Cache(12), 0, []
    for cut in cuts:
        found.append(numbers(layer(x[:, start:start + cut], start=start, cache=cache)))
        start += cut
    np.testing.assert_allclose(np.concatenate(found, axis=1), numbers(layer(x)), atol=1e-5)


def test_position_turns_queries_and_keys_only():
    asked = []

    def position(x, start=0):
        asked.append((tuple(x.shape), start))
        return x
    attention((8, 2, 6), position=position)(random(1, 3, 48), start=4)
    assert asked == [((1, 8, 3, 6), 4), ((1, 2, 3, 6), 4)]


def test_scores_and_weights_are_float32_in_a_bfloat16_layer():
    seen = {}
    with listening(lambda name, value: seen.setdefault(name, value)):
        attention((8, 2, 6), "bfloat16")(random(1, 5, 48))
    types = {name: keras.backend.standardize_dtype(value.dtype) for name, value in seen.items()}
    assert types == {"attention.q": "bfloat16", "attention.k": "bfloat16", "attention.v": "bfloat16",
                     "attention.scores": "float32", "attention.weights": "float32", "attention": "bfloat16"}
    assert seen["attention.weights"].shape == (1, 8, 5, 5)


# What a Keras user expects of every layer.

def test_a_layer_comes_back_from_its_config(layer):
    again = type(layer).from_config(layer.get_config())
    x = random(2, 4, 48)
    again(x)
    again.set_weights(layer.get_weights())
    np.testing.assert_allclose(numbers(again(x)), numbers(layer(x)), atol=1e-6)
    assert again.get_config() == layer.get_config()


def test_a_layer_comes_back_from_json_with_its_dtype(layer):
    config = layer.get_config() | {"dtype": "bfloat16"}
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(type(layer).from_config(config)))
    assert again.compute_dtype == "bfloat16"


def test_a_config_is_not_changed_by_reading_it(layer):
    config = layer.get_config()
    type(layer).from_config(config)
    assert config == layer.get_config()


def test_a_functional_model_is_saved_and_loaded(tmp_path):
    inputs = keras.Input((None, 48))
    model = keras.Model(inputs, block()(inputs))
    model.save(tmp_path / "model.keras")
    x = random(2, 5, 48)
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras").predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)


def test_every_weight_gets_a_gradient(layer):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("gradients are taken with TensorFlow's tape")
    import tensorflow as tf
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(random(2, 4, 48)) * random(2, 4, 48, seed=1))
    gradients = tape.gradient(loss, layer.trainable_weights)
    assert len(gradients) == len(layer.weights) > 0
    assert all(gradient is not None and np.abs(numbers(gradient)).max() > 1e-6 for gradient in gradients)


def test_matrices_of_one_shape_start_different():
    layer = block()
    for one, other in ((layer.feed_forward.w1, layer.feed_forward.w3), (layer.attention.wk, layer.attention.wv), (layer.attention.wq, layer.attention.wo)):
        assert not np.allclose(numbers(one.kernel), numbers(other.kernel), atol=1e-3)


def test_lora_on_every_projection():
    layer, x = block(), random(1, 4, 48)
    before, total = numbers(layer(x)), layer.count_params()
    matrices = [getattr(layer.attention, name) for name in ("wq", "wk", "wv", "wo")] + [getattr(layer.feed_forward, name) for name in ("w1", "w2", "w3")]
    for matrix in matrices:
        matrix.enable_lora(rank=2)
    for norm in (layer.attention_norm, layer.ffn_norm):
        norm.trainable = False
    np.testing.assert_allclose(numbers(layer(x)), before, atol=1e-5)
    assert len(layer.trainable_weights) == 2 * len(matrices)
    assert layer.count_params() > total
