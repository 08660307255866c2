"Rotary positions against the formula in complex numbers and against transformers."
import keras
import numpy as np
import pytest
from keras import ops

from llama_nb.huggingface import adjacent_to_halves, halves_to_adjacent
from llama_nb.positions import RopeScaling
from llama_nb.rope import RotaryEmbedding, rope_frequencies, rope_tables


def scaled_frequencies(head_dim, theta=10000.0, scaling=None, length=None):
    frequencies = rope_frequencies(head_dim, theta)
    return frequencies if scaling is None else scaling(frequencies, length)[0]


def turn_complex(x, start, theta):
    "The definition, in float64: pair i of position m is multiplied by exp(i m theta^(-2i/d))."
    pairs = x[..., 0::2].astype(float) + 1j * x[..., 1::2]
    exponents = 2 * np.arange(x.shape[-1] // 2) / x.shape[-1]
    turned = pairs * np.exp(1j * np.outer(start + np.arange(x.shape[-2]), theta**-exponents))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("head_dim, theta", [(2, 10000.0), (64, 100000.0), (96, 10000.0), (128, 500000.0)])
@pytest.mark.parametrize("length, start", [(1, 0), (1, 2047), (17, 5), (2048, 0)])
def test_equals_complex_multiplication(head_dim, theta, length, start):
    x = random(2, 3, length, head_dim)
    turned = RotaryEmbedding(head_dim, 2048, theta)(x, start=start)
    np.testing.assert_allclose(turned, turn_complex(x, start, theta), atol=2e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160])
def test_frequencies_are_exact(head_dim):
    exact = [10000.0 ** -(2 * pair / head_dim) for pair in range(head_dim // 2)]
    np.testing.assert_allclose(rope_frequencies(head_dim), exact, rtol=1e-15)


def test_tables_are_rounded_once():
    angles = 2047 * rope_frequencies(64)
    cos, sin = rope_tables(2048, 64)
    assert np.array_equal(cos[-1], np.cos(angles).astype("float32")) and np.array_equal(sin[-1], np.sin(angles).astype("float32"))


def test_scores_depend_on_distance_only():
    rope, (q, k) = RotaryEmbedding(64, 4096), random(2, 1, 1, 1, 64)
    for distance in (0, 1, 7, 100):
        scores = [float(ops.sum(rope(q, start=shift + distance) * rope(k, start=shift))) for shift in (0, 1, 13, 1000, 3900)]
        np.testing.assert_allclose(scores, scores[0], atol=1e-4)


def test_lengths_stay():
    x = random(1, 2, 300, 64)
    pairs = ops.convert_to_numpy(RotaryEmbedding(64, 300)(x)).reshape(-1, 2)
    np.testing.assert_allclose(np.hypot(*pairs.T), np.hypot(*x.reshape(-1, 2).T), atol=2e-6)


def test_bfloat16_turns_in_float32():
    x, rope = random(1, 2, 2048, 64), RotaryEmbedding(64, 2048, dtype="bfloat16")
    turned = rope(ops.cast(x, "bfloat16"))
    assert turned.dtype == "bfloat16"
    np.testing.assert_allclose(ops.cast(turned, "float32"), turn_complex(x, 0, 10000.0), atol=0.05)


def test_a_place_beyond_the_tables_is_an_error():
    with pytest.raises(Exception, match="positions up to 32 were asked for, context_length is 32"):
        RotaryEmbedding(8, 32)(random(1, 1, 2, 8), start=31)


def test_compiled_once_for_every_start():
    import tensorflow as tf
    rope, x = RotaryEmbedding(8, 32), random(1, 1, 2, 8)
    turn = tf.function(lambda start: rope(x, start=start), input_signature=[tf.TensorSpec((), "int32")])
    for start in (0, 7, 30):
        np.testing.assert_allclose(turn(start), turn_complex(x, start, 10000.0), atol=1e-6)
    assert turn.experimental_get_tracing_count() == 1


SCALINGS = {"linear": RopeScaling("linear", 4.0), "dynamic": RopeScaling("dynamic", 2.0, 16), "llama3": RopeScaling("llama3", 8.0, 16), "other bands": RopeScaling("llama3", 32.0, 64, 0.5, 8.0)}


@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()], ids=str)
def test_config_round_trip(scaling):
    rope = RotaryEmbedding(8, 32, 500.0, scaling)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rope))
    assert again.scaling == scaling and np.array_equal(again(random(1, 1, 30, 8)), rope(random(1, 1, 30, 8)))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("start, length", [(0, 1), (0, 16), (0, 17), (0, 31), (15, 1), (16, 1), (9, 22)])
def test_a_scaled_layer_turns_by_the_scaled_speeds(scaling, start, length):
    x = random(1, 2, length, 64)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.outer(start + np.arange(length), scaled_frequencies(64, 500.0, scaling, start + length)))
    expected = np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(RotaryEmbedding(64, 32, 500.0, scaling)(x, start=start), expected, atol=2e-6)


def test_dynamic_speeds_are_compiled_once():
    import tensorflow as tf
    rope, x = RotaryEmbedding(8, 32, scaling=SCALINGS["dynamic"]), random(1, 1, 2, 8)
    turn = tf.function(lambda start: rope(x, start=start), input_signature=[tf.TensorSpec((), "int32")])
    for start in (0, 14, 15, 30):
        np.testing.assert_allclose(turn(start), rope(x, start=start), atol=1e-6)
    assert turn.experimental_get_tracing_count() == 1


def test_only_dynamic_speeds_follow_the_length():
    assert [scaling.steady_length for scaling in SCALINGS.values()] == [None, 16, None, None]
    for name, scaling in SCALINGS.items():
        short, trained, long = (scaled_frequencies(64, scaling=scaling, length=length) for length in (3, 16, 100))
        assert np.array_equal(short, trained) and np.array_equal(trained, long) == (name != "dynamic")


@pytest.mark.parametrize("n_heads, head_dim", [(1, 2), (3, 8), (9, 64)])
def test_permutations_undo_each_other(n_heads, head_dim):
    matrix = random(n_heads * head_dim, 5)
    assert np.array_equal(adjacent_to_halves(halves_to_adjacent(matrix, n_heads), n_heads), matrix)
    assert np.array_equal(halves_to_adjacent(adjacent_to_halves(matrix, n_heads), n_heads), matrix)


@pytest.mark.parametrize("theta", [10000.0, 100000.0])
def test_transformers_turns_the_same_after_the_permutation(theta):
    torch = pytest.importorskip("torch", reason="live parity needs the extra [parity]")
    transformers = pytest.importorskip("transformers", reason="live parity needs the extra [parity]")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    heads, length, head_dim = 3, 40, 64
    wq, wk = np.random.default_rng(0).normal(size=(2, heads * head_dim, 16)).astype("float32")
    x = random(length, 16)
    split = lambda matrix: (x @ matrix.T).reshape(1, length, heads, head_dim).swapaxes(1, 2)
    rope = RotaryEmbedding(head_dim, length, theta)
    ours = ops.matmul(rope(split(wq)), ops.transpose(rope(split(wk)), (0, 1, 3, 2)))
    config = transformers.LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads, rope_parameters=dict(rope_type="default", rope_theta=theta))
    q, k = (torch.tensor(np.ascontiguousarray(split(adjacent_to_halves(matrix, heads)))) for matrix in (wq, wk))
    q, k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, torch.arange(length)[None]))
    np.testing.assert_allclose(ours, (q @ k.transpose(2, 3)).numpy(), atol=2e-2, rtol=1e-4)


@pytest.mark.parametrize("length", [None, 1, 8192, 8193, 20000, 65536])
@pytest.mark.parametrize("head_dim, theta", [(64, 10000.0), (64, 500000.0), (128, 500000.0), (80, 1e6)])
@pytest.mark.parametrize("scaling", [RopeScaling("linear", 4.0), RopeScaling("dynamic", 2.0, 8192), RopeScaling("dynamic", 8.0, 8192), RopeScaling("llama3", 8.0, 8192),
                                     RopeScaling("llama3", 32.0, 8192), RopeScaling("llama3", 3.0, 4096, 2.0, 5.0), RopeScaling("yarn", 8.0, 1024), RopeScaling("yarn", 1.0, 8192), RopeScaling("yarn", 16.0, 4096, beta_fast=20.0, beta_slow=2.5),
                                     RopeScaling("yarn", 40.0, 64, attention_factor=1.25), RopeScaling("yarn", 4.0, 2048, truncate=False), RopeScaling("yarn", 4.0, 2**20)], ids=str)
def test_scaled_speeds_are_those_of_transformers(scaling, head_dim, theta, length):
    transformers = pytest.importorskip("transformers", reason="live parity needs the extra [parity]")
    pytest.importorskip("torch", reason="live parity needs the extra [parity]")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    fields = dict(rope_type=scaling.kind, rope_theta=theta, factor=scaling.factor)
    if scaling.kind == "llama3":
        fields |= dict(low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor, original_max_position_embeddings=scaling.original_context_length)
    if scaling.kind == "yarn":
        fields |= dict(beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow, attention_factor=scaling.attention_factor, truncate=scaling.truncate, original_max_position_embeddings=scaling.original_context_length)
    config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=fields)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, seq_len=length)
    found = scaled_frequencies(head_dim, theta, scaling, length)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert attention_factor == pytest.approx(scaling.magnitude, rel=1e-12)


def test_llama_3_1_by_the_code_of_its_makers():
    "Meta's bands, pair by pair."
    def scaled(speed, factor=8, low=1, high=4, trained=8192):
        wavelength = 2 * np.pi / speed
        if wavelength < trained / high: return speed
        if wavelength > trained / low: return speed / factor
        smooth = (trained / wavelength - low) / (high - low)
        return (1 - smooth) * speed / factor + smooth * speed
    expected = [scaled(speed) for speed in rope_frequencies(128, 500000.0)]
    np.testing.assert_allclose(scaled_frequencies(128, 500000.0, RopeScaling("llama3", 8.0, 8192)), expected, rtol=1e-14)
