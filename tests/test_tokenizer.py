"""Tokenizers against outside implementations and bad input; the embedding against Keras' own."""
import io
import random
import zipfile

import numpy as np
import pytest

from llama_nb.checkpoint import CheckpointError, bard_folder, cached_file, download_package, fetch
from llama_nb.forms import gguf_metadata
from llama_nb.tokenizer import (BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, ByteLevelTokenizer, HandMadeBPE, Piece, SentencePieceTokenizer, TokenizerError,
                                load_tokenizer, parse_model, show_tokens, synth_tokenizer)

BEES = "The best way to attract bees"
MISTRAL = "mistral_common/data/tokenizer.model.v1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
BARD = (bard_folder() / "tokenizer.model").read_bytes()


def random_texts(count, seed=0, longest=40):
    "Strings of words, spaces, ASCII, every plane of Unicode, combining marks and emoji, mixed."
    rng = random.Random(seed)
    words = ["bees", "king", "the", " ", "  ", "\n", "\t", "▁", "▁▁▁", "é", "e\u0301", "🐝", "👩\u200d🌾", "\0", "\ufeff", "</s>", "<0x41>", "12", "3.14"]
    pools = [lambda: rng.choice(words), lambda: chr(rng.randrange(32, 127)), lambda: chr(rng.randrange(0xA0, 0x3000)),
             lambda: rng.choice("etaoin shrdlu"), lambda: chr(rng.randrange(0x4E00, 0xD800)), lambda: chr(rng.randrange(0xE000, 0x110000))]
    return ["".join(rng.choice(pools)() for _ in range(rng.randrange(longest))) for _ in range(count)]


@pytest.fixture(scope="session")
def mistral():
    "Mistral's first tokenizer, 32,000 pieces, out of its wheel; kept in the cache folder."
    def make(part):
        with zipfile.ZipFile(download_package("mistral-common==1.13.1", part.parent)) as wheel:
            part.write_bytes(wheel.read(MISTRAL))
    try:
        return cached_file("mistral-tokenizer.model", MISTRAL_SHA256, make).read_bytes()
    except CheckpointError as error:
        pytest.skip(f"mistral-common cannot be had: {error}")


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
    return {"bard": SentencePieceTokenizer(BARD), "bard by hand": SentencePieceTokenizer(BARD, by_hand=True), "smollm2": load_tokenizer(smollm2_file)}


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
    texts, tokenizer = random_texts(5000), SentencePieceTokenizer(model, by_hand)
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

NAMES = pytest.mark.parametrize("name", ["bard", "bard by hand", "smollm2"])


@pytest.mark.parametrize("name", ["bard", "bard by hand"])
def test_every_byte_round_trips(tokenizers, name):
    tokenizer = tokenizers[name]
    assert {data[0] for data in tokenizer.token_bytes if len(data) == 1} == set(range(256))
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


def test_a_new_seed_leaves_the_tokenizer_usable():
    import tensorflow as tf
    tokenizer = SentencePieceTokenizer(BARD)
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

def write_gguf(path, model, pieces, kinds, **fields):
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    for name, value in fields.items(): getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


def test_every_place_of_a_tokenizer(tmp_path):
    (tmp_path / "model").mkdir(), (tmp_path / "gguf").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(BARD)
    (tmp_path / "any name").write_bytes(BARD)
    pieces = parse_model(BARD).pieces
    file = write_gguf(tmp_path / "gguf" / "bard.gguf", "llama", [piece.text for piece in pieces], [piece.kind for piece in pieces],
                      token_scores=[piece.score for piece in pieces], bos_token_id=1, eos_token_id=2)
    expected = SentencePieceTokenizer(BARD).encode(BEES)
    for path in (tmp_path / "model", tmp_path / "any name", file, tmp_path / "gguf", str(file)):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(BEES) == expected and tokenizer.decode(expected) == BEES and tokenizer.stop_ids == {2}


def test_byte_level_gguf_of_llama3(tmp_path):
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "be", "es", "Ġ20", "20", "bees", "<|begin|>", "<|eot|>", "<added one>"]
    file = write_gguf(tmp_path / "tiny.gguf", "gpt2", letters, [NORMAL] * (len(letters) - 3) + [CONTROL, CONTROL, USER_DEFINED], tokenizer_pre="llama-bpe",
                      token_merges=["b e", "e s", "2 0"], bos_token_id=len(letters) - 3, eot_token_id=len(letters) - 2)
    tokenizer = load_tokenizer(file)
    text = "bees <added one>\n2023<|eot|>"
    pieces = [tokenizer.pieces[id] for id in tokenizer.encode(text)]
    assert pieces == ["<|begin|>", "bees", "Ġ", "<added one>", "Ċ", "20", "2", "3", *"<|eot|>"]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.stop_ids == {len(letters) - 2}


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS"),
    (b"\x08\x01", "not a SentencePiece model"), (b"PK\3\4" + bytes(100), "not a SentencePiece model"), (b"hello, world" * 99, "not a SentencePiece model"),
    (b'{"model": {"type": "BPE"}}', "not a SentencePiece model"), (b"GGUF" + bytes(20), "not a GGUF file"), (b"GGUF", "not a GGUF file"), (bytes(1000), "not a SentencePiece model")])
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    if content is not None: path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.__cause__ is None


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
    twice = synth_tokenizer(300) + synth_tokenizer(300)
    with pytest.raises(TokenizerError):
        SentencePieceTokenizer(twice).encode("bees")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer.model or one .gguf file was expected"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("fields, message", [(dict(model="bert"), "kind llama or gpt2"), (dict(model="gpt2", pre="qwen2"), "gpt-2, smollm, llama-bpe")])
def test_gguf_of_another_kind(tmp_path, fields, message):
    pre = dict(tokenizer_pre=fields["pre"]) if "pre" in fields else {}
    file = write_gguf(tmp_path / "other.gguf", fields["model"], ["a", "b", "ab"], [NORMAL] * 3, token_merges=["a b"], **pre)
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
    model, cannot, odd = parse_model(BARD), "byte-pair models with identity normalization", "six kinds, with one for the unknown, and 256 bytes"
    without = [[piece for id, piece in enumerate(model.pieces) if id != missing] for missing in (0, 99)]
    for message, change in [(cannot, dict(is_bpe=False)), (cannot, dict(charsmap=b"x")), (cannot, dict(squeeze_spaces=True)),
                            (odd, dict(pieces=[*model.pieces, Piece("thee", 0, 9)])), *((odd, dict(pieces=pieces)) for pieces in without)]:
        with pytest.raises(TokenizerError, match=message):
            HandMadeBPE(model._replace(**change))


@pytest.mark.parametrize("arguments, message", [(dict(merges=[], splitter="qwen2"), "gpt-2, smollm, llama-bpe"),
                                                (dict(merges=["a b"]), "found 'a b'"), (dict(merges=["ab"]), "found 'ab'")])
def test_byte_level_vocabularies_that_do_not_fit(arguments, message):
    with pytest.raises(TokenizerError, match=message):
        ByteLevelTokenizer(["a", "b"], special=[], **arguments)


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
    from llama_nb.embedding import listening, tap
    with listening(lambda name, value: value + 1):
        with listening(lambda name, value: value * 10):
            assert tap("x", 1) == 10
        assert tap("x", 1) == 2
        with pytest.raises(ZeroDivisionError), listening(lambda name, value: 1 / 0):
            tap("x", 1)
        assert tap("x", 1) == 2
    assert tap("x", 1) == 1
