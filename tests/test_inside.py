"""Looking inside: what a trace shows is what the model computes, replacing nothing changes nothing, and the live part of
chapter 25 works in a browser, from a file."""
import json

import numpy as np
import pytest
from bs4 import BeautifulSoup
from keras import ops
from test_book import HTML, browser, page, settled  # noqa: F401 (fixtures)

from llama_nb import GenerationError, Llama
from llama_nb.inside import lens, run_pass, side_by_side, silence, star, trace
from llama_nb.model import weight_variables

PROMPT = "The best way to attract bees"


@pytest.fixture(scope="module", params=["bard", "smollm2"])
def llm(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def seen(llm):
    return trace(llm, PROMPT)


# Reading

def test_the_logits_are_the_models(llm, seen):
    np.testing.assert_array_equal(seen["logits"], llm.logits(seen.ids))


def test_the_parts_add_up_to_the_stream(llm, seen):
    parts = seen.stack("layers.*.attention") + seen.stack("layers.*.feed_forward")
    np.testing.assert_allclose(seen.stream[:-1] + parts, seen.stream[1:], atol=1e-5 * abs(seen.stream).max())


def test_every_part_of_every_layer_is_there(llm, seen):
    kinds = {star(name) for name in seen}
    blocks = [name for name in kinds if "*" in name]
    assert len(seen) == len(kinds) + (llm.config.n_layers - 1) * len(blocks)
    assert {"layers.*.attention.weights", "layers.*.attention.q", "layers.*.feed_forward.gate", "layers.*", "norm", "logits"} <= kinds
    assert seen.stack("layers.*.attention.scores").shape == (llm.config.n_layers, llm.config.n_heads, len(seen.ids), len(seen.ids))


def test_the_lens_after_the_last_block_is_the_models_answer(llm, seen):
    np.testing.assert_allclose(lens(llm, seen.stream)[-1], seen["logits"], atol=1e-3)


def test_the_model_stays_deaf_outside_of_a_trace(llm, seen):
    before = llm.decoder.advance(seen.ids)
    trace(llm, PROMPT, {"logits": lambda value, seen: 0 * value})
    np.testing.assert_allclose(llm.decoder.advance(seen.ids), before, atol=1e-3)
    np.testing.assert_array_equal(llm.logits(seen.ids), seen["logits"])


# Replacing

def test_replacing_each_value_by_itself_changes_nothing(llm, seen):
    same = trace(llm, PROMPT, dict(seen))
    np.testing.assert_array_equal(same["logits"], seen["logits"])


def test_removing_nothing_changes_nothing(llm, seen):
    for nothing in ({}, silence([]), {star(name): lambda value, seen: value for name in seen}):
        np.testing.assert_array_equal(trace(llm, PROMPT, nothing)["logits"], seen["logits"])


def test_a_head_silenced_by_its_weights_or_by_the_output_matrix_is_the_same(llm):
    layer, head, size = 1, 2, llm.config.head_dim
    wo = weight_variables(llm.model)[f"layers.{layer}.attention.wo.weight"]
    kept = ops.convert_to_numpy(wo)
    wo.assign(np.where(np.arange(len(kept))[:, None] // size == head, 0, kept))
    other = llm.logits(llm.tokenizer.encode(PROMPT))
    wo.assign(kept)
    ours = trace(llm, PROMPT, silence([(layer, head)]))["logits"]
    assert abs(ours - trace(llm, PROMPT)["logits"]).max() > 1e-3
    np.testing.assert_allclose(ours, other, atol=1e-3)


def test_an_answer_is_the_other_prompts_if_its_whole_stream_is(bard):
    one, other = trace(bard, [1, 300, 301, 302]), trace(bard, [1, 310, 301, 302])
    np.testing.assert_array_equal(trace(bard, one.ids, {"layers.1": other["layers.1"]})["logits"], other["logits"])


def test_rows_of_a_batch_are_treated_apart(bard):
    ways = [{}, silence([(0, 1), (1, 2)]), {"layers.1": lambda value, seen: seen("layers.*")}]
    ids = bard.tokenizer.encode(PROMPT)
    together = run_pass(bard, [ids] * 3, side_by_side(ways))
    for row, way in zip(together, ways):
        np.testing.assert_allclose(row, trace(bard, ids, way)["logits"], atol=1e-4)


@pytest.mark.parametrize("replace, words", [
    ({"layers.99": np.zeros(1)}, "layers.99 is not a value of this model"),
    ({"layers.0": np.zeros(7)}, r"layers.0: the replacement should have shape \(1, \d+, \d+\), found \(7,\)"),
    ({"layers.*": lambda value, seen: 0.0}, r"found \(\)"),
])
def test_mistakes_are_named(bard, replace, words):
    with pytest.raises(GenerationError, match=words):
        trace(bard, PROMPT, replace)


def test_only_the_keras_model_can_be_looked_into(bard):
    with pytest.raises(GenerationError, match="only a model that Keras computes"):
        trace(Llama(None, bard.tokenizer, bard.config), PROMPT)


# The live part of the chapter

CHAPTER = HTML / "nbs/25_inside.html"
unbuilt = pytest.mark.skipif(not CHAPTER.exists(), reason="the book has not been built: `make book`")
built = lambda test: pytest.mark.book(unbuilt(test))


@pytest.fixture
def live(page):  # noqa: F811
    page.goto(CHAPTER.as_uri())
    settled(page)
    yield page
    assert page.problems == []


def stored():
    "What the chapter computed for the page."
    return json.loads(BeautifulSoup(CHAPTER.read_text("utf-8"), "html.parser").select_one("script.inside-data").string)


def chosen(live):
    return live.locator("label[for=inside-layer], label[for=inside-head]").all_inner_texts()


def mark(live):
    return live.locator(".inside-live [role=status]").inner_text()


@built
def test_the_page_holds_what_the_model_computes():
    assert {prompt["model"] for prompt in stored()} == {"SmolLM2", "bard"}
    prompt = next(prompt for prompt in stored() if "".join(prompt["pieces"]) == PROMPT)
    last = len(prompt["best"]) - 5
    assert prompt["words"][prompt["best"][last]] == " is"
    assert prompt["chances"][last] == pytest.approx(550, abs=5)


@built
def test_the_live_part_answers_to_the_keyboard(live):
    layer, head = live.get_by_role("slider").all()
    assert chosen(live) == ["Layer 18", "Head 6"] and "“␣Qu”" in mark(live)
    layer.press("ArrowLeft")
    head.press("Home")
    assert chosen(live) == ["Layer 17", "Head 0"]
    live.locator(".inside-live .tokens input").last.press("ArrowLeft")
    assert mark(live).startswith("“el” (token 10)")
    live.locator(".inside-live .lens button").nth(30).press("Enter")
    assert chosen(live) == ["Layer 29", "Head 0"]


@built
def test_the_live_part_shows_each_prompt(live):
    for index, prompt in enumerate(stored()):
        live.select_option("#inside-prompt", str(index))
        tokens = len(prompt["pieces"])
        assert live.locator(".inside-live .tokens label").count() == tokens
        assert live.locator(".inside-live .map rect.weight").count() == tokens * (tokens + 1) // 2
        assert live.locator(".inside-live .lens button").count() == prompt["layers"] + 1
        assert live.locator("ol.best li").count() == 5


@built
def test_a_click_on_a_map_chooses_the_head(live):
    maps = live.locator(".inside-live canvas")
    area = maps.bounding_box()
    maps.click(position={"x": area["width"] * 16.5 / 30, "y": area["height"] * 0.5 / 9})
    assert chosen(live) == ["Layer 16", "Head 0"] and mark(live).startswith("“␣met” (token 11) looks at “el” (token 10")


@built
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_live_part_fits_and_can_be_read(live, mode, width):
    live.set_viewport_size({"width": width, "height": 900})
    live.evaluate("mode => { document.documentElement.dataset.mode = document.documentElement.dataset.theme = mode }", mode)
    box = live.locator(".inside-live").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    beyond = "box => [...box.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > box.getBoundingClientRect().right + 1).length"
    assert live.locator(".inside-live").evaluate(beyond) == 0
