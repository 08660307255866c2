"What people bring, as it lies on their disks: it opens as transformers opens it, or one line says what it is. Each right value is the home implementation's."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import complaint
from llama_nb.checkpoint import CheckpointError, bard_folder
from llama_nb.cli import write_form
from llama_nb.hub import open_checkpoint
from llama_nb.huggingface import hf_config
from llama_nb.meta import config_from_params
from llama_nb.rope import rope_frequencies
from llama_nb.vocabularies import load_tokenizer, open_with_tokenizer

torch = pytest.importorskip("torch", reason="what transformers makes of a file needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="what transformers makes of a file needs the extra [parity]")
from safetensors.torch import load_file, save_file, save_model

ONE, TWO = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
TABLE, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A small random model as transformers saves it."
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False))
    model.save_pretrained(folder := tmp_path_factory.mktemp("saved"))
    return folder


def sharded(saved, folder, in_index={}, in_shard={}, index=True, ending="safetensors"):
    "The same in two shards, the second with more tensors than the index says, or fewer."
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    one, two = (f"{stem}-0000{number}-of-00002.{ending}" for number in (1, 2))
    half = list(tensors)[:10]
    for name, part in ((one, {name: tensors[name] for name in half}), (two, {name: values for name, values in tensors.items() if name not in half} | in_shard)):
        save_file(part, folder / name, metadata={"format": "pt"}) if ending == "safetensors" else torch.save(part, folder / name)
    places = {name: one if name in half else two for name in tensors} | {name: {ONE: one, TWO: two}[file] for name, file in in_index.items()}
    if index: (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))
    return folder


def changed(folder, **fields):
    "Its config.json with other fields."
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in (json.loads(path.read_text()) | fields).items() if value is not ...}))
    return folder


def same_as_theirs(folder):
    "Every weight of the folder is what transformers makes of it."
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict(), open_checkpoint(folder)
    for name, other in (("tok_embeddings", TABLE), ("layers.1.attention.wv", "model.layers.1.self_attn.v_proj.weight"), ("norm", "model.norm.weight"), ("layers.0.feed_forward.w2", "model.layers.0.mlp.down_proj.weight")):
        np.testing.assert_array_equal(ours.read(f"{name}.weight").astype(np.float32), theirs[other].numpy(), name)
    output = "tok_embeddings.weight" if ours.config.tied else "output.weight"
    np.testing.assert_array_equal(ours.read(output).astype(np.float32), theirs[HEAD].numpy())
    return ours


# Shards ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("in_index, in_shard", [
    ({}, {}), ({BUFFER: ONE}, {}), ({}, {BUFFER: torch.ones(4)}), ({BUFFER: TWO}, {BUFFER: torch.ones(4, dtype=torch.float64)}), ({BUFFER: ONE}, {BUFFER: torch.ones(4, dtype=torch.bfloat16)}),
    ({BUFFER.replace("inv_freq", "cos_cached"): TWO}, {BUFFER.replace("inv_freq", "cos_cached"): torch.ones(1, 1, 4, 4), "model.rotary_emb.inv_freq": torch.ones(4)}),
    ({"model.position_ids": TWO}, {"model.position_ids": torch.arange(4)[None]}), ({}, {"model.embeddings.position_ids": torch.arange(4, dtype=torch.uint8)}), ({}, {Q: torch.full((32, 32), 2.0)}), ({Q: TWO}, {}), ({Q: ...}, {})], ids=str)
def test_shards_and_an_index_that_disagree(in_index, in_shard, ending, saved, tmp_path):
    folder = sharded(saved, tmp_path / "model", {name: file for name, file in in_index.items() if file is not ...}, in_shard, ending=ending)
    index, = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    for name, file in in_index.items():
        if file is ...: del content["weight_map"][name]
    index.write_text(json.dumps(content))
    ours = same_as_theirs(folder)
    if Q in in_shard: assert (ours.read("layers.0.attention.wq.weight") == 2).all()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_without_an_index(ending, saved, tmp_path):
    folder = sharded(saved, tmp_path / "model", index=False, ending=ending)
    shutil.copytree(saved, tmp_path / "whole")
    expected, found = same_as_theirs(tmp_path / "whole"), open_checkpoint(folder)
    assert all((found.read(name) == expected.read(name)).all() for name in expected)
    one, two = sorted(folder.glob(f"*.{ending}"))
    two.unlink()
    assert complaint(open_checkpoint, folder) == f"{two}: no such file"


def test_one_file_counts_before_an_index(saved, tmp_path):
    folder = sharded(saved, tmp_path / "model", in_shard={Q: torch.zeros(32, 32)})
    shutil.copy(saved / "model.safetensors", folder)
    assert same_as_theirs(folder).read("layers.0.attention.wq.weight").any()


def test_shards_that_are_links(saved, tmp_path):
    folder = sharded(saved, tmp_path / "model")
    (tmp_path / "disk").mkdir()
    for path in list(folder.glob("*")):
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    same_as_theirs(folder)


@pytest.mark.parametrize("heads", ["equal", "other", "head alone", "table alone"])
def test_tied_models_and_their_heads(heads, saved, tmp_path):
    folder = changed(Path(shutil.copytree(saved, tmp_path / "model")), tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    if heads == "equal": tensors[HEAD] = tensors[TABLE].clone()
    if heads == "head alone": del tensors[TABLE]
    if heads == "table alone": del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert same_as_theirs(folder).config.tied == ("alone" in heads)


def test_a_weight_of_another_type_is_refused(saved, tmp_path):
    folder = sharded(saved, tmp_path / "model", in_shard={Q: torch.ones(32, 32, dtype=torch.int64)})
    assert "tensor layers.0.attention.wq.weight should be one of float32, float16, bfloat16, found int64" in complaint(open_checkpoint, folder)


# Scaling -------------------------------------------------------------------------------------------------------------------

YARN = dict(factor=4.0, original_max_position_embeddings=64)
LLAMA_3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
SPELLINGS = [
    dict(), dict(rope_theta=5e5), dict(rope_scaling=None, rope_theta=2e4), dict(rope_parameters=None), dict(rope_parameters=dict(rope_theta=3e4, rope_type="default")), dict(rope_scaling=dict(rope_type="default", factor=3.0)),
    dict(rope_scaling=dict(type="linear", factor=4.0)), dict(rope_scaling=dict(rope_type="linear", factor=4)), dict(rope_parameters=dict(type="linear", factor=4.0), rope_theta=2e4), dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    dict(rope_scaling=dict(type="dynamic", rope_type="linear", factor=2.0)), dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="linear", factor=8.0, rope_theta=7e4)),
    dict(rope_scaling=dict(type="linear", factor=2.0), rope_theta=3e4, rope_parameters=dict(rope_theta=7e4, rope_type="default")), dict(rope_scaling={}, rope_parameters=dict(rope_type="linear", factor=8.0)),
    dict(rope_scaling=dict(type="llama3", **LLAMA_3)), dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA_3)), dict(rope_scaling=dict(type="llama3", **LLAMA_3), original_max_position_embeddings=32),
    dict(rope_scaling=dict(rope_type="llama3", **{name: value for name, value in LLAMA_3.items() if "original" not in name})),
    dict(rope_scaling=dict(type="yarn", finetuned=True, **YARN)), dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e6, **YARN)), dict(rope_scaling=dict(type="yarn", factor=4.0)), dict(rope_scaling=dict(type="yarn", factor=1.0)),
    dict(rope_scaling=dict(type="yarn", **YARN | dict(factor=None))), dict(rope_scaling=dict(type="yarn", beta_fast=16, beta_slow=2, **YARN)), dict(rope_scaling=dict(type="yarn", beta_fast=None, beta_slow=None, truncate=None or True, **YARN)),
    dict(rope_scaling=dict(type="yarn", truncate=False, **YARN)), dict(rope_scaling=dict(type="yarn", attention_factor=1.3, mscale=2.0, mscale_all_dim=0.5, **YARN)), dict(rope_scaling=dict(type="yarn", mscale=2.0, mscale_all_dim=0.5, **YARN)),
    dict(rope_scaling=dict(type="yarn", mscale=2.0, **YARN)), dict(rope_scaling=dict(type="yarn", mscale=1.0, mscale_all_dim=0, **YARN)), dict(rope_scaling=dict(type="yarn", **YARN), original_max_position_embeddings=32)]


@pytest.mark.parametrize("fields", SPELLINGS, ids=str)
def test_each_spelling_of_scaled_positions(fields, saved, tmp_path):
    "The speeds and the magnitude are those that transformers computes from the same config.json."
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    folder = changed(Path(shutil.copytree(saved, tmp_path / "model")), **dict(rope_parameters=..., max_position_embeddings=256) | fields)
    theirs, config = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder)), open_checkpoint(folder).config
    speeds, magnitude = rope_frequencies(config.head_dim, config.rope_theta), 1.0
    if config.rope_scaling is not None: speeds, magnitude = config.rope_scaling(speeds)
    np.testing.assert_allclose(speeds, theirs.inv_freq.numpy(), rtol=1e-5)
    assert magnitude == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("kind, window", [("Llama", None), ("Mistral", 4096)])
def test_what_a_family_takes_where_the_file_says_nothing(kind, window, saved, tmp_path):
    names = ("max_position_embeddings", "rms_norm_eps", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "sliding_window", "head_dim")
    folder = changed(Path(shutil.copytree(saved, tmp_path / "model")), architectures=[f"{kind}ForCausalLM"], model_type=kind.lower(), **dict.fromkeys(names, ...))
    theirs = transformers.AutoConfig.from_pretrained(folder)
    ours = hf_config(json.loads((folder / "config.json").read_text()) | dict(num_attention_heads=16), False, f"{kind}ForCausalLM")
    assert (ours.context_length, ours.norm_eps, ours.rope_theta, ours.sliding_window) == (theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"], window)
    assert ours.n_kv_heads == (theirs.num_key_value_heads if kind == "Mistral" else 16) and theirs.tie_word_embeddings is False


SEVEN = dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, vocab_size=-1)


@pytest.mark.parametrize("params, length", [
    (SEVEN | dict(norm_eps=1e-6), 2048), (SEVEN | dict(norm_eps=1e-5), 4096), (dict(dim=8192, multiple_of=256, n_heads=64, n_layers=80, norm_eps=1e-5), 2048),
    (dict(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5), 4096), (SEVEN | dict(norm_eps=1e-5, rope_theta=1000000), 16384),
    (SEVEN | dict(n_kv_heads=8, ffn_dim_multiplier=1.3, multiple_of=1024, norm_eps=1e-5, rope_theta=500000.0), 8192), (SEVEN | dict(n_kv_heads=8, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True), 131072),
    (dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5, sliding_window=4096), 128000), (SEVEN | dict(norm_eps=1e-5, max_seq_len=77), 77)], ids=str)
def test_how_long_a_text_metas_models_read(params, length):
    "2,048, 4,096, 8,192, 131,072 and 16,384 for Code Llama are the lengths that transformers' convert_llama_weights_to_hf.py takes for these files; 128,000 is mistral-inference's."
    config = config_from_params(params, 32000)
    assert config.context_length == length
    if "hidden_dim" in params: assert (config.hidden_dim, config.head_dim, config.sliding_window, config.n_parameters) == (14336, 128, 4096, 7_241_732_096)


def test_mistrals_files_in_metas_form(tmp_path):
    "consolidated.00.pth and params.json as Mistral 7B 0.1 and Nemo have them: a width of the feed-forward, and of a head, that no multiple_of gives."
    params = dict(dim=64, n_layers=1, head_dim=24, hidden_dim=100, n_heads=4, n_kv_heads=2, norm_eps=1e-5, sliding_window=16, vocab_size=97, rope_theta=1e6)
    shapes = config_from_params(params).tensor_shapes()
    torch.save({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert shapes["layers.0.attention.wo.weight"] == (64, 96) and shapes["layers.0.feed_forward.w2.weight"] == (64, 100) and len(open_checkpoint(tmp_path)) == len(shapes)


# Messages ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bard_hf(tmp_path_factory):
    write_form("hf", bard_folder(), folder := tmp_path_factory.mktemp("bard") / "hf")
    return folder


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapters_folder(with_tokenizer, bard_hf, tmp_path):
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 256)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", base_model_name_or_path="somebody/base")))
    if with_tokenizer: shutil.copy(bard_folder() / "tokenizer.model", tmp_path)
    for opener in (open_with_tokenizer, open_checkpoint):
        assert complaint(opener, tmp_path) == f"{tmp_path}: an adapter (PEFT), not a whole model; load the model that it changes, somebody/base, with --lora {tmp_path}"


def test_mistrals_own_form(bard_hf, tmp_path):
    shutil.copy(bard_hf / "model.safetensors", tmp_path / "consolidated.safetensors"), (tmp_path / "params.json").write_text("{}")
    for opener in (open_with_tokenizer, open_checkpoint):
        assert complaint(opener, tmp_path).startswith(f"{tmp_path}: Mistral's own form, consolidated.safetensors; model.safetensors")
    for path in bard_hf.iterdir(): shutil.copy(path, tmp_path)
    assert len(open_with_tokenizer(tmp_path)[0]) == len(open_checkpoint(bard_folder()))


def test_the_form_of_torch_before_1_6(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    tensors, path = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert complaint(open_checkpoint, folder).startswith(f"{path}: written by torch.save before version 1.6; ")
    torch.save(torch.load(path), path)
    same_as_theirs(folder)


@pytest.mark.parametrize("config, file, method", [
    (dict(quant_method="awq", bits=4), None, "AWQ"), (dict(quant_method="gptq", bits=4), None, "GPTQ"), (dict(quant_method="bitsandbytes", load_in_4bit=True), None, "bitsandbytes"), (dict(load_in_8bit=True), None, "bitsandbytes"),
    (dict(quant_method="fp8"), None, "fp8"), (dict(quant_method="compressed-tensors"), None, "compressed-tensors"), (None, "quantize_config.json", "GPTQ"), (None, "quant_config.json", "AWQ")], ids=str)
def test_weights_that_are_quantized_for_another_program(config, file, method, saved, tmp_path):
    folder = changed(Path(shutil.copytree(saved, tmp_path / "model")), quantization_config=config)
    if file: (folder / file).write_text("{}")
    message = complaint(open_checkpoint, folder)
    assert message.startswith(f"{folder / 'config.json'}: the weights are quantized with {method}, which is not read here; take ") and "GGUF" in message


@pytest.mark.parametrize("names, kind", [(["LLaMAForCausalLM"], "llama"), (..., "llama"), (["LlamaForCausalLM"], ...)], ids=str)
def test_the_first_name_of_the_architecture(names, kind, saved, tmp_path):
    folder = changed(Path(shutil.copytree(saved, tmp_path / "model")), architectures=names, model_type=kind)
    assert open_checkpoint(folder).config == open_checkpoint(saved).config


def test_metas_download(tmp_path):
    "tokenizer.model lies beside the folders of the sizes."
    (folder := tmp_path / "llama" / "7B").mkdir(parents=True)
    for file in ("consolidated.00.pth", "params.json"): shutil.copy(bard_folder() / file, folder)
    assert "tokenizer.model" in complaint_of_tokenizer(folder)
    shutil.copy(bard_folder() / "tokenizer.model", folder.parent)
    assert open_with_tokenizer(folder)[1].pieces == load_tokenizer(bard_folder()).pieces


def complaint_of_tokenizer(path):
    with pytest.raises(ValueError) as caught: load_tokenizer(path)
    return str(caught.value)


@pytest.mark.parametrize("ends", [2048, [2, -1], [2, "x"], 2**70], ids=str)
def test_ids_beyond_the_vocabulary(ends, bard_hf, tmp_path):
    folder = Path(shutil.copytree(bard_hf, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=ends)))
    wrong = ends[1] if isinstance(ends, list) else ends
    assert complaint_of_tokenizer(folder) == f"{folder / 'generation_config.json'}: eos_token_id should be in 0..2047, found {wrong!r}"


# On the disk ---------------------------------------------------------------------------------------------------------------

FORMS = ["meta", "hf", "gguf", "npy", "bin"]


def written(form, path):
    "bard in a form; the path to open."
    if form in ("meta", "hf"): write_form(form, bard_folder(), path)
    if form == "gguf": write_form(form, bard_folder(), path := path.with_name(f"{path.name}.gguf"))
    if form == "npy":
        path.mkdir()
        checkpoint = open_checkpoint(bard_folder())
        for name in checkpoint: np.save(path / f"{name}.npy", checkpoint.read(name))
        for file in ("params.json", "tokenizer.model"): shutil.copy(bard_folder() / file, path)
    if form == "bin":
        write_form("hf", bard_folder(), path)
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_short_since_it_was_opened(form, tmp_path):
    path = written(form, tmp_path / "bard")
    checkpoint = open_checkpoint(path)
    largest = max((path, *path.glob("*")) if path.is_dir() else [path], key=lambda file: file.stat().st_size if file.is_file() else 0)
    with open(largest, "r+b") as file: file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"cut short|greater than|cannot be read") as caught:
        for name in checkpoint: checkpoint.read(name)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


NAMES = ["with spaces", "Übung für Bärbel", "模型 蜂", "ネコ's \"best\" $model* [1] %20 #2", "e\u0301 decomposed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_folders_and_files_of_any_name(name, form, tmp_path):
    (tmp_path / name).mkdir()
    path = written(form, tmp_path / name / name)
    checkpoint, tokenizer = open_with_tokenizer(path)
    assert tokenizer.pieces == load_tokenizer(bard_folder()).pieces
    expected = open_checkpoint(bard_folder())
    for weight in ("tok_embeddings.weight", "layers.1.attention.wq.weight"): np.testing.assert_array_equal(checkpoint.read(weight).astype(np.float32), expected.read(weight).astype(np.float32))


COMMANDS = [["info", "-m", "{model}", "--json"], ["generate", "-m", "{model}", "-p", "To be", "-n", "4", "--temp", "0"], ["convert", "{model}", "{out}"], ["generate", "-m", "{out}", "-p", "To be", "-n", "4", "--temp", "0"], ["list"]]


@pytest.mark.parametrize("name", ["with spaces", "Übung 模型 's \"$x* [1] %20"])
def test_the_command_line_where_every_folder_has_such_a_name(name, tmp_path):
    "HOME, TMPDIR, the cache, the model and what is written; the model by its path and by ~."
    places = {variable: tmp_path / name / variable for variable in ("HOME", "TMPDIR", "LLAMA_NB_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    for place in places.values(): place.mkdir(parents=True)
    if name == "with spaces": del places["LLAMA_NB_CACHE"], places["NUMBA_CACHE_DIR"]
    written("gguf", places["HOME"] / name)
    home, found = ("~" if name == "with spaces" else places["HOME"]), []
    for command in COMMANDS:
        words = [word.format(model=f"{home}/{name}.gguf", out=f"{home}/{name} 2") for word in command]
        result = subprocess.run([sys.executable, "-c", "import sys; from llama_nb.cli import main; sys.exit(main())", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path / name,
                                env={**os.environ, **{variable: str(place) for variable, place in places.items()}, "PYTHONPATH": str(Path(__file__).parent.parent)})
        assert result.returncode == 0, (words, result.stderr)
        if command[0] == "generate": found.append(result.stdout)
    assert len(set(found)) == 1 and found[0] and (places["HOME"] / f"{name} 2" / "manifest.json").exists()
