"Adapters in peft's form: written by ours, read by peft; written by peft, applied to a base by ours."
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_default import IDS, TINY, write_tiny

from conftest import complaint
from llama_nb import conversion, library
from llama_nb.checkpoint import LazyTensor
from llama_nb.cli import main
from llama_nb.hub import needed_files, open_checkpoint, read_lora, with_lora
from llama_nb.huggingface import HF_NAMES, read_safetensors, write_hf, write_safetensors
from llama_nb.library import load
from llama_nb.sampling import GenerationError

MODULES = {name: HF_NAMES[f"{part}"] for name, part in dict(q_proj="attention.wq", k_proj="attention.wk", v_proj="attention.wv", o_proj="attention.wo",
                                                              gate_proj="feed_forward.w1", down_proj="feed_forward.w2", up_proj="feed_forward.w3").items()}


def lazy(values): return LazyTensor(values.shape, values.dtype, values.dtype.name, lambda: values)


def write_adapter(folder, config=TINY, modules=("q_proj", "k_proj", "v_proj", "down_proj"), rank=2, seed=0, tensors={}, **settings):
    "An adapter as peft writes it: (out, rank) and (rank, in) for each module, by Hugging Face's names and order of rows."
    folder.mkdir(exist_ok=True)
    draw, kv = np.random.default_rng(seed), config.dim * config.n_kv_heads // config.n_heads
    sizes = dict(q_proj=(config.dim, config.dim), k_proj=(kv, config.dim), v_proj=(kv, config.dim), o_proj=(config.dim, config.dim),
                 gate_proj=(config.hidden_dim, config.dim), up_proj=(config.hidden_dim, config.dim), down_proj=(config.dim, config.hidden_dim))
    found = {}
    for layer in range(config.n_layers):
        for module in modules:
            prefix = f"base_model.model.model.layers.{layer}.{MODULES[module]}"
            for half, shape in (("A", (rank, sizes[module][1])), ("B", (sizes[module][0], rank))):
                found[f"{prefix}.lora_{half}.weight"] = lazy((0.2 * draw.standard_normal(shape)).astype(np.float32))
    write_safetensors(folder / "adapter_model.safetensors", found | tensors)
    (folder / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=rank, lora_alpha=8, target_modules=list(modules), bias="none") | settings))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def summed_by_hand(base, adapter, folder, scale):
    "The base in Hugging Face's form with the products added there."
    write_hf(folder, open_checkpoint(base))
    tensors, pairs = ({name: np.asarray(tensor.read(), np.float32) for name, tensor in read_safetensors(path).items()} for path in (folder / "model.safetensors", adapter / "adapter_model.safetensors"))
    for name, values in pairs.items():
        if ".lora_A." in name:
            tensors[name.removeprefix("base_model.model.").replace(".lora_A", "")] += scale * (pairs[name.replace("lora_A", "lora_B")] @ values)
    write_safetensors(folder / "model.safetensors", {name: lazy(values) for name, values in tensors.items()})
    return folder


@pytest.mark.parametrize("settings, scale", [({}, 4.0), (dict(use_rslora=True), 8 / 2 ** 0.5), (dict(lora_alpha=2), 1.0)], ids=["plain", "rslora", "alpha 2"])
def test_an_adapter_is_the_sum(settings, scale, base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", **settings)
    expected, found = open_checkpoint(summed_by_hand(base, adapter, tmp_path / "sum", scale)), with_lora(open_checkpoint(base), adapter)
    for name in expected: np.testing.assert_allclose(found.read(name).astype(np.float32), expected.read(name), atol=1e-6, err_msg=name)
    assert found.config == open_checkpoint(base).config


def test_patterns_and_whole_tensors(base, tmp_path):
    draw = np.random.default_rng(1)
    head = draw.standard_normal((TINY.vocab_size, TINY.dim)).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", tensors={"base_model.model.lm_head.weight": lazy(head)}, alpha_pattern={"v_proj": 16, "^model.layers.0.self_attn.q_proj": 2, "proj": 100})
    pairs, whole = read_lora(adapter)
    assert list(whole) == ["lm_head"] and (with_lora(open_checkpoint(base), adapter).read("output.weight") == head).all()
    assert {name: pair.scale for name, pair in pairs.items() if ".0." in name} == {
        "model.layers.0.self_attn.q_proj": 1, "model.layers.0.self_attn.k_proj": 4, "model.layers.0.self_attn.v_proj": 8, "model.layers.0.mlp.down_proj": 4}


@pytest.mark.parametrize("changes, words", [
    (dict(peft_type="IA3"), "adapter_config.json: peft_type should be LORA, found IA3"), (dict(use_dora=True), "use_dora should be None, found True"), (dict(bias="all"), "bias should be none, found all"),
    (dict(init_lora_weights="pissa"), "init_lora_weights should be True, found pissa"), (dict(lora_alpha=0), "lora_alpha should be a positive number, found 0"), (dict(lora_alpha="8"), "lora_alpha"),
    (dict(r=4), "should have rank 4, found 2"), (dict(alpha_pattern={"(a+)+$": 2}), "alpha_pattern should have names of modules"), (dict(alpha_pattern=3), "cannot be used"),
    (dict(tensors={"base_model.model.model.embed_tokens.lora_embedding_A": lazy(np.ones((2, 4), np.float32))}), "lora_embedding_A is no part of a LoRA"),
    (dict(tensors={"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": lazy(np.ones((2, 64), np.float32))}), "o_proj should have lora_A (rank, in) and lora_B (out, rank), found (2, 64) and none"),
    (dict(tensors={"base_model.model.model.layers.7.self_attn.q_proj.weight": lazy(np.ones((2, 2), np.float32))}), "layers.7.self_attn.q_proj is nothing in"),
    (dict(tensors={"base_model.model.lm_head.weight": lazy(np.ones((301, 64), np.float32))}), "tensor output.weight should have shape"),
    (dict(config=dataclasses.replace(TINY, dim=128)), "q_proj.lora_A should have shape"), (dict(tensors={"base_model.model.model.norm.weight": lazy(np.full(64, np.nan, np.float32))}), "NaN")], ids=lambda value: value if isinstance(value, str) else "")
def test_adapters_that_do_not_fit(changes, words, base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", **changes)
    if words == "NaN": message = complaint(with_lora(open_checkpoint(base), adapter).read, "norm.weight")
    else: message = complaint(with_lora, open_checkpoint(base), adapter)
    assert words in message and str(adapter) in message


def test_folders_that_are_no_adapters(base, tmp_path, cache, capsys):
    assert f"{base}/adapter_config.json: no such file" in complaint(with_lora, open_checkpoint(base), base)
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors or adapter_model.bin was expected" in complaint(with_lora, open_checkpoint(base), adapter)
    assert main(["generate", "-m", str(base), "--lora", str(tmp_path / "nowhere"), "-p", "a", "-n", "1"]) == 2
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in capsys.readouterr().err
    write_adapter(tmp_path / "adapter")
    conversion.convert(base, tmp_path / "converted")
    with pytest.raises(GenerationError, match="a converted model takes no adapter"): load(tmp_path / "converted", lora=adapter)


def test_both_engines_run_the_sum(base, tmp_path, cache):
    adapter = write_adapter(tmp_path / "adapter")
    exact = with_lora(open_checkpoint(base), adapter)
    llm, plain = load(base, "float32", lora=adapter), load(base, "float32")
    write_hf(tmp_path / "sum", exact)
    shutil.copy(base / "tokenizer.model", tmp_path / "sum")
    merged = load(tmp_path / "sum", "float32")
    np.testing.assert_allclose(llm.logits(IDS), merged.logits(IDS), atol=2e-5)
    assert np.abs(llm.logits(IDS) - plain.logits(IDS)).max() > 0.1
    fast = load(base, "int8", lora=adapter)
    assert (fast.logits(IDS) == load(tmp_path / "sum", "int8").logits(IDS)).all()
    np.testing.assert_allclose(fast.model(np.array([IDS]))[0], llm.logits(IDS), atol=2e-5), "the Keras model behind it has the adapter too"


def test_merged_weights_have_a_key_of_their_own(base, tmp_path, cache, monkeypatch):
    convert, done = conversion.convert, []
    monkeypatch.setattr(conversion, "convert", lambda *arguments: done.append(arguments) or convert(*arguments))
    adapter = write_adapter(tmp_path / "adapter")
    first, with_it = load(base, "int8").logits(IDS), load(base, "int8", lora=adapter).logits(IDS)
    assert (first != with_it).any() and len(done) == 2
    assert (load(base, "int8").logits(IDS) == first).all() and (load(base, "int8", lora=str(adapter)).logits(IDS) == with_it).all() and len(done) == 2
    write_adapter(tmp_path / "adapter", seed=1)
    os.utime(tmp_path / "adapter" / "adapter_model.safetensors", (1, 1))
    assert (load(base, "int8", lora=adapter).logits(IDS) != with_it).any() and len(done) == 3
    assert [row["kind"] for row in library.cached_models()].count("converted") == 2


def test_the_command_line(base, tmp_path, cache, capsys):
    adapter = write_adapter(tmp_path / "adapter")
    assert main(["convert", str(base), str(tmp_path / "sum"), "--to", "hf", "--lora", str(adapter)]) == 0
    assert main(["convert", str(base), str(tmp_path / "fast"), "--lora", str(adapter)]) == 0
    assert main(["convert", str(base), str(tmp_path / "sum.gguf"), "--to", "gguf", "--dtype", "f16", "--lora", str(adapter)]) == 0
    capsys.readouterr()
    exact = with_lora(open_checkpoint(base), adapter)
    for path, tolerance in ((tmp_path / "sum", 0), (tmp_path / "sum.gguf", 2e-3)):
        found = open_checkpoint(path)
        for name in exact: np.testing.assert_allclose(found.read(name).astype(np.float32), exact.read(name).astype(np.float32), atol=tolerance, rtol=tolerance, err_msg=name)
    texts = []
    for options in (["-m", str(base), "--lora", str(adapter)], ["-m", str(tmp_path / "fast")], ["-m", str(base)]):
        assert main(["generate", *options, "-p", "abc", "-n", "12", "--temp", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_keras_stays_away(base, tmp_path, cache):
    program = ("import sys; from llama_nb.cli import main; main(sys.argv[1:]); print(*{'keras', 'tensorflow', 'torch', 'peft'} & set(sys.modules), file=sys.stderr)")
    command = [sys.executable, "-c", program, "generate", "-m", str(base), "--lora", str(write_adapter(tmp_path / "adapter")), "-p", "a", "-n", "2", "--dtype", "int8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "", done.stderr


def test_an_adapter_from_the_hub():
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "tokenizer.json", "optimizer.pt"]
    assert needed_files(files) == ["adapter_config.json", "tokenizer.json", "adapter_model.safetensors"]


# What ours writes ----------------------------------------------------------------------------------------------------------------

def adapted_model(parts, ranks=(2, 2), seed=0):
    import keras
    from llama_nb.finetuning import adapter_variables, projections
    from llama_nb.model import build_model
    model = build_model(TINY, initializer=keras.initializers.RandomNormal(stddev=0.05, seed=seed))
    for variable in model.trainable_variables: variable.trainable = False
    for index, dense in enumerate(projections(model, parts).values()): dense.enable_lora(ranks[index % 2], lora_alpha=3.0 * ranks[index % 2] if index else None)
    for variable in adapter_variables(model): variable.assign(0.2 * np.random.default_rng(7).standard_normal(variable.shape))
    return model


PARTS = [("attention.wq", "attention.wv"), ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")]


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
@pytest.mark.parametrize("parts", PARTS, ids=["q and v", "all"])
def test_saved_as_peft_names_it(parts, ranks, tmp_path):
    from keras import ops
    from llama_nb.finetuning import load_lora, merge_lora, save_lora
    from llama_nb.meta import write_meta
    from llama_nb.model import build_model, load_weights, read_weight
    model = adapted_model(parts, ranks)
    write_meta(tmp_path / "base", TINY, lambda name: read_weight(model, name), dtype="float32")
    save_lora(tmp_path / "adapter", model)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config, tensors = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = [name for name, path in MODULES.items() if any(HF_NAMES[part] == path for part in parts)]
    assert config["peft_type"] == "LORA" and config["target_modules"] == sorted(modules) and config["r"] == 2 and config["bias"] == "none"
    assert set(tensors) == {f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_{half}.weight" for layer in range(TINY.n_layers) for module in modules for half in "AB"}
    ids, exact = np.array([IDS]), ops.convert_to_numpy(model(np.array([IDS])))
    fresh = lambda: load_weights(build_model(TINY), open_checkpoint(tmp_path / "base"))
    assert (ops.convert_to_numpy(load_lora(tmp_path / "adapter", fresh())(ids)) == exact).all()
    np.testing.assert_allclose(load_weights(build_model(TINY), with_lora(open_checkpoint(tmp_path / "base"), tmp_path / "adapter"))(ids), exact, atol=1e-5)
    save_lora(tmp_path / "adapter", load_lora(tmp_path / "adapter", fresh()))
    assert {name: tensor.read().tobytes() for name, tensor in read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors").items()} == {name: tensor.read().tobytes() for name, tensor in tensors.items()}
    np.testing.assert_allclose(merge_lora(model)(ids), exact, atol=1e-6)


# Against peft itself -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft", reason="peft is not installed (extra [parity]): adapters are not compared with its own")


def theirs(folder, **options):
    import transformers
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


def their_logits(model):
    import torch
    with torch.no_grad(): return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
@pytest.mark.parametrize("parts", PARTS, ids=["q and v", "all"])
def test_peft_reads_ours(parts, ranks, peft, tmp_path):
    from llama_nb.finetuning import save_lora
    from llama_nb.meta import write_meta
    from llama_nb.model import read_weight
    model = adapted_model(parts, ranks)
    write_meta(tmp_path / "base", TINY, lambda name: read_weight(model, name), dtype="float32")
    write_hf(tmp_path / "hf", open_checkpoint(tmp_path / "base"))
    save_lora(tmp_path / "adapter", model)
    found = peft.PeftModel.from_pretrained(theirs(tmp_path / "hf"), tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(found), model(np.array([IDS]))[0], atol=2e-5)


@pytest.mark.parametrize("settings", [
    dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, init_lora_weights="gaussian"),
    dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 3, "model.layers.0.self_attn.q_proj": 5, "layers.1.mlp.down_proj": 7}),
    dict(r=2, lora_alpha=16, target_modules=["o_proj", "lm_head"], layers_to_transform=[1]), dict(r=2, lora_alpha=4, target_modules=["up_proj"], modules_to_save=["lm_head", "norm"])], ids=str)
def test_ours_reads_peft(settings, peft, base, tmp_path, cache):
    import torch
    write_hf(tmp_path / "hf", open_checkpoint(base), {"tokenizer.model": (base / "tokenizer.model").read_bytes()})
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(tmp_path / "hf"), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for name, values in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name: values.data.normal_(0, 0.2)
    expected = their_logits(model)
    for safe in (True, False):
        model.save_pretrained(tmp_path / f"adapter {safe}", safe_serialization=safe)
        np.testing.assert_allclose(load(base, "float32", lora=tmp_path / f"adapter {safe}").logits(IDS), expected, atol=5e-4, rtol=1e-4)
