"""The training chapter: its data, its measure, and that what it saves can be read by others."""
import json
import math

import keras
import numpy as np
import pytest

from llama_nb import training
from llama_nb.checkpoint import LlamaConfig, bard_folder, write_meta
from llama_nb.forms import open_checkpoint
from llama_nb.model import build_model, load_weights, read_weight
from llama_nb.tokenizer import SentencePieceTokenizer, synth_tokenizer
from llama_nb.training import batches, bits_per_byte, compile_for_training, encode_texts, split_plays, train

TINY = LlamaConfig.from_params(dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=16, max_seq_len=16))
VERSE = "And all our yesterdays have lighted fools the way to dusty death.\n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(synth_tokenizer(300))


@pytest.fixture(scope="module")
def trained(tokenizer):
    return train(TINY, tokenizer, [VERSE], [VERSE[:500]], steps=60, batch_size=4, epochs=2, peak=1e-2, verbose=0)


def test_held_out_plays_are_in_no_training_text():
    texts = {"macbeth": "a", "twelfth_night": "b", "hamlet": "c"}
    assert split_plays(texts) == (["c"], ["a", "b"])


def test_targets_are_the_inputs_one_token_later(tokenizer):
    ids = encode_texts(tokenizer, [VERSE, VERSE])
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and len(ids) == 2 * len(encode_texts(tokenizer, [VERSE]))
    inputs, targets = (part.numpy() for part in next(iter(batches(ids, 16, 4, seed=1))))
    again, _ = (part.numpy() for part in next(iter(batches(ids, 16, 4, seed=1))))
    assert inputs.shape == (4, 16) and (inputs[:, 1:] == targets[:, :-1]).all() and (inputs == again).all()


def test_every_window_is_drawn():
    inputs, targets = (part.numpy() for part in next(iter(batches(np.arange(6, dtype="int32"), 4, 50))))
    assert set(inputs[:, 0]) == {0, 1} and (targets == inputs + 1).all()


def test_bits_per_byte_counts_every_token_once(tokenizer):
    "A model whose logits are all zero pays log2(vocabulary) for each token, whatever the windows' length."
    model = build_model(TINY, initializer="zeros")
    expected = math.log2(TINY.vocab_size) * (len(encode_texts(tokenizer, [VERSE])) - 1) / len(VERSE.encode())
    for length in (7, 16):
        assert bits_per_byte(model, tokenizer, [VERSE], length) == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_and_logs_it(trained):
    model, log = trained
    assert [row["step"] for row in log.rows] == [20, 40, 60] and [row["step"] for row in log.held_out] == [30, 60]
    assert log.rows[0]["loss"] < math.log(300) + 0.2 and log.held_out[1]["bits_per_byte"] < log.held_out[0]["bits_per_byte"] < 8


def test_norms_are_spared_from_weight_decay():
    model = compile_for_training(build_model(TINY, initializer="zeros"), 10)
    spared = [variable.path for variable in model.trainable_variables if not model.optimizer._use_weight_decay(variable)]
    assert len(spared) == 2 * TINY.n_layers + 1 and all("norm" in path for path in spared)


def test_saved_model_is_read_back(trained, tokenizer, tmp_path):
    model, _ = trained
    write_meta(tmp_path / "model", TINY, lambda name: read_weight(model, name), synth_tokenizer(300), dtype="float32")
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
    assert record["training"][-1]["step"] == record["held_out"][-1]["step"] == 2400 and record["held_out"][-1]["bits_per_byte"] < 2.6
