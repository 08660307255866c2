"""The fast engine by default: what isn't converted is converted once, into the cache, whoever asks, however many at once."""
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_nb import conversion, engine, files, library
from llama_nb.checkpoint import CheckpointError, LlamaConfig, bard_folder
from llama_nb.cli import main
from llama_nb.conversion import LiteRTLlama
from llama_nb.engine import available_cores, cpu_quota, control_groups
from llama_nb.inside import trace
from llama_nb.library import cached_models, describe, load, remove_cached
from llama_nb.meta import write_meta
from llama_nb.positions import RopeScaling
from llama_nb.sampling import GenerationError
from llama_nb.vocabularies import synth_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=300, context_length=64)
IDS = [1, 70, 80, 90]


def write_tiny(folder, seed=0, **changes):
    config, rng = dataclasses.replace(TINY, **changes), np.random.default_rng(seed)
    shapes = config.tensor_shapes()
    write_meta(folder, config, lambda name: rng.standard_normal(shapes[name]) * 0.05 + (len(shapes[name]) == 1),
               {"tokenizer.model": synth_tokenizer(config.vocab_size)})
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path, cache):
    return write_tiny(tmp_path / "source")


@pytest.fixture
def conversions(monkeypatch):
    convert, done = conversion.convert, []
    monkeypatch.setattr(conversion, "convert", lambda *arguments: done.append(arguments) or convert(*arguments))
    return done


def forms(cache):
    return sorted(path.name for path in (cache / "converted").glob("*/"))


def test_converted_once(source, cache, conversions):
    first, second = load(source), load(source)
    assert isinstance(first, LiteRTLlama) and first.dtype == second.dtype == "int8" and first.path == source
    assert np.array_equal(first.logits(IDS), second.logits(IDS)) and len(conversions) == 1
    assert load(source, dtype="int4").dtype == "int4" and len(conversions) == 2 and len(forms(cache)) == 2
    assert load(source).dtype == "int8" and len(conversions) == 2, "int4 was asked for once, and is not the default"


def test_a_form_in_the_cache_needs_no_look_at_the_source(source, cache, monkeypatch):
    load(source)
    monkeypatch.setattr(library, "open_with_tokenizer", None)
    load(source)


def test_a_source_that_changed_is_converted_anew(source, cache, conversions):
    before = load(source).logits(IDS)
    shutil.rmtree(source)
    write_tiny(source, seed=1)
    after = load(source)
    assert len(conversions) == 2 and len(forms(cache)) == 1 and np.abs(after.logits(IDS) - before).max() > 0.1
    exact = load(source, dtype="float32").logits(IDS)
    assert np.abs(after.logits(IDS) - exact).max() < 0.1 < np.abs(before - exact).max()


def test_a_form_of_an_older_version_is_made_anew(source, cache, conversions, monkeypatch):
    load(source)
    monkeypatch.setattr(conversion, "FORMAT", conversion.FORMAT + 1)
    load(source)
    assert len(conversions) == 2 and len(forms(cache)) == 1


def test_an_interrupted_conversion_goes_on(source, cache, monkeypatch):
    write = conversion.write_program

    def interrupted(path, *arguments):
        if "layers.1" in path.name: raise KeyboardInterrupt
        write(path, *arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "write_program", interrupted)
        load(source)
    (form,) = forms(cache)
    kept = cache / "converted" / form / "layers.0.tflite"
    when = kept.stat().st_mtime_ns
    assert [row["kind"] for row in cached_models()] == ["unfinished"]
    load(source)
    assert kept.stat().st_mtime_ns == when
    (cache / "converted" / form / "manifest.json").unlink()
    (cache / "converted" / form / "unfinished.json").write_text("{}")
    load(source)
    assert kept.stat().st_mtime_ns != when, "the beginning of something else is removed"


LOAD = "import sys, llama_nb; print(llama_nb.load(sys.argv[1]).generate('a', max_new_tokens=3, temperature=0))"


@pytest.mark.parametrize("killed", [0, 1])
def test_several_processes_at_once(source, cache, killed):
    def start(): return subprocess.Popen([sys.executable, "-c", LOAD, str(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if killed:
        victim = start()
        while not list((cache / "converted").glob("*/tok_embeddings.npy")): time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    processes = [start() for _ in range(int(os.environ.get("LLAMA_NB_SOAK", 4)))]
    texts = {(process.communicate(timeout=240), process.returncode)[0][0] for process in processes}
    assert len(texts) == 1 and texts.pop() and not any(process.returncode for process in processes)
    assert len(forms(cache)) == 1


# Which dtype.

def test_int4_where_int8_does_not_fit(source, cache, monkeypatch, capsys):
    rows = {row["dtype"]: row for row in describe(source)["memory"]}
    sizes = {dtype: row["weights_bytes"] + row["cache_bytes"] for dtype, row in rows.items()}
    monkeypatch.setattr(conversion, "available_memory", lambda: (sizes["int8"] + sizes["int4"]) // 2)
    monkeypatch.setattr(conversion, "check_memory", lambda *_: None)
    assert load(source).dtype == "int4" and "int8 does not fit into memory; computing in int4" in capsys.readouterr().err


def test_a_context_beyond_fixed_positions_takes_float32(tmp_path, cache, capsys):
    folder = write_tiny(tmp_path / "dynamic")
    checkpoint = dataclasses.replace(TINY, rope_scaling=RopeScaling("dynamic", 2.0, 32))
    choose, lines = library.choose_dtype, []
    source = library.open_with_tokenizer(folder)[0]
    source.config = checkpoint
    assert choose(source, checkpoint, None, lines.append) == "float32" and "computing in float32" in lines[0]
    assert choose(source, dataclasses.replace(checkpoint, context_length=32), None, lines.append) == "int8" and len(lines) == 1
    with pytest.raises(GenerationError, match="--context-length 32 goes with int8"): choose(source, checkpoint, "int8")


def test_most_matrices_decide():
    assert conversion.usual_dtype(["Q4_0"] * 8 + ["Q6_K"]) == "int4"
    assert conversion.usual_dtype(["Q4_1"] * 8) == conversion.usual_dtype(["bfloat16"]) == conversion.usual_dtype(["Q4_0", "F16"]) == "int8"


# float32 where it is needed.

def test_the_keras_model_is_built_when_it_is_asked_for(source, cache, capsys):
    llm, exact = load(source), load(source, dtype="float32")
    assert "model" not in vars(llm)
    assert np.array_equal(np.asarray(llm.model(np.array([IDS])))[0], exact.logits(IDS)) and not np.array_equal(llm.logits(IDS), exact.logits(IDS))
    assert np.array_equal(trace(llm, IDS)["logits"], trace(exact, IDS)["logits"])


def test_a_source_that_is_gone(source, tmp_path, cache, capsys):
    folder = conversion.convert(source, tmp_path / "it", "int8")
    expected = load(folder).logits(IDS)
    assert np.abs(load(folder, dtype="float32").logits(IDS) - load(source, dtype="float32").logits(IDS)).max() == 0
    source.rename(tmp_path / "moved")
    llm = load(folder)
    assert np.abs(np.asarray(llm.model(np.array([IDS])))[0] - expected).max() < 0.05
    line, = capsys.readouterr().err.splitlines()
    assert "is gone or has changed; its own int8 weights" in line


# What the cache holds.

def test_list_and_rm(source, cache, capsys):
    load(source), load("bard", dtype="int4")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].endswith(str(cache)) and sum(str(source) in line for line in lines) == 2
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["name"], row["kind"], row["dtype"]) for row in rows} == {
        (name, kind, dtype) for name, dtype in ((str(source), "int8"), ("bard", "int4")) for kind in ("converted", "packed")}
    assert main(["rm", "bard"]) == 0 and "freed: converted, packed" in capsys.readouterr().out
    assert {row["name"] for row in cached_models()} == {str(source)}
    assert main(["rm", "bard"]) == 2 and "holds nothing of this name" in capsys.readouterr().err
    remove_cached("all")
    assert cached_models() == [] and load(source).dtype == "int8"


def test_no_room_for_the_conversion(source, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("usage", (), dict(free=1000)))
    with pytest.raises(CheckpointError, match="GB of disk are needed"): load(source)
    assert not any(cache.rglob("*.tflite"))


def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="LLAMA_NB_CACHE may name another folder"): load(source)


def test_a_source_that_vanishes(source, cache, monkeypatch):
    begin = conversion.begin

    def vanishing(*arguments):
        begin(*arguments)
        shutil.rmtree(source)
    monkeypatch.setattr(conversion, "begin", vanishing)
    with pytest.raises(CheckpointError, match="source"): load(source)


# The process that computes.

def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


@pytest.mark.parametrize("lines", [["generate -m {} -p a -n 2"], ["generate -m {} -p a -n 2 --dtype int4", "list", "rm {}"], ["info {}", "convert {} {}-form"]])
def test_no_tensorflow(source, cache, lines):
    code = f"import shlex, sys; from llama_nb.cli import main\nfor line in {[line.format(source, source) for line in lines]}: assert main(shlex.split(line)) == 0\n" \
           "print(*{'keras', 'matplotlib', 'tensorflow', 'torch'} & set(sys.modules), file=sys.stderr)"
    done = run(code)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "", done.stderr


def test_the_hosts_standard_error_is_its_own(source, cache):
    done = run(f"import atexit, os, sys; atexit.register(lambda: sys.stderr.write('mine, last\\n')); waits = os.environ.get('OMP_WAIT_POLICY'); import llama_nb\n"
               f"llama_nb.load({str(source)!r}).generate('a', max_new_tokens=2); assert os.environ.get('OMP_WAIT_POLICY') == waits")
    assert done.returncode == 0 and done.stderr == "mine, last\n"


def test_cores(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "groups").write_text("0::/a/b\n")
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    folders = control_groups(tmp_path, tmp_path / "groups")
    assert [folder.relative_to(tmp_path).as_posix() for folder in folders] == ["a/b", "a", "."]
    assert [cpu_quota(folder) for folder in folders] == [float("inf"), 2.5, float("inf")]
    old = tmp_path / "cpu,cpuacct" / "pod"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("150000\n"), (old / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "groups").write_text("4:cpu,cpuacct:/pod\n")
    assert cpu_quota(control_groups(tmp_path, tmp_path / "groups")[0]) == 1.5
    monkeypatch.setattr(engine, "control_groups", lambda: [old])
    assert available_cores() == 1
    with pytest.raises(GenerationError, match="from 1 to 1"): load("bard", threads=2)


def pass_of_attention(context, rows=5, heads=8, kv_heads=2, width=16):
    "A pass over the last places of a context, and an empty cache: the arguments of `CachedAttention` up to the result, and the cache."
    rng, angles = np.random.default_rng(0), np.outer(np.arange(context), 0.3 ** np.arange(width // 2))
    config = dataclasses.replace(TINY, n_layers=1, dim=heads * width, n_heads=heads, n_kv_heads=kv_heads, context_length=context)
    qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * width)).astype("float32")
    places = np.arange(context - rows, context, dtype="int32")
    return (qkv, np.zeros(rows, "int32"), places, *np.stack([np.cos(angles), np.sin(angles)]).astype("float32"), np.empty((rows, heads * width), "float32")), engine.Cache(config, 1)


def test_many_threads_give_what_one_gives(monkeypatch):
    def attend(threads, window):
        given, cache = pass_of_attention(40)
        engine.CachedAttention(*given, cache.shape, window, threads).run(cache.addresses[0])
        return given[-1]
    expected = {window: attend(1, window) for window in (2**31 - 1, 7)}
    monkeypatch.setattr(engine, "WORTH_DIVIDING", 0)
    for window in expected:
        for threads in (2, 3, 7): assert np.array_equal(attend(threads, window), expected[window])


def test_compiled_loops_are_the_plain_ones():
    (*given, mixed), cache = pass_of_attention(12)
    plain = [array.copy() for array in given], [array.copy() for array in cache.blocks[0]], np.empty_like(mixed)
    engine.CachedAttention(*given, mixed, cache.shape, window=6).run(cache.addresses[0])
    engine.store_rows(*plain[0], *plain[1])
    engine.attend_heads(*plain[0], *plain[1], plain[2], np.empty(12, "float32"), 6, 0, plain[2].size // 16)
    for found, expected in zip(cache.blocks[0], plain[1]): np.testing.assert_allclose(found, expected, atol=1 if found.dtype == np.int8 else 1e-6)
    np.testing.assert_allclose(mixed, plain[2], atol=0.01)


def test_loops_refuse_other_arrays():
    (qkv, *given), cache = pass_of_attention(12)
    for wrong in (qkv.astype("float64"), np.asfortranarray(qkv)):
        with pytest.raises(ValueError, match="qkv should be a contiguous array of float32"): engine.CachedAttention(wrong, *given, cache.shape)


def test_loops_are_compiled_once(tmp_path):
    def numba_was_needed():
        done = run("import sys; from llama_nb import engine; engine.loops_library(); print('numba' in sys.modules)", LLAMA_NB_CACHE=str(tmp_path))
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout == "True\n"
    assert [numba_was_needed(), numba_was_needed()] == [True, False]
    [file] = (tmp_path / "compiled").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert [numba_was_needed(), numba_was_needed()] == [True, False]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_temporary_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = files.own_temporary_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and files.own_temporary_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(CheckpointError, match="others may write there"): files.own_temporary_folder()
    folder.rmdir()
    folder.symlink_to("/etc")
    with pytest.raises(CheckpointError): files.own_temporary_folder()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root, to become somebody without a home")
def test_no_home_and_a_read_only_installation(tmp_path):
    tmp_path.chmod(0o777)
    for each in tmp_path.parents:
        if each != Path("/tmp") and str(each).startswith("/tmp/"): each.chmod(0o755)
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable]
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_NB_CACHE"} | dict(HOME="/nonexistent", TMPDIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([*command, "-c", "from llama_nb.cli import main; import sys; sys.exit(main())", "generate", "-m", "bard", "-p", "To be", "-n", "2"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    if done.returncode and "Permission denied" in done.stderr: pytest.skip("this interpreter can't be run by another user")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "llama_nb-12345" / "converted").is_dir()


# Q4_0.

def write_q4_0(path, source):
    "A GGUF file of Q4_0 blocks, as llama.cpp's tools write it."
    import gguf
    from llama_nb.gguf import add_fields, gguf_fields, gguf_tensors
    from llama_nb.vocabularies import gguf_vocabulary, open_with_tokenizer
    checkpoint, tokenizer = open_with_tokenizer(source)
    writer, kind = gguf.GGUFWriter(path, "llama"), gguf.GGMLQuantizationType.Q4_0
    add_fields(writer, gguf_fields(checkpoint.config) | gguf_vocabulary(tokenizer))
    for name, tensor in gguf_tensors(checkpoint).items():
        values = np.asarray(tensor.read(), np.float32)
        if name.startswith("blk") and values.ndim == 2: writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else: writer.add_tensor(name, values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


def test_q4_0_keeps_its_numbers(tmp_path, cache, capsys):
    file = write_q4_0(tmp_path / "model.gguf", write_tiny(tmp_path / "source", hidden_dim=128))
    llm = load(file)
    assert llm.dtype == "int4"
    found = conversion.read_program(llm.converted.path / "layers.0.tflite")["wo"]
    exact = library.open_model(file)[2].read("layers.0.attention.wo.weight")
    blocks = exact.reshape(len(exact), -1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    close = (np.abs(found.dequantize() - exact).reshape(blocks.shape) <= np.abs(blocks) / 250).all(-1)
    assert found.block == 32 and close[extreme < 0].all() and (extreme < 0).mean() > 0.3, "theirs, but for the rounding of the scale"
    about = describe(file)
    assert about["dtype"] == "int4" and 0 < about["rounding"] < 0.06
    assert main(["info", str(file)]) == 0 and re.search(rf"rounding +{about['rounding']:.1%} of the weights' size", capsys.readouterr().out)


def test_memory_is_looked_at_before_a_conversion(source, cache, monkeypatch):
    monkeypatch.setattr(conversion, "available_memory", lambda: 1000)
    with pytest.raises(GenerationError, match="GB of memory are needed for int8 .* or --dtype int4 takes less"): load(source, dtype="int8")
    assert not any(cache.rglob("*.tflite"))
