"The other forms of a checkpoint: what Hugging Face, llama.cpp and the Hub give, and what we give them."
import contextlib
import dataclasses
import hashlib
import http.server
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import urllib.parse
from pathlib import Path

import gguf
import numpy as np
import pytest

from conftest import complaint
from llama_nb import hub, huggingface
from llama_nb.meta import config_to_params
from llama_nb.checkpoint import FLOATS, Checkpoint, CheckpointError, LazyTensor, LlamaConfig, bard_folder
from llama_nb.meta import write_meta, write_pth
from llama_nb.positions import RopeScaling
from llama_nb.files import their_names
from llama_nb.gguf import gguf_tensors, llama3_factors, write_gguf
from llama_nb.hub import open_checkpoint
from llama_nb.huggingface import HF_NAMES, adjacent_to_halves, read_safetensors, write_hf
from llama_nb.cli import write_form

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=128)


def weights(config, dtype="float32", seed=0):
    "Random values for a configuration, exact in the dtype."
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape, np.float32) / (8 if len(shape) == 2 else 1)).astype(dtype) for name, shape in config.tensor_shapes().items()}


@pytest.fixture(scope="module")
def arrays():
    return weights(CONFIG)


def in_halves(config, arrays):
    "The same by Hugging Face's names, in its order of rows."
    heads, theirs = {"wq": config.n_heads, "wk": config.n_kv_heads}, their_names(config, HF_NAMES, "model.layers")
    def order(name, values): return adjacent_to_halves(values, heads[part]) if (part := name.split(".")[-2]) in heads else values
    return {theirs[name]: order(name, values) for name, values in arrays.items()}


def described(config=CONFIG, **changes):
    "A config.json."
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads, intermediate_size=config.hidden_dim, vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps,
                max_position_embeddings=config.context_length) | changes


KINDS = {dtype: kind for kind, dtype in huggingface.SAFETENSORS.items()}


def safetensors_bytes(tensors):
    "A safetensors file, built by hand."
    header, data = {}, b""
    for name, values in tensors.items():
        header[name] = dict(dtype=KINDS[values.dtype.name], shape=values.shape, data_offsets=[len(data), len(data) + values.nbytes])
        data += values.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save_hf(folder, tensors, file="model.safetensors", shards=1, **changes):
    "A Hugging Face folder, in one file or in shards with an index."
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described(**changes)))
    stem, ending = file.rsplit(".", 1)
    places = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = file if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{ending}"
        places |= dict.fromkeys(part, name)
        if ending == "bin": write_pth(folder / name, part.items(), next(iter(part.values())).dtype.name)
        else: (folder / name).write_bytes(safetensors_bytes(part))
    if shards > 1: (folder / f"{file}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))
    return folder


# Hugging Face folders ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_folder_gives_the_same_bytes(file, shards, dtype, arrays, tmp_path):
    exact = {name: values.astype(dtype) for name, values in arrays.items()}
    checkpoint = open_checkpoint(save_hf(tmp_path / "hf", in_halves(CONFIG, exact), file, shards))
    assert checkpoint.config == CONFIG and list(checkpoint) == list(exact)
    assert all(checkpoint[name].dtype == dtype and checkpoint.read(name).tobytes() == values.tobytes() for name, values in exact.items())


@pytest.mark.parametrize("buffer", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_only_rotary_buffers_may_be_left_over(buffer, arrays, tmp_path):
    tensors, extra = in_halves(CONFIG, arrays), np.ones(8, np.float32)
    assert list(open_checkpoint(save_hf(tmp_path / "a", tensors | {buffer: extra}, "pytorch_model.bin"))) == list(arrays)
    message = complaint(open_checkpoint, save_hf(tmp_path / "b", tensors | {"model.extra.weight": extra}))
    assert message.startswith(str(tmp_path / "b")) and "tensor model.extra.weight does not belong" in message


def test_a_gguf_file_beside_a_config(arrays, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", open_checkpoint(bard_folder()))
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path == tmp_path / "tiny.gguf"
    (tmp_path / "tiny.gguf").unlink()
    assert complaint(open_checkpoint, tmp_path) == f"{tmp_path}: model.safetensors, pytorch_model.bin or their shards were expected, found config.json"


def test_tied(arrays, tmp_path):
    tied = {name: values for name, values in in_halves(CONFIG, arrays).items() if name != "lm_head.weight"}
    checkpoint = open_checkpoint(save_hf(tmp_path / "a", tied, tie_word_embeddings=True))
    assert checkpoint.config.tied and "output.weight" not in checkpoint
    assert "output.weight is missing" in complaint(open_checkpoint, save_hf(tmp_path / "b", tied))
    both = open_checkpoint(save_hf(tmp_path / "c", in_halves(CONFIG, arrays), tie_word_embeddings=True))
    assert not both.config.tied and (both.read("output.weight") == arrays["output.weight"]).all()


SCALINGS = [
    (dict(rope_theta=500000), 500000, None), (dict(rope_scaling=None), 10000, None), (dict(rope_scaling=dict(rope_type="default")), 10000, None),
    (dict(rope_scaling=dict(type="linear", factor=4)), 10000, RopeScaling("linear", 4)), (dict(rope_scaling=dict(type="dynamic", factor=2.0)), 10000, RopeScaling("dynamic", 2, 2048)),
    (dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024)), 5e5, RopeScaling("llama3", 32, 1024)),
    (dict(rope_parameters=dict(rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)), 5e5, RopeScaling("llama3", 8, 512)),
    (dict(rope_parameters=dict(rope_theta=1e6, rope_type="default")), 1e6, None)]


@pytest.mark.parametrize("fields, theta, scaling", SCALINGS, ids=str)
def test_scaled_positions_wherever_they_stand(fields, theta, scaling, arrays, tmp_path):
    config = open_checkpoint(save_hf(tmp_path / "hf", in_halves(CONFIG, arrays), **fields)).config
    assert config.rope_theta == theta and config.rope_scaling == scaling
    assert config.context_length == (4096 if scaling and scaling.kind == "dynamic" else 2048)


@pytest.mark.parametrize("architecture, fields, window", [("MistralForCausalLM", {}, 4096), ("MistralForCausalLM", dict(sliding_window=None), None),
                                                          ("MistralForCausalLM", dict(sliding_window=8), 8), ("LlamaForCausalLM", dict(sliding_window=8), None)], ids=str)
def test_sliding_windows(architecture, fields, window, arrays, tmp_path):
    assert open_checkpoint(save_hf(tmp_path / "hf", in_halves(CONFIG, arrays), architectures=[architecture], **fields)).config.sliding_window == window


BIAS, NORM, EXPERT = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("architecture, fields, extra, words", [
    ("Qwen2ForCausalLM", {}, BIAS, f"tensor {BIAS}"), ("Qwen3ForCausalLM", {}, NORM, f"tensor {NORM}"), ("MixtralForCausalLM", {}, EXPERT, f"tensor {EXPERT}"),
    ("MixtralForCausalLM", dict(num_local_experts=8), EXPERT, "num_local_experts should be 1, found 8"), ("LlamaForCausalLM", dict(attention_bias=True), BIAS, "attention_bias should be False, found True"),
    ("LlamaForCausalLM", dict(mlp_bias=True), None, "mlp_bias"), ("GemmaForCausalLM", dict(hidden_act="gelu"), None, "hidden_act should be silu, found gelu"),
    ("PhiForCausalLM", dict(partial_rotary_factor=0.5), None, "partial_rotary_factor should be 1.0, found 0.5"), ("OlmoForCausalLM", {}, None, "LlamaForCausalLM or MistralForCausalLM was expected"),
    ("LlamaForCausalLM", dict(rope_parameters=dict(partial_rotary_factor=0.5)), None, "partial_rotary_factor"), ("GraniteForCausalLM", dict(residual_multiplier=0.22), None, "residual_multiplier"),
    ("LlamaForCausalLM", dict(layer_types=["full_attention", "sliding_attention"]), None, "full_attention and sliding_attention"),
    ("Qwen2ForCausalLM", dict(quantization_config=dict(quant_method="awq")), BIAS, f"tensor {BIAS}"), (None, dict(model_type="gpt2"), None, "gpt2 is not a LLaMA")], ids=str)
def test_what_is_not_a_llama(architecture, fields, extra, words, arrays, tmp_path):
    tensors = in_halves(CONFIG, arrays) | ({extra: arrays["norm.weight"]} if extra else {})
    path = save_hf(tmp_path / "hf", tensors, **{"architectures": architecture and [architecture], **fields})
    message = complaint(open_checkpoint, path)
    assert message.startswith(str(path / "config.json")) and (architecture or "gpt2") in message and words in message


@pytest.mark.parametrize("fields, words", [
    (dict(head_dim=31), "head_dim should be even, found 31"), (dict(head_dim=0), "own_head_dim"), (dict(head_dim="16"), "own_head_dim"), (dict(rope_scaling=dict(rope_type="longrope", factor=4.0)), "linear, dynamic, llama3 or yarn, found 'longrope'"), (dict(rope_theta=1.0, rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_theta should be above 1"),
    (dict(rope_scaling=dict(type="linear")), "factor"), (dict(rope_scaling="linear"), "flat object"), (dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))), "flat object"),
    (dict(max_position_embeddings=0), "max_position_embeddings"), (dict(hidden_size="64"), "dim"), (dict(num_key_value_heads=0), "n_kv_heads"), (dict(num_hidden_layers=10**12), "n_layers"),
    (dict(vocab_size=None), "vocab_size"), (dict(rms_norm_eps=float("nan")), "norm_eps"), (dict(rope_theta=None), "rope_theta"), (dict(architectures=["MistralForCausalLM"], sliding_window=0), "sliding_window")], ids=str)
def test_fields_that_make_no_model(fields, words, arrays, tmp_path):
    path = save_hf(tmp_path / "hf", in_halves(CONFIG, arrays), **fields)
    message = complaint(open_checkpoint, path)
    assert message.startswith(str(path / "config.json")) and words in message


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"])
def test_missing_fields(name, arrays, tmp_path):
    path = save_hf(tmp_path / "hf", in_halves(CONFIG, arrays))
    (path / "config.json").write_text(json.dumps({field: value for field, value in described().items() if field != name}))
    assert complaint(open_checkpoint, path) == f"{path / 'config.json'}: LlamaForCausalLM is not a LLaMA as built here: {name} is missing"


@pytest.mark.parametrize("kind, window", [("llama", None), ("mistral", 4096)])
def test_a_kind_without_an_architecture(kind, window, arrays, tmp_path):
    config = open_checkpoint(save_hf(tmp_path / "hf", in_halves(CONFIG, arrays), architectures=None, model_type=kind)).config
    assert config == dataclasses.replace(CONFIG, sliding_window=window)


@pytest.mark.parametrize("count", [100, 129])
def test_a_tokenizer_of_another_size_than_the_embedding(count, arrays, tmp_path):
    assert open_checkpoint(save_hf(tmp_path / "hf", in_halves(CONFIG, arrays)), count).config.vocab_size == 128


def test_what_hugging_face_reads_is_what_we_read(arrays, tmp_path):
    "The library that defines the format writes a file, and reads ours."
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed: the reader is not compared with it")
    tensors = in_halves(CONFIG, arrays)
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    assert all((tensor.read() == tensors[name]).all() for name, tensor in read_safetensors(tmp_path / "theirs.safetensors").items())


# Shards ------------------------------------------------------------------------------------------------------------------

def test_eight_shards_are_never_twice_in_memory(tmp_path):
    "Each shard holds an eighth of every matrix; joining one allocates that matrix, and nothing more."
    config = LlamaConfig(dim=1024, n_layers=1, n_heads=16, n_kv_heads=8, hidden_dim=2048, vocab_size=512)
    values, axes = weights(config, "float16"), {"wo": 1, "w2": 1, "tok_embeddings": 0}
    (tmp_path / "params.json").write_text(json.dumps(config_to_params(config)))
    for shard in range(8):
        write_pth(tmp_path / f"consolidated.{shard:02}.pth", [
            (name, matrix if matrix.ndim == 1 else np.split(matrix, 8, axes.get(name.split(".")[-2], 0))[shard]) for name, matrix in values.items()], "float16")
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in values.items():
        tracemalloc.start()
        found = checkpoint.read(name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.tobytes() == expected.tobytes()
        assert peak < 1.7 * expected.nbytes + 20_000, name


# Writers -----------------------------------------------------------------------------------------------------------------

LLAMA_3 = RopeScaling("llama3", 8.0, 64, 1.0, 4.0)
VARIANTS = {"plain": {}, "tied": dict(tied=True), "window": dict(sliding_window=8), "linear": dict(rope_scaling=RopeScaling("linear", 4.0)),
            "dynamic": dict(rope_scaling=RopeScaling("dynamic", 2.0, 64), context_length=128), "llama3": dict(rope_scaling=LLAMA_3, rope_theta=500000.0, context_length=512), "yarn": dict(rope_scaling=RopeScaling("yarn", 8.0, 256), context_length=2048),
            "narrow heads": dict(own_head_dim=8), "wide heads": dict(own_head_dim=40, n_heads=6)}


def written(form, path, checkpoint):
    "What a writer makes of a checkpoint, opened again."
    match form:
        case "meta": write_meta(path, checkpoint.config, checkpoint.read, dtype=checkpoint["tok_embeddings.weight"].dtype.name)
        case "hf": write_hf(path, checkpoint)
        case "gguf": write_gguf(path := path.with_suffix(".gguf"), checkpoint)
    return open_checkpoint(path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trips_are_exact(form, variant, dtype, tmp_path):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    source = Checkpoint("source", config, {name: LazyTensor(values.shape, values.dtype, dtype, lambda values=values: values) for name, values in weights(config, dtype).items()})
    if form == "gguf":
        other = Checkpoint("source", dataclasses.replace(config, rope_scaling=RopeScaling("yarn", 8.0, 64, beta_fast=8.0)), dict(source))
        assert "yarn has no place in a GGUF file unless beta_fast is 32" in complaint(written, form, tmp_path / "new", other)
    if (form, variant) == ("gguf", "dynamic"):
        assert "dynamic rope_scaling has no place in a GGUF file" in complaint(written, form, tmp_path / "new", source)
        return
    there = written(form, tmp_path / "there", source)
    back = written("meta", tmp_path / "back", there)
    assert there.config == config and back.config == dataclasses.replace(config, tied=False)
    for name in source:
        assert there[name].dtype == (np.float32 if form == "gguf" and len(there[name].shape) == 1 else dtype)
        assert (there.read(name) == source.read(name)).all() and back.read(name).tobytes() == source.read(name).tobytes()


def test_tokenizer_files_lie_beside(tmp_path):
    write_hf(tmp_path / "hf", open_checkpoint(bard_folder()), {"tokenizer.model": b"words"})
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"words"
    assert (read_safetensors(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].read() == open_checkpoint(bard_folder()).read("norm.weight")).all()


def test_gguf_metadata_is_written_as_llama_cpp_wants_it(tmp_path):
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.0, -1.5], "tokenizer.ggml.token_type": [1, 3],
              "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True}
    write_gguf(tmp_path / "bard.gguf", open_checkpoint(bard_folder()), fields)
    reader = gguf.GGUFReader(tmp_path / "bard.gguf")
    assert {key: reader.get_field(key).contents() for key in fields} == fields
    kinds = {key: [kind.name for kind in reader.get_field(key).types] for key in fields}
    assert kinds["tokenizer.ggml.bos_token_id"] == ["UINT32"] and kinds["tokenizer.ggml.token_type"] == ["ARRAY", "INT32"] and kinds["tokenizer.ggml.scores"] == ["ARRAY", "FLOAT32"]


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_nothing_half_written_stays(form, tmp_path, monkeypatch):
    source = open_checkpoint(bard_folder())
    def read(name):
        if name == "norm.weight": raise error
        return Checkpoint.read(source, name)
    monkeypatch.setattr(source, "read", read)
    for error, kind in ((OSError(28, "No space left on device"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(kind): written(form, tmp_path / "new", source)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "new.gguf").write_text("words"), (tmp_path / "new").write_text("words")
    assert "was expected, found" in complaint(written, form, tmp_path / "new", source)


@pytest.mark.parametrize("table, words", [(np.ones(8), None), (np.full(8, 2.0), "found another table"), (np.ones(4), "should have shape (8,), found (4,)"), (np.full(8, np.nan), "factor")], ids=str)
def test_tables_of_scaled_positions_are_checked(table, words, arrays, tmp_path, monkeypatch):
    source = Checkpoint("source", CONFIG, {name: LazyTensor(values.shape, values.dtype, "float32", lambda values=values: values) for name, values in arrays.items()})
    table, tensors = table.astype(np.float32), gguf_tensors(source)
    monkeypatch.setattr("llama_nb.gguf.gguf_tensors", lambda checkpoint, dtype: tensors | {"rope_freqs.weight": LazyTensor(table.shape, table.dtype, "F32", lambda: table)})
    if words is None: assert written("gguf", tmp_path / "a", source).config == CONFIG
    else: assert words in complaint(written, "gguf", tmp_path / "a", source)


def test_the_table_is_llama_3s():
    "Of 64 pairs of Llama 3.1: those turning more than 4 times in 8,192 tokens stay, those less than once are slowed by 8."
    factors = llama3_factors(128, 500000.0, RopeScaling("llama3", 8.0, 8192))
    turns = 8192 / (2 * np.pi * 500000.0 ** (np.arange(64) / 64))
    assert (factors[turns > 4] == 1).all() and np.allclose(factors[turns < 1], 8) and (np.diff(factors) >= 0).all() and 1 < factors[np.argmin(abs(turns - 2))] < 8


# transformers and llama.cpp ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="PyTorch is not installed: written folders are not loaded by transformers")
    return pytest.importorskip("transformers", reason="transformers is not installed: written folders are not loaded by it")


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_what_we_write(variant, transformers, tmp_path):
    "Into their memory and back from what they save, single and in shards: the same configuration and the same bytes."
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    source = Checkpoint("source", config, {name: LazyTensor(values.shape, values.dtype, "float32", lambda values=values: values) for name, values in weights(config).items()})
    write_hf(tmp_path / "ours", source)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for size in ("5GB", "60KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        again = open_checkpoint(tmp_path / size)
        assert again.config == config and all(again.read(name).tobytes() == source.read(name).tobytes() for name in source)
    assert len(list((tmp_path / "60KB").glob("*.safetensors"))) > 1


LLAMA_CPP = """
import json, sys, xllamacpp as llama_cpp
options = llama_cpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.warmup, options.verbosity = sys.argv[1], 256, 1, 1, False, -1
answer = llama_cpp.Server(options).handle_completions(dict(prompt=json.loads(sys.argv[2]), n_predict=24, temperature=0.0, logprobs=5))
print(json.dumps([(token["id"], [(top["id"], top["logprob"]) for top in token["top_logprobs"]]) for token in answer["choices"][0]["logprobs"]["content"]]))
"""


def half_heads(bard):
    "bard with the first half of each head: heads of 16, together half as wide as the stream."
    def cut(values, axis):
        shape = values.shape[:axis] + (-1, bard.config.head_dim) + values.shape[axis + 1:]
        return np.take(values.reshape(shape), range(16), axis + 1).reshape(*values.shape[:axis], -1, *values.shape[axis + 1:])
    axes = dict(wq=0, wk=0, wv=0, wo=1)
    arrays = {name: cut(bard.read(name), axes[part]) if (part := name.split(".")[-2]) in axes else bard.read(name) for name in bard}
    return Checkpoint("bard", dataclasses.replace(bard.config, own_head_dim=16), {name: LazyTensor(values.shape, values.dtype, "bfloat16", lambda values=values: values) for name, values in arrays.items()})


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), LLAMA_3, RopeScaling("yarn", 4.0, 64), RopeScaling("yarn", 8.0, 32, attention_factor=1.1), "narrow heads"],
                         ids=["plain", "linear", "llama3", "yarn", "yarn of its own magnitude", "narrow heads"])
def test_llama_cpp_reads_what_we_write(scaling, tmp_path):
    "Bard, its vocabulary and a pretended scaling: llama.cpp, which rounds more on its way, goes on with the same tokens, as far as these are clear."
    if not importlib.util.find_spec("xllamacpp"): pytest.skip("xllamacpp is not installed: written GGUF files are not loaded by llama.cpp")
    from llama_nb.library import load
    from llama_nb.vocabularies import gguf_vocabulary, load_tokenizer
    bard, path = open_checkpoint(bard_folder()), tmp_path / "bard.gguf"
    pretended = half_heads(bard) if scaling == "narrow heads" else Checkpoint("bard", dataclasses.replace(bard.config, rope_scaling=scaling), dict(bard))
    write_gguf(path, pretended, gguf_vocabulary(load_tokenizer(bard_folder())))
    ours = load(path, dtype="float32")
    ids = list(map(int, ours.tokenizer.encode("To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune, or to take arms")))
    result = subprocess.run([sys.executable, "-c", LLAMA_CPP, path, json.dumps(ids)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    tokens = json.loads(result.stdout.splitlines()[-1])
    logits = np.asarray(ours.logits(ids + [token for token, _ in tokens]))[len(ids) - 1:-1].astype(np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for (token, top), row in zip(tokens, probabilities, strict=True):
        assert row[token] > row.max() - 0.02 and all(abs(np.exp(logprob) - row[other]) < 0.02 for other, logprob in top)


# The Hub, played by this computer ------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(files, refuse=None):
    "A stand-in for the Hub with one repository, somebody/tiny; `refuse`: a status and the Hub's code for what is wrong."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            asked.append((self.command, path, self.headers.get("Authorization")))
            if path.startswith("/api/models/somebody/tiny/tree/"):
                content = json.dumps([dict(type="file", path=name, size=len(data), oid=hashlib.sha1(data).hexdigest()) for name, data in files.items()]).encode()
            elif path.startswith("/api/models/somebody/tiny"): content = json.dumps(dict(id="somebody/tiny", sha=COMMIT, siblings=[dict(rfilename=name) for name in files])).encode()
            else: content = files.get(path.removeprefix(f"/somebody/tiny/resolve/{COMMIT}/"))
            status, code = (404, "RepoNotFound") if content is None else (200, None)
            if refuse and ("/resolve/" in path or refuse[1] != "GatedRepo"): status, code, content = *refuse, b"{}"
            self.send_response(status)
            for header, value in {"Content-Length": len(content or b""), "ETag": f'"{hashlib.sha1(content or b"").hexdigest()}"', "X-Repo-Commit": COMMIT, "X-Error-Code": code, "Content-Type": "application/json"}.items():
                if value is not None: self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET": self.wfile.write(content or b"")
        do_HEAD = do_GET
        def log_message(self, *_): pass
    asked, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(), server.server_close()


def python(program, tmp_path, address, **environment):
    "What a program writes that takes this address for the Hub's."
    settings = dict(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", no_proxy="127.0.0.1", HF_TOKEN="") | environment
    result = subprocess.run([sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fetched(tmp_path, name, address="http://127.0.0.1:9", **environment):
    "`fetch_repository` in a process of its own, as huggingface_hub reads its settings once: (path, None) or (None, the error's line)."
    program = f"from llama_nb.hub import *\nfrom llama_nb.checkpoint import CheckpointError\ntry: print(fetch_repository({name!r}, False))\nexcept CheckpointError as error: print('!', error)"
    [line] = python(program, tmp_path, address, **environment).splitlines()
    return (None, line[2:]) if line.startswith("!") else (Path(line), None)


def repository(folder):
    "The files of a folder, and others that nobody needs."
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"words", "onnx/model.onnx": b"x", "original/consolidated.00.pth": b"x", "tokenizer.json": b"{}",
                                                                         "pytorch_model.bin": b"the same weights", "model.Q8_0.gguf": b"the same weights"}


@pytest.mark.parametrize("name, shards", [("somebody/tiny", 1), (f"hf://somebody/tiny@{COMMIT}", 3)])
def test_a_repository_is_fetched_once(name, shards, arrays, tmp_path):
    folder = save_hf(tmp_path / "source", in_halves(CONFIG, arrays), shards=shards)
    with serving(repository(folder)) as (address, asked):
        path, error = fetched(tmp_path, name, address, HF_TOKEN="hf_secret")
        assert error is None and sorted(os.listdir(path)) == sorted([*os.listdir(folder), "tokenizer.json"])
        assert all(token == "Bearer hf_secret" for _, _, token in asked)
        downloads = sum(method == "GET" and "/resolve/" in asked_path for method, asked_path, _ in asked)
        assert downloads == len(os.listdir(path)) and fetched(tmp_path, name, address) == (path, None)
        assert downloads == sum(method == "GET" and "/resolve/" in asked_path for method, asked_path, _ in asked)
    checkpoint = open_checkpoint(path)
    assert all(checkpoint.read(weight).tobytes() == values.tobytes() for weight, values in arrays.items())
    for offline in (dict(HF_HUB_OFFLINE="1"), {}): assert fetched(tmp_path, name, **offline) == (path, None)


def test_a_model_from_the_hub_writes(tmp_path):
    write_form("hf", bard_folder(), tmp_path / "bard")
    program = "from llama_nb.cli import main; main('generate -m {} -p To -n 5 --temp 0'.split())"
    with serving({path.name: path.read_bytes() for path in (tmp_path / "bard").iterdir()}) as (address, _):
        assert python(program.format("somebody/tiny"), tmp_path, address) == python(program.format("bard"), tmp_path, address)


def test_pickles_where_there_are_no_safetensors(arrays, tmp_path):
    folder = save_hf(tmp_path / "source", in_halves(CONFIG, arrays), "pytorch_model.bin", 2)
    with serving({name: content for name, content in repository(folder).items() if name != "pytorch_model.bin"}) as (address, _):
        path, _ = fetched(tmp_path, "somebody/tiny", address)
    assert open_checkpoint(path).config == CONFIG


def test_gguf_files(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", open_checkpoint(bard_folder()))
    weights = (tmp_path / "tiny.gguf").read_bytes()
    with serving({"tiny.Q8_0.gguf": weights, "config.json": b"{}"}) as (address, _):
        assert list(open_checkpoint(fetched(tmp_path, "somebody/tiny", address)[0])) == list(open_checkpoint(bard_folder()))
    with serving({"tiny.Q8_0.gguf": weights, "tiny.Q4_0.gguf": weights}) as (address, _):
        assert fetched(tmp_path, "somebody/tiny", address)[1] == "somebody/tiny: one file should be named after the repository, one of tiny.Q8_0.gguf, tiny.Q4_0.gguf"
        assert fetched(tmp_path, "hf://somebody/tiny/tiny.Q4_0.gguf", address)[0].name == "tiny.Q4_0.gguf"
        assert "has no file tiny.Q2_K.gguf" in fetched(tmp_path, "somebody/tiny/tiny.Q2_K.gguf", address)[1]


@pytest.mark.parametrize("files, refuse, words", [
    ({"README.md": b"words"}, None, "safetensors, pickles or one GGUF file was expected in it, found README.md"), ({"config.json": b"{}", "model.safetensors": b""}, (403, "GatedRepo"), "gated: ask for access"),
    ({}, (401, "RepoNotFound"), "no such repository on the Hub"), ({}, (404, "RevisionNotFound"), "no such revision"), ({}, (500, None), "the Hub cannot be reached, and its cache here has no copy"),
    (None, None, "the Hub cannot be reached, and its cache here has no copy")], ids=str)
def test_what_the_hub_does_not_give(files, refuse, words, tmp_path):
    with contextlib.nullcontext(("http://127.0.0.1:9", [])) if files is None else serving(files, refuse) as (address, _):
        path, error = fetched(tmp_path, "somebody/tiny", address)
    assert path is None and error.startswith("somebody/tiny: ") and words in error


@pytest.mark.parametrize("name", ["tiny", "a/b/c/d@e@f", "hf://tiny", "../..", "https://somebody/tiny", ""])
def test_names_that_no_repository_has(name):
    assert complaint(hub.fetch_repository, name).startswith(f"{name}: ")
