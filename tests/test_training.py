"""The training chapter: its data, its measure, that an interrupted training goes on, adapters, and that what it saves can be read by others."""
import dataclasses
import json
import math
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from llama_nb import training
from llama_nb.meta import config_from_params
from llama_nb.checkpoint import CheckpointError, LlamaConfig, bard_folder
from llama_nb.meta import write_meta
from llama_nb.block import listening
from llama_nb.hub import open_checkpoint
from llama_nb.model import build_model, load_weights, read_weight
from llama_nb.tokenizer import TokenizerError
from llama_nb.vocabularies import SentencePieceTokenizer, synth_tokenizer
from llama_nb.finetuning import PROJECTIONS, adapter_variables, add_lora, load_lora, merge_lora, save_lora
from llama_nb.training import (batches, bits_per_byte, compile_for_training, dropping, encode_texts, load_state, save_state, split_plays, train,
                               train_corpus)

TINY = config_from_params(dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=16, max_seq_len=16))
VERSE = "And all our yesterdays have lighted fools the way to dusty death.\n" * 40
RECIPE = dict(steps=60, batch_size=4, peak=1e-2, dropout=0.1, measure_every=30)


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(synth_tokenizer(300))


@pytest.fixture(scope="module")
def trained(tokenizer):
    return train(TINY, tokenizer, [VERSE], [VERSE[:500]], **RECIPE)


def numbers(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def test_held_out_plays_are_in_no_training_text():
    texts = {"macbeth": "a", "twelfth_night": "b", "hamlet": "c"}
    assert split_plays(texts) == (["c"], ["a", "b"])


def test_targets_are_the_inputs_one_token_later(tokenizer):
    ids = encode_texts(tokenizer, [VERSE, VERSE])
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and len(ids) == 2 * len(encode_texts(tokenizer, [VERSE]))
    inputs, targets = (part.numpy() for part in next(iter(batches(ids, 16, 4, seed=1))))
    assert inputs.shape == (4, 16) and (inputs[:, 1:] == targets[:, :-1]).all()


def test_a_pass_reads_every_window_once_and_passes_differ():
    stream = [inputs.numpy() for inputs, _ in batches(np.arange(83, dtype="int32"), 8, 3).take(6)]
    one, other = np.concatenate(stream[:3]), np.concatenate(stream[3:])
    for windows in one, other:
        begins = np.sort(windows[:, 0])
        assert (np.diff(begins) == 8).all() and (windows == windows[:, :1] + np.arange(8)).all()
    assert not (one == other).all()


@pytest.mark.parametrize("first", [0, 1, 3, 7])
def test_batches_depend_on_seed_and_step_alone(first):
    def stream(seed, first=0): return [inputs.numpy() for inputs, _ in batches(np.arange(83, dtype="int32"), 8, 3, seed, first).take(9 - first)]
    assert (np.array(stream(5, first)) == np.array(stream(5)[first:])).all() and not (np.array(stream(5)) == np.array(stream(6))).all()


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(TokenizerError, match="at least 40 tokens, found 39"):
        batches(np.arange(39, dtype="int32"), 8, 4)


def test_bits_per_byte_counts_every_token_once(tokenizer):
    "A model whose logits are all zero pays log2(vocabulary) for each token, whatever the windows' length."
    model = build_model(TINY, initializer="zeros")
    expected = math.log2(TINY.vocab_size) * (len(encode_texts(tokenizer, [VERSE])) - 1) / len(VERSE.encode())
    for length in (7, 16):
        assert bits_per_byte(model, tokenizer, [VERSE], length) == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_and_logs_it(trained):
    _, log = trained
    assert [row["step"] for row in log["training"]] == [20, 40, 60] and [row["step"] for row in log["held_out"]] == [30, 60]
    costs = [row["bits_per_byte"] for row in log["held_out"]]
    assert log["training"][0]["loss"] < math.log(300) + 0.2 and costs[1] < costs[0] < 8 and 0 < log["clock"]["cpu_minutes"]


@pytest.mark.parametrize("vocab_size, heads", [(300, 4), (2048, 2)])
def test_an_untrained_model_pays_the_logarithm_of_the_vocabulary(vocab_size, heads):
    config = dataclasses.replace(TINY, vocab_size=vocab_size, n_kv_heads=heads)
    model = build_model(config, initializer=keras.initializers.RandomNormal(stddev=0.02))
    ids = np.random.default_rng(0).integers(0, vocab_size, (4, 17))
    loss = ops.mean(ops.sparse_categorical_crossentropy(ids[:, 1:], model(ids[:, :-1]), from_logits=True))
    assert float(loss) == pytest.approx(math.log(vocab_size), abs=0.05)


class Killed(Exception):
    "Stands for a kill."


def kill_at(step):
    def measure(model):
        if int(model.optimizer.iterations) == step:
            raise Killed
        return {}
    return measure


def test_a_killed_training_goes_on_as_if_nothing_had_happened(trained, tokenizer, tmp_path):
    (model, log), state = trained, tmp_path / "state.npz"
    with pytest.raises(Killed):
        train(TINY, tokenizer, [VERSE], [VERSE[:500]], state=state, save_minutes=0, measure=kill_at(30), **RECIPE)
    assert [row["step"] for row in load_state(state)[1]["log"]["training"]] == [20]
    again, log_again = train(TINY, tokenizer, [VERSE], [VERSE[:500]], state=state, **RECIPE)
    assert all((a == b).all() for a, b in zip(numbers(model.weights), numbers(again.weights), strict=True))
    assert log["held_out"] == log_again["held_out"] and [row["loss"] for row in log["training"]] == [row["loss"] for row in log_again["training"]]


def test_half_precision_learns_as_much_and_keeps_float32(trained, tokenizer):
    model, log = train(TINY, tokenizer, [VERSE], [VERSE[:500]], dtype="mixed_bfloat16", **RECIPE)
    assert {str(weight.dtype) for weight in model.weights} == {"float32"} and model.get_layer("norm").compute_dtype == "bfloat16"
    assert log["held_out"][-1]["bits_per_byte"] == pytest.approx(trained[1]["held_out"][-1]["bits_per_byte"], rel=0.05)


def test_in_half_precision_all_but_products_and_random_numbers_are_compiled():
    model = compile_for_training(build_model(TINY, "mixed_bfloat16"), steps=3)
    ids = np.arange(4 * 16, dtype="int32").reshape(4, 16)
    with listening(dropping(0.1, keras.random.SeedGenerator(0))):
        graph = tf.function(model.train_step).get_concrete_function((ids, ids)).graph
    marked = {}
    for node in graph.as_graph_def().node:
        marked.setdefault(node.op, set()).add("_XlaCompile" in node.attr and node.attr["_XlaCompile"].b)
    products = {"MatMul", "Einsum", "StatelessRandomUniformV2"}
    assert products <= set(marked) and all(marked[op] == {False} for op in products)
    assert all(True in marked[op] for op in ("Softmax", "Mul", "Rsqrt", "Sigmoid", "SparseSoftmaxCrossEntropyWithLogits"))


def test_half_precision_finds_the_losses_of_keras_own_step():
    inputs, targets = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 4, 16)).astype("int32")
    def losses(keras_own):
        keras.utils.set_random_seed(0)
        model = compile_for_training(build_model(TINY, "mixed_bfloat16", "glorot_uniform"), steps=5)
        if keras_own:
            del model.train_step
        return [float(model.train_on_batch(inputs, targets)) for _ in range(5)]
    assert losses(keras_own=False) == pytest.approx(losses(keras_own=True), rel=0.005)


def test_a_training_goes_on_only_as_it_began(tokenizer, tmp_path):
    state, recipe = tmp_path / "state.npz", RECIPE | dict(steps=20)
    train(TINY, tokenizer, [VERSE], [VERSE[:500]], state=state, **recipe)
    for name, value in dict(seed=1, steps=80, dropout=0.2, dtype="mixed_bfloat16").items():
        with pytest.raises(CheckpointError, match=f"state.npz: {name} was"):
            train(TINY, tokenizer, [VERSE], [VERSE[:500]], state=state, **recipe | {name: value})


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"no archive" * 9])
def test_a_damaged_state_is_refused(tmp_path, damage):
    path = tmp_path / "state.npz"
    save_state(path, [np.ones(3)], dict(step=1))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="state.npz: not the state of a training"):
        load_state(path)


def test_norms_are_spared_from_weight_decay():
    model = compile_for_training(build_model(TINY, initializer="zeros"), 10)
    spared = [variable.path for variable in model.trainable_variables if not model.optimizer._use_weight_decay(variable)]
    assert len(spared) == 2 * TINY.n_layers + 1 and all("norm" in path for path in spared)


def test_saved_model_is_read_back(trained, tokenizer, tmp_path):
    model, _ = trained
    write_meta(tmp_path / "model", TINY, lambda name: read_weight(model, name), {"tokenizer.model": synth_tokenizer(300)}, dtype="float32")
    again = load_weights(build_model(TINY), open_checkpoint(tmp_path / "model"))
    ids = np.arange(16)[None]
    assert (keras.ops.convert_to_numpy(again(ids)) == keras.ops.convert_to_numpy(model(ids))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_reads_what_was_saved(trained, tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install llama_nb[parity]")
    model, _ = trained
    write_meta(tmp_path / "model", TINY, lambda name: read_weight(model, name), dtype=dtype)
    state = torch.load(tmp_path / "model/consolidated.00.pth", weights_only=True, mmap=True)
    assert list(state) == list(TINY.tensor_shapes())
    for name, tensor in state.items():
        expected = torch.from_numpy(np.array(read_weight(model, name))).to(getattr(torch, dtype))
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


def test_bard_is_what_the_chapter_describes():
    checkpoint = open_checkpoint(bard_folder())
    assert checkpoint.config == training.BARD and checkpoint.config.n_parameters < 5_000_000
    assert checkpoint.config.n_kv_heads < checkpoint.config.n_heads
    record = json.loads((bard_folder() / "training.json").read_text())
    assert record["training"][-1]["step"] == record["held_out"][-1]["step"] and record["held_out"][-1]["bits_per_byte"] < 2.6


@pytest.mark.parametrize("parts", [("attention.wq", "attention.wv"), PROJECTIONS])
def test_merged_equals_adapted(tokenizer, tmp_path, parts):
    model = add_lora(build_model(TINY, initializer=keras.initializers.RandomNormal(stddev=0.05)), 2, parts)
    ids, before = np.arange(16)[None], numbers(model.non_trainable_variables)
    plain = ops.convert_to_numpy(model(ids))
    compile_for_training(model, 5, peak=1e-2).fit(batches(encode_texts(tokenizer, [VERSE]), 16, 4), steps_per_epoch=5, verbose=0, shuffle=False)
    adapted = ops.convert_to_numpy(model(ids))
    assert np.abs(adapted - plain).max() > 1e-3 and all((a == b).all() for a, b in zip(before, numbers(model.non_trainable_variables)))
    save_lora(tmp_path / "adapters", model)
    merged = merge_lora(model)
    assert (ops.convert_to_numpy(merged(ids)) == adapted).all()
    write_meta(tmp_path / "merged", TINY, lambda name: read_weight(merged, name), dtype="float32")
    again = load_weights(build_model(TINY), open_checkpoint(tmp_path / "merged"))
    assert np.abs(ops.convert_to_numpy(again(ids)) - adapted).max() < 1e-5


@pytest.mark.parametrize("parts", [("attention.wv",), PROJECTIONS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_kept_in_a_small_file(tmp_path, dtype, parts):
    keras.utils.set_random_seed(0)
    one, two = (build_model(TINY, dtype, keras.initializers.RandomNormal(stddev=0.05, seed=1)) for _ in range(2))
    for variable in adapter_variables(add_lora(one, 2, parts)):
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    save_lora(tmp_path / "adapters", one)
    ids = np.arange(16)[None]
    assert (ops.convert_to_numpy(load_lora(tmp_path / "adapters", two)(ids)) == ops.convert_to_numpy(one(ids))).all()
    assert {variable.dtype for variable in adapter_variables(two)} == {"float32"} and (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size < 20_000


def test_adapters_of_another_model_are_refused(tmp_path):
    save_lora(tmp_path / "adapters", add_lora(build_model(TINY), rank=2))
    other = build_model(dataclasses.replace(TINY, n_kv_heads=4))
    with pytest.raises(CheckpointError, match="adapters: model.layers.0.self_attn.v_proj should adapt a matrix of .*: another model's?"):
        load_lora(tmp_path / "adapters", other)
    assert all(variable.trainable for variable in other.weights)
    write_meta(tmp_path / "model", TINY, lambda name: read_weight(build_model(TINY), name))
    with pytest.raises(CheckpointError, match="adapter_config.json: no such file"): load_lora(tmp_path / "model", other)


def test_adapters_on_parts_that_there_are(tmp_path):
    model = build_model(TINY)
    with pytest.raises(CheckpointError, match="parts should be among attention.wq, .*, found attention.q"):
        add_lora(model, 2, ["attention.wv", "attention.q"])
    assert all(variable.trainable for variable in model.weights)
    for use in (merge_lora, lambda model: save_lora(tmp_path / "adapters", model)):
        with pytest.raises(CheckpointError, match="should have adapters, found none"):
            use(model)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text((bard_folder().parent / "macbeth.txt").read_text(), encoding="utf-8")
    return folder


def test_a_model_of_any_text(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "seconds_per_step", lambda *_: 2.0)
    report = train_corpus(corpus, tmp_path / "out", "infant", minutes=1)
    assert report["steps"] == 30 and report["bits_per_byte"] < 8
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"params.json", "consolidated.00.pth", "tokenizer.model", "training.json"}
    with pytest.raises(CheckpointError, match="out: an empty or new folder was expected"):
        train_corpus(corpus, tmp_path / "out", "infant", minutes=1)


@pytest.mark.parametrize("name, content, message", [
    ("none", None, "none: no such file"), ("empty.txt", b"", "empty.txt: the file is empty"), ("bytes.txt", b"To be\xff", "bytes.txt: should be text in UTF-8"),
    ("short.txt", b"To be, or not to be.", "too short for a vocabulary of 512")])
def test_texts_that_cannot_be_trained_on(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, TokenizerError), match=message):
        train_corpus(tmp_path / name, tmp_path / "out", "infant")


@pytest.fixture(scope="module")
def bench(request):
    folder = str(request.config.rootpath / "bench")
    sys.path.insert(0, folder)
    import importlib
    yield importlib.import_module("training")
    sys.path.remove(folder)


def test_variants_have_the_same_size_and_are_what_they_say(bench):
    sizes = {}
    for name, parts in bench.RUNS.items():
        config = bench.same_size(training.BARD, parts)
        sizes[name] = bench.build_variant(config, parts).count_params()
        assert sizes[name] == bench.count_parameters(config, parts)
    assert max(sizes.values()) < 1.01 * min(sizes.values()) and sizes["LLaMA"] == training.BARD.n_parameters


def test_the_variant_with_all_of_llama_s_parts_is_the_llama(bench):
    model = build_model(TINY, initializer=keras.initializers.RandomNormal(stddev=0.3))
    variant = bench.build_variant(TINY, bench.LLAMA)
    ours = {name.removesuffix(".weight"): read_weight(model, name) for name in TINY.tensor_shapes()}
    block = variant.get_layer("layers.0")
    variant.get_layer("tok_embeddings").weights[0].assign(ours["tok_embeddings"])
    variant.get_layer("output").weights[0].assign(ours["output"].T)
    for name in ("wq", "wk", "wv", "wo"): getattr(block, name).weights[0].assign(ours[f"layers.0.attention.{name}"].T)
    for name in ("w1", "w2", "w3"): getattr(block, name).weights[0].assign(ours[f"layers.0.feed_forward.{name}"].T)
    ids = np.arange(16)[None]
    assert np.abs(ops.convert_to_numpy(variant(ids)) - ops.convert_to_numpy(model(ids))).max() < 1e-4


def test_pytorch_s_llama_has_the_same_loss(bench):
    pytest.importorskip("torch", reason="torch is not installed: pip install llama_nb[parity]")
    batch = np.random.default_rng(0).integers(0, 2048, (2, 2, 32)).astype("int32")
    model = load_weights(build_model(training.BARD), open_checkpoint(bard_folder()))
    loss = ops.mean(ops.sparse_categorical_crossentropy(batch[1], model(batch[0]), from_logits=True))
    assert bench.torch_step(2, batch)() == pytest.approx(float(loss), rel=1e-4)
