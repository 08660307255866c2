"GGUF as others write it (in parts, of another version or byte order, with fields missing or wrong), and as we write it for llama.cpp."
import dataclasses
import importlib.util
import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
from test_tokenizer import random_texts

from conftest import complaint
from llama_nb.checkpoint import Checkpoint, LazyTensor, LlamaConfig, bard_folder
from llama_nb.gguf import add_fields, gguf_fields, gguf_tensors, read_gguf, write_gguf
from llama_nb.hub import needed_files, open_checkpoint
from llama_nb.tokenizer import TokenizerError
from llama_nb.vocabularies import SAME_CUTS, SPLITTERS, gguf_vocabulary, load_tokenizer, open_with_tokenizer

BEES = "To be, or not to be, that is the question: 1603 bees, 'tis 3.14159"


def need_llama_cpp():
    if not importlib.util.find_spec("xllamacpp"): pytest.skip("xllamacpp is not installed (extra [parity])")


def in_process(program, *arguments, **given):
    "What a program writes last, from JSON; llama.cpp gets a process of its own."
    result = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=300, **given)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


# In parts ----------------------------------------------------------------------------------------------------------------------

def write_parts(folder, count=3, name="bard", source=None):
    "A model in parts, as llama-gguf-split lays it out: metadata in the first part alone, tensors spread over all."
    folder.mkdir(exist_ok=True)
    checkpoint, tokenizer = open_with_tokenizer(source or bard_folder())
    tensors, paths = list(gguf_tensors(checkpoint).items()), []
    for part in range(count):
        paths.append(folder / f"{name}-{part + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "llama")
        if part == 0: add_fields(writer, gguf_fields(checkpoint.config) | gguf_vocabulary(tokenizer))
        writer.add_uint16("split.no", part), writer.add_uint16("split.count", count), writer.add_int32("split.tensors.count", len(tensors))
        for tensor_name, tensor in tensors[part::count]: writer.add_tensor(tensor_name, np.asarray(tensor.read(), np.float32))
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return paths


def test_parts_are_one_model(tmp_path):
    paths = write_parts(tmp_path / "parts")
    whole, tokenizer = open_with_tokenizer(bard_folder())
    for path in (*paths, tmp_path / "parts", str(paths[0])):
        checkpoint, found = open_with_tokenizer(path)
        assert checkpoint.config == whole.config and found.encode(BEES) == tokenizer.encode(BEES)
        assert all((checkpoint.read(name) == whole.read(name).astype(np.float32)).all() for name in whole)
    one = write_parts(tmp_path / "one", 1)
    assert open_checkpoint(one[0]).config == whole.config


def test_llama_cpp_reads_the_same_parts(tmp_path):
    need_llama_cpp()
    paths = write_parts(tmp_path)
    ids = load_tokenizer(tmp_path).encode(BEES)
    assert in_process(TOKENIZE, paths[0], input=json.dumps([[BEES, False]])) == [[ids[1:]]]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(missing, tmp_path):
    paths = write_parts(tmp_path)
    paths[missing].unlink()
    for path in (tmp_path, *(path for path in paths if path.exists())):
        for action in (open_checkpoint, load_tokenizer):
            with pytest.raises(ValueError, match=paths[missing].name) as caught: action(path)
            assert "\n" not in str(caught.value)


def test_parts_that_say_something_else(tmp_path):
    paths = write_parts(tmp_path)
    one, two = paths[0].read_bytes(), paths[1].read_bytes()
    paths[1].write_bytes(one)
    assert "split.no and split.count should be 1 and 3, as the file's name says, found 0 and 3" in complaint(read_gguf, paths[0])
    (tmp_path / "alone.gguf").write_bytes(two)
    assert "should be 0 and 1, as the file's name says, found 1 and 3" in complaint(read_gguf, tmp_path / "alone.gguf")
    paths[1].write_bytes(two[:len(two) // 2])
    assert f"{paths[1]}: " in complaint(open_checkpoint, tmp_path / paths[0].name) and "cut short" in complaint(open_checkpoint, paths[0])
    (tmp_path / "alone.gguf").unlink()
    paths[1].write_bytes(two.replace(b"split.no", b"split.NO"))
    assert "found 0 and 3" in complaint(open_checkpoint, tmp_path)
    paths[2].write_bytes(two), paths[1].write_bytes(two)
    assert "should be 2 and 3" in complaint(open_checkpoint, tmp_path)


def test_a_changed_part_is_read_anew(tmp_path):
    paths = write_parts(tmp_path / "a")
    before = open_checkpoint(paths[0])
    halved = {name: LazyTensor(tensor.shape, tensor.dtype, tensor.stored, lambda name=name: before.read(name) / 2) for name, tensor in before.items()}
    write_gguf(tmp_path / "whole.gguf", Checkpoint("x", before.config, halved), gguf_vocabulary(load_tokenizer(bard_folder())))
    others = write_parts(tmp_path / "b", source=tmp_path / "whole.gguf")
    paths[1].write_bytes(others[1].read_bytes())
    name = "layers.0.attention_norm.weight"
    assert (open_checkpoint(paths[0]).read(name) == open_checkpoint(tmp_path / "whole.gguf").read(name)).all()


def test_a_conversion_is_of_all_parts(tmp_path):
    from llama_nb.conversion import source_states
    paths = write_parts(tmp_path)
    assert list(source_states(paths[0])) == [path.name for path in paths]


PARTS = [f"m-Q4_K_M-{part:05}-of-00003.gguf" for part in (1, 2, 3)]


def test_all_parts_come_from_the_hub(tmp_path):
    assert needed_files(["README.md", *PARTS, "m-Q8_0.gguf"], PARTS[0]) == PARTS
    assert needed_files(["README.md", *PARTS]) == PARTS
    deep = [f"Q4_K_M/{name}" for name in PARTS]
    assert needed_files([*deep, *PARTS], deep[0]) == deep
    assert complaint(needed_files, [*deep, "m-Q8_0.gguf", "m-Q4_0.gguf"]) == f"one file should be named after the repository, one of {deep[0]}, m-Q8_0.gguf, m-Q4_0.gguf"
    assert complaint(needed_files, deep) == f"one file should be named after the repository, one of {deep[0]}"


def test_a_model_in_parts_from_the_hub(tmp_path):
    from test_forms import fetched, serving
    paths = write_parts(tmp_path / "parts")
    files = {f"Q8/{path.name}": path.read_bytes() for path in paths}
    with serving(files | {"other.gguf": b"x", "another.gguf": b"y"}) as (address, _):
        found, error = fetched(tmp_path, f"somebody/tiny/Q8/{paths[0].name}", address)
        assert error is None and sorted(path.name for path in found.parent.iterdir()) == [path.name for path in paths]
    assert fetched(tmp_path, f"somebody/tiny/Q8/{paths[0].name}") == (found, None), "without a network"
    assert open_checkpoint(found).config == open_checkpoint(bard_folder()).config


# Versions and byte orders ------------------------------------------------------------------------------------------------------

def test_other_versions_and_byte_orders(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("x", np.zeros((2, 32), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert "a big-endian GGUF file" in complaint(open_checkpoint, tmp_path / "big.gguf") and "gguf-convert-endian" in complaint(open_checkpoint, tmp_path / "big.gguf")
    with pytest.raises(TokenizerError, match="big-endian"): load_tokenizer(tmp_path / "big.gguf")
    for version, words in ((1, "GGUF of version 1, which llama.cpp gave up"), (4, "found version 4"), (0, "found version 0")):
        (tmp_path / "other.gguf").write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(16))
        assert words in complaint(open_checkpoint, tmp_path / "other.gguf")


# Vocabularies ------------------------------------------------------------------------------------------------------------------

TOKENIZE = """
import json, sys, urllib.request, xllamacpp as llama_cpp
jobs, found = json.load(sys.stdin), []
for path in sys.argv[1:]:
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.warmup, options.verbosity = path, 64, 1, 1, False, -1
    server = llama_cpp.Server(options)
    def ask(text, special, add_special=False):
        body = json.dumps(dict(content=text, add_special=add_special, parse_special=special)).encode()
        return json.load(urllib.request.urlopen(urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})))["tokens"]
    found.append([ask(*job) for job in jobs])
    del server
print(json.dumps(found))
"""


def write_zeros(path, fields):
    "A model of zeros with this vocabulary."
    config = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=len(fields["tokenizer.ggml.tokens"]), context_length=64)
    zeros = {name: LazyTensor(shape, np.dtype("float32"), "float32", lambda shape=shape: np.zeros(shape, "float32")) for name, shape in config.tensor_shapes().items()}
    write_gguf(path, Checkpoint("zeros", config, zeros), fields)
    return path


def byte_level(**changes):
    "A byte-level vocabulary with merges across digits, signs, letters and spaces, and one whole word that no merge leads to."
    letters = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "123 4", "Ġ t", "Ġt h", "h e", "th e", ". .", ", Ġ", "e Ġ", "Ġ Ġ", "Ċ Ċ", "' t", "! !", "= =", "Ġ Ċ", "3 .", "t h"]
    texts = [*letters, *dict.fromkeys(merge.replace(" ", "") for merge in merges), "Ġthe", "bees", "<|begin|>", "<|end|>"]
    texts = list(dict.fromkeys(texts))
    kinds = [3 if text.startswith("<|") else 1 for text in texts]
    fields = dict(model="gpt2", pre="default", tokens=texts, token_type=kinds, merges=merges, bos_token_id=len(texts) - 2, eos_token_id=len(texts) - 1) | changes
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


CUT = ["bees the the 1234 12345 !!== ,, ... 't 'T \n\n  the\t12\u0661\u0662\u0663 €5+3=8 ^|~ `x` \u00a0\u3000x", "  the", "the  \n \n the", "\u00bd12\u00b2", "12 34567 e\u0301 \u0e01\u0e33 1,234.5", "\u00ab\u2014\u00bb$$ 5$ \u20ac\u20ac", "a_b [c] {d}"]


def test_names_of_cuts_that_llama_cpp_treats_as_ours(tmp_path):
    need_llama_cpp()
    names = [None, *SPLITTERS, *(name for same in SAME_CUTS.values() for name in same)]
    paths = [write_zeros(tmp_path / f"{name}.gguf", byte_level(pre=name)) for name in names]
    texts = CUT + [text for text in random_texts(300, seed=20) if "\0" not in text]
    jobs = [(text, False, True) for text in texts if text]
    for name, path, found in zip(names, paths, in_process(TOKENIZE, *paths, input=json.dumps(jobs)), strict=True):
        tokenizer = load_tokenizer(path)
        for (text, *_), ids in zip(jobs, found, strict=True): assert tokenizer.encode(text) == ids, (name, text)


def test_a_vocabulary_that_does_not_say_how_it_is_cut(tmp_path, capsys):
    path = write_zeros(tmp_path / "old.gguf", byte_level(pre=None))
    tokenizer = load_tokenizer(path)
    assert tokenizer.splitter == "default" and not tokenizer.add_bos
    load_tokenizer(path)
    assert capsys.readouterr().err == f"{path}: tokenizer.ggml.pre is missing: texts are cut in llama.cpp's default way, perhaps not in the model's own; a newer file of the model says which\n"
    load_tokenizer(write_zeros(tmp_path / "new.gguf", gguf_vocabulary(tokenizer)))
    assert capsys.readouterr().err == ""
    with pytest.raises(TokenizerError, match="cut as by gpt-2, smollm, llama-bpe, default, found tekken"): load_tokenizer(write_zeros(tmp_path / "other.gguf", byte_level(pre="tekken")))


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "padding"])
def test_an_id_beyond_the_vocabulary(name, tmp_path, capsys):
    "llama.cpp warns and takes its default; we warn and take it as missing."
    checkpoint, tokenizer = open_with_tokenizer(bard_folder())
    key, path = f"tokenizer.ggml.{name}_token_id", tmp_path / "ids.gguf"
    write_gguf(path, checkpoint, gguf_vocabulary(tokenizer) | {key: 32000})
    found = open_with_tokenizer(path)[1]
    assert capsys.readouterr().err == f"{path}: {key} should be less than 2048, the number of tokens, found 32000; taken as missing\n"
    assert (found.bos_id, found.eos_id, found.stop_ids) == (1, 2, {2})


# For llama.cpp -----------------------------------------------------------------------------------------------------------------

CONTINUE = """
import json, sys, xllamacpp as llama_cpp
options = llama_cpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.warmup, options.verbosity = sys.argv[1], 256, 1, 1, False, -1
answer = llama_cpp.Server(options).handle_completions(dict(prompt=json.loads(sys.argv[2]), n_predict=16, temperature=0.0, logprobs=5))
print(json.dumps([(token["id"], [(top["id"], top["logprob"]) for top in token["top_logprobs"]]) for token in answer["choices"][0]["logprobs"]["content"]]))
"""


def check_against_llama_cpp(path):
    "On the same file llama.cpp, which rounds more on its way, chooses tokens that are our best but for rounding, with probabilities near ours."
    from llama_nb.library import load
    ours = load(path, dtype="float32")
    ids = list(map(int, ours.tokenizer.encode("To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune")))
    tokens = in_process(CONTINUE, path, json.dumps(ids))
    logits = np.asarray(ours.logits(ids + [token for token, _ in tokens]))[len(ids) - 1:-1].astype(np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    assert len(tokens) == 16
    for (token, top), row in zip(tokens, probabilities, strict=True):
        assert row[token] > row.max() - 0.02 and all(abs(np.exp(logprob) - row[other]) < 0.02 for other, logprob in top)


@pytest.mark.parametrize("dtype, forms, bits", [("f16", {"F16", "F32"}, 16.1), ("q8_0", {"Q8_0", "F16", "F32"}, 11.5), ("q4_0", {"Q4_0", "Q8_0", "F16", "F32"}, 9)])
def test_written_for_llama_cpp(dtype, forms, bits, tmp_path, capsys):
    "By the command line: types, sizes and numbers are those of the `gguf` library, and llama.cpp goes on with the same tokens."
    from llama_nb.cli import main
    path = tmp_path / "bard.gguf"
    assert main(["convert", "bard", str(path), "--to", "gguf", "--dtype", dtype]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 4,676,352 parameters as ")
    bard, found = open_checkpoint(bard_folder()), open_checkpoint(path)
    assert found.config == bard.config and {tensor.stored for tensor in found.values()} == forms
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"] and reader.get_field("general.quantization_version").contents() == 2
    for name, tensor in found.items():
        values, kind = bard.read(name).astype(np.float32), gguf.GGMLQuantizationType[tensor.stored]
        assert (found.read(name) == gguf.dequantize(gguf.quantize(values, kind), kind)).all(), name
        assert (tensor.stored == "F32") == (values.ndim == 1) and (values.ndim == 1 or dtype == "f16" or (tensor.stored == "F16") == (values.shape[1] % 32 > 0))
    assert found["output.weight" if "output.weight" in found else "tok_embeddings.weight"].stored == {"f16": "F16"}.get(dtype, "Q8_0")
    assert path.stat().st_size - 200_000 < bits * bard.config.n_parameters / 8
    need_llama_cpp()
    check_against_llama_cpp(path)


def test_dtypes_that_cannot_be_had(tmp_path, capsys):
    from llama_nb.cli import main
    for dtype, form, words in (("q4_0", "litert", "--to gguf, found --to litert"), ("f16", "hf", "--to gguf, found --to hf"), ("int8", "gguf", "--to litert, found --to gguf")):
        assert main(["convert", "bard", str(tmp_path / "x"), "--to", form, "--dtype", dtype]) == 2 and words in capsys.readouterr().err
    bard = open_checkpoint(bard_folder())
    assert "dtype should be f16, q8_0, q4_0, found 'q5_0'" in complaint(write_gguf, tmp_path / "x", bard, dtype="q5_0")
    large = {name: dataclasses.replace(tensor, read=lambda tensor=tensor: tensor.read().astype(np.float32) * 1e6) for name, tensor in bard.items()}
    assert "should be finite as float16" in complaint(write_gguf, tmp_path / "x", Checkpoint("x", bard.config, large), dtype="f16")
    assert list(tmp_path.iterdir()) == []
