"Logits against transformers (live, and stored in golden/), against the page of NumPy in chapter 7, and strictness of loading."
import ast
import copy
import importlib.util
import json

import keras
import numpy as np
import pytest
from keras import ops

from llama_nb.checkpoint import CheckpointError, LazyTensor, LlamaConfig
from llama_nb.hub import open_checkpoint
from llama_nb.model import build_model, forward, load_weights, model_layers, read_weight, weight_variables
from llama_nb.huggingface import adjacent_to_halves

PARITY = pytest.mark.skipif(not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")), reason="live parity needs the extra [parity]")
VERSES = "If it were done when 'tis done, then 'twere well\nIt were done quickly: if the assassination\nCould trammel up the consequence, and catch\nWith his surcease success;"
TOY = LlamaConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=11, context_length=32)


@pytest.fixture(scope="module")
def make(root):
    "The script that wrote golden/smollm2.json, as a module."
    spec = importlib.util.spec_from_file_location("make_golden", root / "tests/golden/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(root):
    return json.loads((root / "tests/golden/smollm2.json").read_text())


@pytest.fixture(scope="module")
def our_logits(smollm2, golden):
    return [smollm2.logits(row["ids"]) for row in golden["prompts"]]


@pytest.fixture(scope="module")
def reference(make, smollm2):
    return make.load_reference(smollm2.path)


@pytest.fixture(scope="module")
def toy():
    keras.utils.set_random_seed(0)
    return build_model(TOY, initializer="glorot_uniform")


def test_smollm2_stored_logits(make, golden, our_logits, smollm2):
    assert [row["prompt"] for row in golden["prompts"]] == list(make.PROMPTS)
    for row, ours in zip(golden["prompts"], our_logits):
        assert smollm2.tokenizer.encode(row["prompt"]) == row["ids"]
        assert ours.argmax(-1).tolist() == row["top"]
        np.testing.assert_allclose(np.logaddexp.reduce(ours, axis=-1), row["logsumexp"], atol=2e-3, rtol=0)
        np.testing.assert_allclose(ours[:, make.SAMPLE], row["sample"], atol=2e-3, rtol=0)


@PARITY
def test_smollm2_live_against_transformers(make, golden, our_logits, reference):
    for row, ours in zip(golden["prompts"], our_logits):
        theirs = make.reference_logits(reference, row["ids"])
        np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=0)
        assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))
    assert make.reference_greedy(reference, golden["prompts"][0]["ids"], 40) == golden["greedy"]


@PARITY
def test_smollm2_in_bfloat16_errs_no_more_than_transformers(make, golden, our_logits, reference, smollm2):
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    reference = copy.deepcopy(reference).to(torch.bfloat16)
    reference.model.rotary_emb = LlamaRotaryEmbedding(reference.config)  # in float32, as in a model that was loaded so
    ours = load_weights(build_model(smollm2.config, "bfloat16"), open_checkpoint(smollm2.path))
    error = lambda logits: np.mean([np.sqrt(np.mean(np.square(half - exact))) for half, exact in zip(logits, our_logits)])
    theirs = error([make.reference_logits(reference, row["ids"]) for row in golden["prompts"]])
    assert 0 < error([ops.convert_to_numpy(ours(np.array([row["ids"]])))[0] for row in golden["prompts"]]) <= 2 * theirs   # 1.4 without oneDNN


@PARITY
def test_bard_live_against_transformers(bard):
    import torch
    import transformers
    config, checkpoint = bard.config, open_checkpoint(bard.path, bard.config.vocab_size)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim, vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
        max_position_embeddings=config.context_length, rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta))).eval()
    parts = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
             "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
             "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "tok_embeddings": "model.embed_tokens", "output": "lm_head"}
    state = {}
    for name in checkpoint:
        values = checkpoint.read(name).astype("float32")
        if ".wq." in name: values = adjacent_to_halves(values, config.n_heads)
        if ".wk." in name: values = adjacent_to_halves(values, config.n_kv_heads)
        for ours, theirs in parts.items(): name = name.replace(ours, theirs)
        state[f"model.{name}" if name.startswith(("layers", "norm")) else name] = torch.tensor(np.ascontiguousarray(values))
    model.load_state_dict(state, strict=True)
    ids = bard.tokenizer.encode(VERSES)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(bard.logits(ids), theirs, atol=1e-4, rtol=0)


def test_bard_against_the_page_of_numpy(bard, root):
    cells = json.loads((root / "nbs/07_model.ipynb").read_text())["cells"]
    page = {"np": np}
    for source in ("".join(cell["source"]) for cell in cells):
        if "def softmax(" in source or "def numpy_llama(" in source:
            functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
            exec(compile(ast.Module(functions, []), "07_model.ipynb", "exec"), page)
    checkpoint, ids = open_checkpoint(bard.path, bard.config.vocab_size), bard.tokenizer.encode(VERSES)
    reference = page["numpy_llama"](lambda name: checkpoint.read(name).astype("float64"), bard.config, ids)
    np.testing.assert_allclose(bard.logits(ids), reference, atol=1e-4, rtol=0)


def test_bard_in_bfloat16_says_nearly_the_same(bard):
    half = load_weights(build_model(bard.config, "bfloat16"), open_checkpoint(bard.path, bard.config.vocab_size))
    ids = bard.tokenizer.encode(VERSES)
    ours, exact = ops.convert_to_numpy(half(np.array([ids])))[0], bard.logits(ids)
    assert ours.dtype == np.float32 and {variable.dtype for variable in half.variables} == {"bfloat16"}
    assert 0 < abs(ours - exact).mean() < 0.1 and np.mean(ours.argmax(-1) == exact.argmax(-1)) > 0.85


def test_a_text_is_read_alike_alone_and_in_a_batch(toy):
    ids = np.random.default_rng(0).integers(0, 11, (3, 9))
    together = ops.convert_to_numpy(toy(ids))
    for row, logits in zip(ids, together):
        np.testing.assert_allclose(toy(row[None])[0], logits, atol=1e-5)


def test_later_tokens_change_nothing_before_them(toy):
    ids = np.random.default_rng(0).integers(0, 11, (1, 9))
    np.testing.assert_allclose(toy(ids[:, :4]), toy(ids)[:, :4], atol=1e-5)


def test_last_is_the_last_row(toy):
    ids = np.random.default_rng(0).integers(0, 11, (2, 9))
    np.testing.assert_allclose(forward(model_layers(toy), ids, last=2), toy(ids)[:, -2:], atol=1e-5)


def test_saved_by_keras_and_loaded_again(toy, tmp_path):
    toy.save(tmp_path / "toy.keras")
    again, ids = keras.models.load_model(tmp_path / "toy.keras"), np.arange(9)[None]
    np.testing.assert_allclose(again(ids), toy(ids), atol=1e-6)
    assert list(weight_variables(again)) == list(TOY.tensor_shapes())


class Weights(dict):
    "As much of a checkpoint as loading asks for, without its own checks."
    path = "weights"
    def read(self, name): return self[name].read()


def weights(shapes):
    return Weights({name: LazyTensor(shape, np.dtype("float32"), "float32", lambda shape=shape: np.full(shape, 0.5, "float32")) for name, shape in shapes.items()})


def test_loading_fills_every_variable(toy):
    model = load_weights(build_model(TOY), weights(TOY.tensor_shapes()))
    assert all(np.all(ops.convert_to_numpy(variable) == 0.5) for variable in model.variables)
    for name, shape in TOY.tensor_shapes().items():
        assert read_weight(model, name).shape == shape


@pytest.mark.parametrize("change, message", [
    (lambda shapes: shapes.pop("layers.1.attention.wk.weight"), "weights: tensor layers.1.attention.wk.weight is missing"),
    (lambda shapes: shapes.update({"layers.2.ffn_norm.weight": (16,)}), "weights: tensor layers.2.ffn_norm.weight is not in the model"),
    (lambda shapes: shapes.update({"layers.0.feed_forward.w2.weight": (32, 16)}), r"weights: tensor layers.0.feed_forward.w2.weight should have shape \(16, 32\), found \(32, 16\)"),
], ids=["missing", "extra", "misshapen"])
def test_loading_is_strict(toy, change, message):
    shapes, before = TOY.tensor_shapes(), [ops.convert_to_numpy(variable) for variable in toy.variables]
    change(shapes)
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        load_weights(toy, weights(shapes))
    assert all(np.array_equal(variable, values) for variable, values in zip(toy.variables, before))


def test_tied_and_untied_are_told_apart(bard):
    import dataclasses
    tied = build_model(dataclasses.replace(bard.config, tied=True))
    with pytest.raises(CheckpointError, match="output.weight is not in the model"):
        load_weights(tied, open_checkpoint(bard.path, bard.config.vocab_size))
