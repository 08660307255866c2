"""Chat templates of five families against transformers' own rendering; templates that mean harm."""
import json
import time

import pytest

from llama_nb import chat
from llama_nb.checkpoint import bard_folder
from llama_nb.hub import fetch
from llama_nb.chat import chat_text, message_ids, render_chat, render_template
from llama_nb.sampling import GenerationError
from llama_nb.tokenizer import CONTROL, NORMAL, Piece
from llama_nb.vocabularies import byte_letters, load_tokenizer, parse_model, space_writer, word_splitter
from test_tokenizer import all_merges, token, write_json

# Each family's form, in our words. SmolLM2's is its own, out of its GGUF file.
ALTERNATE = "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant should take turns') }}{% endif %}"
TEMPLATES = {
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}""" + ALTERNATE + """
{%- if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "mistral": "{{ bos_token }}{% for message in messages %}" + ALTERNATE + """{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('a role that is not known') }}{% endif %}{% endfor %}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] in ('user', 'system') %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "llama3": """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "llama3.2": """{{- bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}{% endif %}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}{% else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}{{ "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}{% set ns = namespace(last=loop.last) %}{% if not (message.role == 'ipython' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- else %}{{ message | tojson }}{% endif %}{% if ns.last %}{% break %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "smollm2": None,
}


def talk(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [dict(role=role, content=content) for role, content in zip(roles, contents)]
    return turns if system is None else [dict(role="system", content=system), *turns]


CONVERSATIONS = {
    "a question": talk("Which flowers do bees like?"),
    "a system message": talk("Hi", system="Be brief."),
    "three turns": talk("Hi", "Hello! What can I do for you?", "And which trees?"),
    "with a system message": talk("Hi", "Hello!", "And which trees?", "Lime trees.", "Thanks", system="You keep bees.\nYou are kind."),
    "nothing": talk(""),
    "spaces": talk("  Thanks!\n\nAnd trees?  ", "\tLimes \n", " "),
    "Unicode": talk("Ο καλύτερος τρόπος 🐝 👩‍🌾 e\u0301", "蜂蜜 ﷽", "ok\u200b\ufeff"),
    "code": talk("```python\nfor x in {{ y }}:\n    {% print(x) %}\n```", "<b>&amp;</b> \"quoted\" 'so' \\n", "1 < 2 & 3 > 2"),
    "two users": [*talk("Hi"), *talk("Hello?")],
    "long": talk("bees " * 400, "honey " * 200, "and?"),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    "A tokenizer for each family, ours and transformers', from one Hugging Face folder."
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra [parity]")
    spaced, letters = parse_model((bard_folder() / "tokenizer.model").read_bytes()).pieces, [Piece(letter, 0, NORMAL) for letter in byte_letters()]
    smollm2 = load_tokenizer(fetch("smollm2-135m-instruct", progress=False))

    def folder(family):
        if family in ("llama2", "mistral", "zephyr"):
            ids = ("<s>", "</s>"), write_json(spaced, all_merges((bard_folder() / "tokenizer.model").read_bytes()), *space_writer("first" if family == "mistral" else "prepend"),
                                              unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        elif family == "smollm2":
            ids = ("<|im_start|>", "<|im_end|>"), write_json(smollm2.vocabulary, list(map(list, smollm2.merges)), None, word_splitter("smollm"))
        else:
            special = [Piece(f"<|{name}|>", 0, CONTROL) for name in ("end_of_text", "begin_of_text", "start_header_id", "end_header_id", "eot_id")]
            ids = ("<|begin_of_text|>", "<|eot_id|>"), write_json([*letters, *special], [], None, word_splitter("llama-bpe"), ignore_merges=True)
        (begin, end), content = ids
        path, template = tmp_path_factory.mktemp(family), TEMPLATES[family] or smollm2.chat_template
        (path / "tokenizer.json").write_text(json.dumps(content | dict(post_processor=None)))
        (path / "tokenizer_config.json").write_text(json.dumps(dict(bos_token=begin, eos_token=dict(token(0, end), __type="AddedToken"), chat_template=template,
                                                                    tokenizer_class="PreTrainedTokenizerFast")))
        return path
    folders = {family: folder(family) for family in TEMPLATES}
    return {family: (load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)) for family, path in folders.items()}


@pytest.mark.parametrize("family", TEMPLATES)
def test_conversations_equal_transformers(families, family, monkeypatch):
    "The text, and the ids where nothing special stands in the messages; what one refuses the other does too."
    monkeypatch.setattr(chat, "render_chat", lambda template, messages, **names: render_template(template, list(messages), names))  # the process is tested below
    ours, theirs = families[family]
    refused = 0
    for messages in CONVERSATIONS.values():
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            refused += 1
            with pytest.raises(Exception, match=str(error)): chat_text(ours, messages)
            continue
        assert chat_text(ours, messages) == expected
        assert message_ids(ours, messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert refused == {"llama2": 1, "mistral": 3}.get(family, 0)


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_message_cannot_end_itself(families, family):
    tokenizer, _ = families[family]
    attack = "".join(sorted(tokenizer.special_ids)) + "x"
    honest, attacked = (message_ids(tokenizer, talk(content)) for content in ("x", attack))
    assert [id for id in attacked if id in tokenizer.special] == [id for id in honest if id in tokenizer.special]
    assert attack in tokenizer.decode(attacked)


EVIL = {
    "a power": "{{ 10**(10**9) }}", "nested loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4, "loops over text": "{% for a in 'x' * 999 %}" * 9 + "{% endfor %}" * 9,
    "a long text": "{{ 'bees' * 10**10 }}", "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "padding": "{{ 'x' | center(10**10) }}", "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "blind text": "{{ lipsum(n=10**7) }}", "replacing": "{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}", "a list": "{{ (range(99999) | list) * 99999 }}", "deep": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "classes": "{{ ().__class__.__base__.__subclasses__() }}", "globals": "{{ cycler.__init__.__globals__.os.system('touch canary') }}", "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a filter": "{{ (messages | attr('__class__')).mro() }}", "files": "{% include '/etc/passwd' %}", "changing": "{{ messages.append(1) }}", "names": "{{ open('canary', 'w') }}",
}


@pytest.mark.parametrize("name", EVIL)
def test_templates_that_mean_harm(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(chat.TEMPLATE_LIMITS, "CPU", 1)
    begin = time.process_time()
    with pytest.raises(GenerationError, match="^the chat template stops with .") as caught:
        render_chat(EVIL[name], CONVERSATIONS["a question"])
    assert time.process_time() - begin < 1 and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_process_changes_nothing(families):
    ours, theirs = families["smollm2"]
    messages = CONVERSATIONS["Unicode"]
    assert chat_text(ours, messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat("{{ messages[0].content }}|{{ x }}", talk("lone \ud83d"), x=3) == "lone \ud83d|3"
