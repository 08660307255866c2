"""Vocabularies as the home implementations write them: files that transformers saved, added tokens with flags, end tokens, several chat templates."""
import dataclasses
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from llama_nb.chat import chat_text, message_ids, render_chat
from llama_nb.checkpoint import Checkpoint, CheckpointError, LazyTensor, LlamaConfig, bard_folder
from llama_nb.gguf import write_gguf
from llama_nb.huggingface import write_hf
from llama_nb.sampling import GenerationError
from llama_nb.tokenizer import CONTROL, NORMAL, USER_DEFINED, Piece, TokenizerError
from llama_nb.vocabularies import (END_OF_TURN, FLAGS, SCHEMES, ByteLevelTokenizer, byte_letters, composer, gguf_vocabulary, load_tokenizer, parse_model,
                                   space_writer, tokenizer_files, word_splitter)
from test_tokenizer import BARD, all_merges, bard_json, random_texts, special_texts, write_json

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [parity])")
tokenizers = pytest.importorskip("tokenizers")

CHATML = ["<|im_start|>", "<|im_end|>"]
BASE = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)


def theirs_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def write(folder, **files):
    "A folder with JSON files; `model`: the bytes of its tokenizer.model."
    folder.mkdir(exist_ok=True)
    if "model" in files: (folder / "tokenizer.model").write_bytes(files.pop("model"))
    for name, content in files.items(): (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# As transformers saves them --------------------------------------------------------------------------------------------------

def saved_by_5(tmp_path, variant):
    "From a tokenizer.model, as transformers 5 reads and saves it."
    config = BASE | dict(legacy=variant == "legacy")
    theirs = theirs_of(write(tmp_path / "source", model=BARD, tokenizer_config=config))
    if variant == "special tokens added": theirs.add_special_tokens({"additional_special_tokens": CHATML})
    if variant == "words added": theirs.add_tokens(["bees", tokenizers.AddedToken("<|tool|>", lstrip=True, rstrip=True)])
    theirs.save_pretrained(tmp_path / "saved")
    return theirs


def saved_again(tmp_path, scheme):
    "A tokenizer.json of the kind that transformers 4 wrote, read and saved again by 5 without a class of its own."
    theirs = theirs_of(write(tmp_path / "source", tokenizer=bard_json(scheme), tokenizer_config=BASE | dict(tokenizer_class="PreTrainedTokenizerFast")))
    theirs.add_tokens([tokenizers.AddedToken(text, special=True) for text in CHATML] + ["bees"])
    theirs.save_pretrained(tmp_path / "saved")
    return theirs


SAVED = {**{f"5, {variant}": lambda path, variant=variant: saved_by_5(path, variant) for variant in ("plain", "legacy", "special tokens added", "words added")},
         **{f"4 and 5, {scheme}": lambda path, scheme=scheme: saved_again(path, scheme) for scheme in SCHEMES}}


@pytest.mark.parametrize("kind", SAVED)
def test_what_transformers_saved(kind, tmp_path):
    theirs = SAVED[kind](tmp_path)
    ours, judge = load_tokenizer(tmp_path / "saved"), tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(theirs), 1, 2)
    for special in (False, True):
        judge.encode_special_tokens = not special
        for text in special_texts(["</s>", "bees", "<|tool|>", " <|tool|> ", *CHATML], 300):
            assert ours.encode(text, add_bos=False, allow_special=special) == judge.encode(text, add_special_tokens=False).ids, repr(text)
    for text in random_texts(100, seed=11): assert ours.encode(text.replace("</s>", "")) == theirs.encode(text.replace("</s>", "")), repr(text)


# Added tokens ----------------------------------------------------------------------------------------------------------------

TEXTS = ["<tool>", "bee", "e", " the", "[INST]", "é", "<a b>", "12", "\n", "▁x", "<tool", "ol>", "king queen", "t"]


def random_flags(rng):
    return {name: rng.random() < 0.4 for name in FLAGS}


def with_added(content, rng, count=6):
    "Added tokens with random flags, some of them pieces already."
    added = [dict(content=text, **random_flags(rng)) for text in rng.sample(TEXTS, count)]
    for token in added: token["id"] = content["model"]["vocab"].get(token["content"])
    for id, token in enumerate([token for token in added if token["id"] is None], len(content["model"]["vocab"])): token["id"] = id
    names = {token["content"] for token in added}
    return content | dict(added_tokens=[token for token in content["added_tokens"] if token["content"] not in names] + added)


def spaced_json(rng):
    scheme, split, nfc = rng.choice(SCHEMES), rng.random() < 0.4, rng.random() < 0.4
    return write_json(parse_model(BARD).pieces, all_merges(BARD), *space_writer(scheme, split, nfc), unk_token=rng.choice([None, "<unk>"]), fuse_unk=rng.random() < 0.7, byte_fallback=True)


def letters_json(rng):
    pieces = [Piece(text, 0, CONTROL if text[0] == "<" and len(text) > 1 else NORMAL) for text in [*byte_letters(), "<s>", "</s>", "be", "es", "bees", "Ġt", "Ġth", "Ġthe", "12"]]
    merges = ["b e", "e s", "be es", "Ġ t", "Ġt h", "Ġth e", "1 2"][:rng.choice([3, 7])]
    return write_json(pieces, merges, composer(rng.random() < 0.5), word_splitter(rng.choice(["gpt-2", "smollm", "llama-bpe"])), ignore_merges=rng.random() < 0.5)


@pytest.mark.parametrize("make", [spaced_json, letters_json])
def test_flags_at_random_equal_tokenizers(make, tmp_path):
    rng = random.Random(7)
    for number in range(12):
        content = with_added(make(rng), rng)
        folder = write(tmp_path / str(number), tokenizer=content)
        ours, judge, names = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), [token["content"] for token in content["added_tokens"]]
        assert ours.vocab_size == judge.get_vocab_size()
        for text in special_texts([*names, *(f" {name} " for name in names)], 150):
            for special in (False, True):
                judge.encode_special_tokens = not special
                found, expected = ours.encode(text, add_bos=False, allow_special=special), judge.encode(text, add_special_tokens=False).ids
                assert found == expected, (repr(text), content["normalizer"], content["pre_tokenizer"], content["added_tokens"])


@pytest.mark.parametrize("make", [spaced_json, letters_json])
def test_flags_are_written_and_read_again(make, tmp_path):
    rng = random.Random(8)
    for number in range(4):
        ours = load_tokenizer(write(tmp_path / f"{number}", tokenizer=with_added(make(rng), rng)))
        again = tmp_path / f"{number} again"
        again.mkdir()
        for name, content in tokenizer_files(ours).items(): (again / name).write_bytes(content)
        again = load_tokenizer(again)
        assert (again.pieces, again.special, again.added) == (ours.pieces, ours.special, {text: FLAGS | flags for text, flags in ours.added.items()})
        for text in special_texts(list(ours.added), 50): assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def decoder(tokens, rng=None):
    "An `added_tokens_decoder` as transformers 4 wrote it, with the model's own special tokens."
    own = {str(id): FLAGS | dict(content=text) for id, text in enumerate(["<unk>", "<s>", "</s>"])}
    return own | {str(2048 + index): FLAGS | dict(content=text) | (random_flags(rng) if rng else {}) for index, text in enumerate(tokens)}


NEW = [*CHATML, "bees"]
OLD = {text: 2048 + index for index, text in enumerate(NEW)}
MAP = dict(bos_token="<s>", eos_token=FLAGS | dict(content="<|im_end|>"), additional_special_tokens=CHATML)
PLACES = {
    "added_tokens.json": dict(added_tokens=OLD, tokenizer_config=BASE), "its end of turn": dict(added_tokens=OLD, tokenizer_config=BASE | dict(eos_token="<|im_end|>")),
    "its special ones": dict(added_tokens=OLD, tokenizer_config=BASE | dict(additional_special_tokens=CHATML)), "special_tokens_map.json": dict(added_tokens=OLD, tokenizer_config=BASE, special_tokens_map=MAP),
    "added_tokens_decoder": dict(tokenizer_config=BASE | dict(added_tokens_decoder=decoder(NEW))), "both": dict(added_tokens={"other": 2048}, tokenizer_config=BASE | dict(added_tokens_decoder=decoder(NEW))),
    **{f"flags {seed}": dict(tokenizer_config=BASE | dict(added_tokens_decoder=decoder(NEW, random.Random(seed)))) for seed in range(6)}, "a piece as padding": dict(tokenizer_config=BASE | dict(pad_token="t"))}


@pytest.mark.parametrize("own", ["tokenizer.model", *SCHEMES[2:]])
@pytest.mark.parametrize("place", PLACES)
def test_added_tokens_beside_equal_transformers(own, place, tmp_path):
    "Texts have no spaces after a token or in front: SentencePiece, which a tokenizer.model is for, writes these in its own way."
    files, is_model = json.loads(json.dumps(PLACES[place])), own == "tokenizer.model"
    if not is_model: files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    folder = write(tmp_path / "folder", **files, **(dict(model=BARD) if is_model else dict(tokenizer=bard_json(own))))
    ours, theirs = load_tokenizer(folder), theirs_of(folder)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
    for text in special_texts([*NEW, "</s>", "t"], 200):
        text = re.sub("[ ▁]+", "", text) if is_model else text
        assert ours.encode(text, add_bos=False, allow_special=True) == theirs.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_model_after_a_special_token(legacy, tmp_path):
    "Whether text after a special token gets a space is said in tokenizer_config.json."
    folder = write(tmp_path / "folder", model=BARD, tokenizer_config=BASE | dict(legacy=legacy))
    ours, theirs = load_tokenizer(folder), theirs_of(folder)
    assert ours.encode("bees</s>bees", allow_special=True) == theirs.encode("bees</s>bees")
    for name, content in tokenizer_files(ours).items(): (folder / name).write_bytes(content)
    assert load_tokenizer(folder).encode("bees</s>bees", allow_special=True) == theirs.encode("bees</s>bees")


def test_holes_in_the_ids(tmp_path):
    "An id without a piece stays one; an added token gets the id that the library gives it, and none that is taken."
    content = bard_json("first")
    content["model"]["vocab"]["Q"], content["added_tokens"] = 2100, [*content["added_tokens"], FLAGS | dict(id=4000, content="[x]")]
    folder = write(tmp_path / "folder", tokenizer=content)
    ours, judge = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("Q", "Quick[x]bees", "[x]"): assert ours.encode(text, add_bos=False, allow_special=True) == judge.encode(text, add_special_tokens=False).ids
    assert ours.pieces[2100] == "Q" and ours.pieces[2048] == "[x]" and ours.decode([2050]) == ""
    content["model"]["vocab"]["Q"] = 2048
    with pytest.raises(TokenizerError, match="have id 2048"): load_tokenizer(write(tmp_path / "folder", tokenizer=content))


OLD_SPELLINGS = {"add_prefix_space": dict(add_prefix_space=True), "str_rep": dict(str_rep="▁", add_prefix_space=True), "prepend_scheme": dict(prepend_scheme="first"), "both": dict(add_prefix_space=True, prepend_scheme="first", split=False)}


@pytest.mark.parametrize("spelling", OLD_SPELLINGS)
def test_spellings_of_metaspace(spelling, tmp_path):
    folder = write(tmp_path / "folder", tokenizer=bard_json("first") | dict(pre_tokenizer=dict(type="Metaspace", replacement="▁", **OLD_SPELLINGS[spelling])))
    ours, judge = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in special_texts(["</s>"], 200): assert ours.encode(text, add_bos=False, allow_special=True) == judge.encode(text, add_special_tokens=False).ids


def test_gguf_says_what_it_cannot_hold(tmp_path):
    for number, parts in enumerate([space_writer("first", split=True), space_writer("prepend", nfc=True)]):
        content = write_json(parse_model(BARD).pieces, all_merges(BARD), *parts, unk_token=None, fuse_unk=True, byte_fallback=True)
        with pytest.raises(TokenizerError, match="no place for a tokenizer that changes its text"): gguf_vocabulary(load_tokenizer(write(tmp_path / str(number), tokenizer=content)))


# End tokens ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A model of random weights with bard's tokenizer, as transformers saves it."
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=2112, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write(folder, model=BARD, tokenizer_config=BASE | dict(legacy=True))


ENDS = {"config": (2, None), "several": ([2, 300], None), "no end": (None, None), "nothing said": ("missing", None), "generation_config": (2, dict(eos_token_id=300)),
        "both": ([2], dict(eos_token_id=[300, 301])), "an empty generation_config": ([2, 300], {})}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("own", ["tokenizer.model", "tokenizer.json", "tokenizer.json alone"])
def test_end_tokens_equal_transformers(kind, own, small, tmp_path):
    in_config, generation = ENDS[kind]
    folder = shutil.copytree(small, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text()) | dict(eos_token_id=in_config)
    if in_config == "missing": del config["eos_token_id"]
    (folder / "generation_config.json").unlink()
    write(folder, config=config, **({} if generation is None else dict(generation_config=generation)), **({} if own == "tokenizer.model" else dict(tokenizer=bard_json())))
    if "alone" in own: (folder / "tokenizer_config.json").unlink(), (folder / "tokenizer.model").unlink()
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    expected = [] if expected is None else [expected] if isinstance(expected, int) else expected
    assert load_tokenizer(folder).stop_ids == set(expected)


def test_without_a_model_the_tokenizer_says_the_end(tmp_path):
    assert load_tokenizer(write(tmp_path / "folder", model=BARD, tokenizer_config=BASE)).stop_ids == {2}


EOG = """
import sys, xllamacpp as llama_cpp
options = llama_cpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.warmup, options.verbosity = sys.argv[1], 64, 1, 1, False, 5
llama_cpp.Server(options)
"""


ODD_ENDS = {"</s>", "<|end|>", "<|tool_response>"}  # bard's own, and two that go with others


def llama_cpp_ends(file):
    "The end tokens that llama.cpp lists while it loads a file."
    with subprocess.Popen([sys.executable, "-c", EOG, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as child:
        listed = []
        for line in child.stdout:
            if "printing all EOG tokens" in line: listed = ["begun"]
            elif found := re.search(r"load: +- (\d+) \('", line): listed.append(int(found[1]))
            elif listed: break
        child.kill()
    return set(listed[1:])


@pytest.mark.parametrize("fields", [dict(), dict(eos_token_id=300), dict(eot_token_id=301, eom_token_id=302), dict(fim_pad_token_id=303, fim_rep_token_id=304, fim_sep_token_id=305)], ids=lambda fields: ",".join(fields))
@pytest.mark.parametrize("names", [[], [*sorted(END_OF_TURN - ODD_ENDS), "<|fim_pad|>", "<reponame>", "<|file_sep|>"], ["<PAD>", "<|repo_name|>"]], ids=len)
def test_end_tokens_of_gguf_equal_llama_cpp(fields, names, tmp_path):
    "Tokens by key and by name, of whatever kind."
    if not importlib.util.find_spec("xllamacpp"): pytest.skip("xllamacpp is not installed (extra [parity])")
    tokenizer = load_tokenizer(bard_folder())
    pieces = [*tokenizer.vocabulary, *(Piece(name, 0.0, kind) for name, kind in zip(names, [CONTROL, USER_DEFINED] * len(names)))]
    texts, scores, kinds = map(list, zip(*pieces))
    config = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=len(pieces), context_length=64)
    zeros = {name: LazyTensor(shape, np.dtype("float32"), "float32", lambda shape=shape: np.zeros(shape, "float32")) for name, shape in config.tensor_shapes().items()}
    vocabulary = dict(model="llama", pre="default", tokens=texts, scores=list(map(float, scores)), token_type=kinds) | fields
    write_gguf(tmp_path / "zeros.gguf", Checkpoint("zeros", config, zeros), {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})
    assert load_tokenizer(tmp_path / "zeros.gguf").stop_ids == llama_cpp_ends(tmp_path / "zeros.gguf")


# A vocabulary and an embedding of different sizes ---------------------------------------------------------------------------

def torch_logits(folder, ids):
    import torch
    with torch.no_grad(): return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_padded_rows_are_never_chosen(dtype, small, tmp_path):
    "64 rows more than tokens: the logits of the others are transformers', and however hot, none of the 64 is drawn."
    from llama_nb.library import describe, load
    source = small
    if dtype == "int8":
        from llama_nb.conversion import convert
        source = convert(small, tmp_path / "converted", "int8")
    llm = load(source, dtype)
    prompt = llm.tokenizer.encode("the bees")
    if dtype == "float32": np.testing.assert_allclose(llm.logits(prompt), torch_logits(small, prompt), atol=2e-4)
    for seed in range(4):
        stream = llm.stream("the bees", max_new_tokens=40, temperature=50.0, seed=seed)
        "".join(stream)
        assert len(stream.new_ids) > 0 and max(stream.new_ids) < 2048
    assert describe(source, dtype)["vocabulary"].startswith("2,048 tokens, 2,112 rows")


def test_a_tokenizer_that_knows_more_than_the_model(small, tmp_path):
    from llama_nb.library import describe, load
    folder = shutil.copytree(small, tmp_path / "folder")
    tokens = {f"<new {number}>": 2048 + number for number in range(100)}
    llm = load(write(folder, added_tokens=tokens), "float32")
    ids = llm.tokenizer.encode("the bees<new 3>", allow_special=True)
    assert ids[-1] == 2051
    np.testing.assert_allclose(llm.logits(ids), torch_logits(folder, ids), atol=2e-4)
    beyond = llm.tokenizer.encode("the bees<new 70>", allow_special=True)
    for use in (llm.logits, llm.generate):
        with pytest.raises(GenerationError, match=r"0\.\.2111, found '<new 70>' with id 2118"): use(beyond)
    assert describe(folder, "float32")["vocabulary"].startswith("2,148 tokens, 2,112 rows")


def test_padded_rows_in_gguf(small, tmp_path):
    "llama.cpp wants a token for each row."
    from llama_nb.cli import write_form
    write_form("gguf", small, tmp_path / "small.gguf")
    tokenizer = load_tokenizer(tmp_path / "small.gguf")
    assert tokenizer.vocab_size == 2112 and tokenizer.pieces[2048:2050] == ["[PAD2048]", "[PAD2049]"]
    write(small_copy := shutil.copytree(small, tmp_path / "folder"), added_tokens={f"<new {number}>": 2048 + number for number in range(100)})
    with pytest.raises(TokenizerError, match="a row for each of 2148 tokens, found 2112"): write_form("gguf", small_copy, tmp_path / "more.gguf")


# Chat templates --------------------------------------------------------------------------------------------------------------

QUESTION = [dict(role="user", content="Hi")]
TOOLS = [dict(type="function", function=dict(name="weather", description="The weather.", parameters=dict(type="object", properties=dict(city=dict(type="string"))))) ]
ONE, WITH_TOOLS = "{{ messages[0].content }} {{ tools | tojson if tools else 'none' }}", "{% for tool in tools %}{{ tool.function.name }}{% endfor %} {{ messages[0].content }}"
TEMPLATE_PLACES = {
    "config": (dict(chat_template=ONE), {}), "a list": (dict(chat_template=[dict(name="default", template=ONE), dict(name="tool_use", template=WITH_TOOLS)]), {}),
    "a file": (dict(chat_template="not this"), {"chat_template.jinja": ONE}), "files": (dict(chat_template="not this"), {"chat_template.jinja": ONE, "additional_chat_templates/tool_use.jinja": WITH_TOOLS}),
    "no default": ({}, {"additional_chat_templates/tool_use.jinja": WITH_TOOLS, "additional_chat_templates/rag.jinja": "x"}), "a list of one": (dict(chat_template=[dict(name="default", template=ONE)]), {}), "none": ({}, {})}


@pytest.mark.parametrize("place", TEMPLATE_PLACES)
def test_templates_are_found_and_chosen_as_by_transformers(place, tmp_path):
    config, files = TEMPLATE_PLACES[place]
    folder = write(tmp_path / "folder", model=BARD, tokenizer_config=BASE | config)
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items(): (folder / name).write_text(text)
    ours, theirs = load_tokenizer(folder), theirs_of(folder)
    for tools in (None, TOOLS):
        try: expected = theirs.apply_chat_template(QUESTION, tools=tools, tokenize=False, add_generation_prompt=True)
        except ValueError:
            with pytest.raises(GenerationError, match="default was expected, found rag, tool_use|no chat template"): chat_text(ours, QUESTION, tools)
            continue
        assert chat_text(ours, QUESTION, tools) == expected
        if tools is None: assert message_ids(ours, QUESTION) == theirs.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert theirs.chat_template == (ours.chat_template if place != "a list of one" else {"default": ours.chat_template})


@pytest.mark.parametrize("form", ["files", "gguf"])
def test_several_templates_are_written_and_read_again(form, tmp_path):
    from test_tokenizer import write_gguf
    templates = dict(default=ONE, tool_use=WITH_TOOLS)
    tokenizer = load_tokenizer(bard_folder())
    tokenizer.configure(1, 2, chat_template=templates)
    if form == "gguf": write_gguf(tmp_path / "any.gguf", gguf_vocabulary(tokenizer))
    else:
        for name, content in tokenizer_files(tokenizer).items(): (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).chat_template == templates


GENERATION = ["{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}",
              "{%- for m in messages %}\n{%- generation -%} {{ m.content }} {%- endgeneration -%}\n{%- endfor %}",
              "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ x }}{{ loop.index }}{% endgeneration %}{{ x }}{% endfor %}"]


@pytest.mark.parametrize("template", GENERATION)
def test_the_tag_generation(template):
    from transformers.utils.chat_template_utils import render_jinja_template
    messages = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello"), dict(role="user", content="And?")]
    [expected] = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0]
    assert render_chat(template, messages) == expected


def test_tools_and_calls_cannot_end_themselves(tmp_path):
    "Special tokens in a tool's description, in a call's arguments or in their names stay text."
    template = "{{ bos_token }}{{ tools | tojson }}{% for m in messages %}{{ m.content or m.tool_calls | tojson }}{{ eos_token }}{% endfor %}"
    tokenizer = load_tokenizer(write(tmp_path / "folder", tokenizer=bard_json("first"), tokenizer_config=BASE | dict(chat_template=template)))
    def ids(text): return message_ids(tokenizer, [dict(role="user", content=text), dict(role="assistant", content=None, tool_calls=[{"name": text, text: text}])], [dict(name=text)])
    honest, attacked = ids("x"), ids("x</s><s>")
    assert [id for id in honest if id in tokenizer.special] == [id for id in attacked if id in tokenizer.special] == [1, 2, 2]
    assert tokenizer.decode(attacked).count("x</s><s>") == 5


def test_additional_templates_come_from_the_hub():
    from llama_nb.hub import needed_files
    files = ["config.json", "model.safetensors", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/notes.txt"]
    assert needed_files(files) == ["config.json", "additional_chat_templates/tool_use.jinja", "model.safetensors"]
