"Every family against transformers: a small random model, saved as its home saves it, opened as anybody opens it."
import numpy as np
import pytest
from keras import ops

from llama_nb.checkpoint import CheckpointError, ffn_hidden_dim
from llama_nb.meta import write_meta
from llama_nb.gguf import write_gguf
from llama_nb.hub import open_checkpoint
from llama_nb.huggingface import write_hf
from llama_nb.generation import cached_decoder
from llama_nb.model import build_model, load_weights

torch = pytest.importorskip("torch", reason="parity by family needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="parity by family needs the extra [parity]")

LENGTH, TRAINED = 48, 16


def rope(kind="default", theta=10000.0, **fields):
    return dict(rope_type=kind, rope_theta=theta) | fields


def llama3(factor):
    return rope("llama3", 500000.0, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=TRAINED)


FAMILIES = {
    "LLaMA 1": dict(rms_norm_eps=1e-6),
    "Llama 2 70B": dict(num_key_value_heads=2, intermediate_size=ffn_hidden_dim(64, 32, 1.3)),
    "Llama 3": dict(num_key_value_heads=2, rope_parameters=rope(theta=500000.0)),
    "Llama 3.1": dict(num_key_value_heads=2, rope_parameters=llama3(8.0)),
    "Llama 3.2": dict(num_key_value_heads=2, rope_parameters=llama3(32.0), tie_word_embeddings=True),
    "TinyLlama": dict(num_key_value_heads=1),
    "CodeLlama": dict(rope_parameters=rope(theta=1e6)),
    "linear": dict(rope_parameters=rope("linear", factor=4.0)),
    "dynamic": dict(rope_parameters=rope("dynamic", factor=3.0), max_position_embeddings=TRAINED),
    "Mistral Nemo": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=None, rope_parameters=rope(theta=1e6)),
    "wide heads": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True),
    "yarn": dict(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=TRAINED)),
    "yarn, as Mistral's": dict(num_key_value_heads=2, sliding_window=None, rope_parameters=rope("yarn", factor=16.0, original_max_position_embeddings=TRAINED, mscale=1.0, mscale_all_dim=0.5, beta_fast=4.0)),
    "SmolLM2": dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, rope_parameters=rope(theta=100000.0), tie_word_embeddings=True),
    "Mistral 0.1": dict(num_key_value_heads=2, sliding_window=TRAINED),
    "Mistral 0.2": dict(num_key_value_heads=2, sliding_window=None, rope_parameters=rope(theta=1e6)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(family):
    "A random model in float32, its numbers such as bfloat16 can hold."
    options = dict(vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=LENGTH,
                   initializer_range=0.2, rope_parameters=rope(), tie_word_embeddings=False, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None)
    kind = "Mistral" if "Mistral" in family else "Llama"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options | FAMILIES[family])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for weight in model.parameters(): weight.data = weight.data.to(torch.bfloat16).to(torch.float32)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return opened(folder)


def opened(path, dtype="float32"):
    checkpoint = open_checkpoint(path)
    return load_weights(build_model(checkpoint.config, dtype), checkpoint)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 97, LENGTH)


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids)[None])).logits[0].float().numpy()


def our_logits(model, ids):
    return ops.convert_to_numpy(model(np.asarray(ids)[None]))[0]


@pytest.mark.parametrize("length", [1, TRAINED, TRAINED + 1, 29, LENGTH])
def test_logits_at_every_position(theirs, ours, ids, length):
    np.testing.assert_allclose(our_logits(ours, ids[:length]), their_logits(theirs, ids[:length]), atol=1e-4, rtol=0)


def test_bfloat16_is_as_near_to_float32_as_theirs(theirs, folder, ours, ids):
    exact, half = their_logits(theirs, ids), type(theirs).from_pretrained(folder, dtype=torch.bfloat16).eval()
    error = lambda logits: np.sqrt(np.mean(np.square(logits - exact)))
    assert error(our_logits(opened(folder, "bfloat16"), ids)) <= 2 * error(their_logits(half, ids))   # without oneDNN TensorFlow adds up in bfloat16: 1.3 to 1.7


@pytest.fixture(scope="module")
def decoder(folder, ours):
    return cached_decoder(ours, open_checkpoint(folder).config, chunk=7)


def test_cached_equals_uncached(decoder, ours, ids):
    for end in (1, 5, TRAINED, 17, 20, 21, TRAINED - 2, 40, 41, LENGTH):
        np.testing.assert_allclose(decoder.advance(ids[:end].tolist()), our_logits(ours, ids[:end])[-1], atol=1e-4)


def test_the_same_text(family, theirs, decoder, ids):
    "Greedily, on from a prompt as long as the training; without their cache, which mixes speeds where those follow the length."
    text, cached = ids[:TRAINED].tolist(), "dynamic" not in family
    their_logits(theirs, ids[:1])  # a short text, for their speeds stay those of the longest until then
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([text]), max_new_tokens=24, do_sample=False, use_cache=cached, pad_token_id=0)[0].tolist()
    while len(text) < len(expected):
        text.append(int(decoder.advance(text).argmax()))
    assert text == expected


@pytest.mark.parametrize("form", ["meta", "hf", "gguf"])
def test_the_same_weights_in_every_form(family, form, folder, ours, ids, tmp_path):
    checkpoint, path = open_checkpoint(folder), tmp_path / f"model.{form}"
    if form == "meta": write_meta(path, checkpoint.config, checkpoint.read, dtype="float32")
    if form == "hf": write_hf(path, checkpoint)
    if form == "gguf" and family in ("dynamic", "yarn, as Mistral's"):
        with pytest.raises(CheckpointError, match="no place in a GGUF file"): write_gguf(path, checkpoint)
        return
    if form == "gguf": write_gguf(path, checkpoint)
    np.testing.assert_array_equal(our_logits(opened(path), ids), our_logits(ours, ids))
