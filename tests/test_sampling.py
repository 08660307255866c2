"The rules of sampling against their definitions, against transformers' own, and at the edges."
import math

import numpy as np
import pytest

from llama_nb.sampling import GenerationError, Sampler, draw, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, softmax

INF = math.inf


def random_logits(seed, size=60):
    return np.random.default_rng(seed).normal(scale=3, size=size).astype(np.float32)


# The definitions, in loops.

def probabilities_of(logits):
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def top_k_definition(logits, k):
    return {id for id in range(len(logits)) if sum(other > logits[id] for other in logits) < k}


def top_p_definition(logits, p):
    probabilities, kept, total = probabilities_of(logits), set(), 0.0
    for id in sorted(range(len(logits)), key=lambda id: (-probabilities[id], id)):
        if total >= p:
            break
        kept.add(id)
        total += probabilities[id]
    return kept


def min_p_definition(logits, p):
    probabilities = probabilities_of(logits)
    return {id for id, q in enumerate(probabilities) if q >= p * max(probabilities) * (1 - 1e-9)}


def penalty_definition(logits, ids, penalty):
    return [logit if id not in ids else logit / penalty if logit > 0 else logit * penalty for id, logit in enumerate(logits)]


def kept(logits):
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


@pytest.mark.parametrize("seed", range(5))
class TestAgainstDefinitions:
    def test_softmax(self, seed):
        np.testing.assert_allclose(softmax(random_logits(seed)), probabilities_of(random_logits(seed).tolist()), rtol=1e-6)

    @pytest.mark.parametrize("k", [1, 2, 17, 59, 60, 1000])
    def test_top_k(self, seed, k):
        logits = random_logits(seed)
        assert kept(keep_top_k(logits, k)) == top_k_definition(logits.tolist(), k)

    @pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
    def test_top_p(self, seed, p):
        logits = random_logits(seed)
        assert kept(keep_top_p(logits, p)) == top_p_definition(logits.tolist(), p)

    @pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
    def test_min_p(self, seed, p):
        logits = random_logits(seed)
        assert kept(keep_min_p(logits, p)) == min_p_definition(logits.tolist(), p)

    @pytest.mark.parametrize("penalty", [0.8, 1.1, 2.0])
    def test_repetition_penalty(self, seed, penalty):
        logits, ids = random_logits(seed), [3, 3, 10, 59]
        np.testing.assert_allclose(penalize_repetition(logits, ids, penalty), penalty_definition(logits.tolist(), ids, penalty), rtol=1e-6)

    def test_what_stays_is_unchanged_and_the_input_too(self, seed):
        logits = random_logits(seed)
        before = logits.copy()
        for result in (keep_top_k(logits, 5), keep_top_p(logits, 0.7), keep_min_p(logits, 0.1)):
            assert result.dtype == np.float32 and np.array_equal(result[np.isfinite(result)], logits[np.isfinite(result)])
        penalize_repetition(logits, [1, 2], 1.5)
        assert np.array_equal(logits, before)

    def test_order_of_the_rules(self, seed):
        logits, ids = random_logits(seed), [1, 5, 7]
        expected = penalize_repetition(logits, ids, 1.3) / np.float32(1.7)
        expected = keep_min_p(keep_top_p(keep_top_k(expected, 20), 0.8), 0.1)
        found = Sampler(temperature=1.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.3).filter(logits, ids)
        np.testing.assert_array_equal(found, expected)


def test_top_k_keeps_ties():
    assert kept(keep_top_k(np.array([1, 3, 2, 2, 0], np.float32), 2)) == {1, 2, 3}


def test_top_p_of_equal_tokens_takes_as_many_as_it_needs():
    assert len(kept(keep_top_p(np.zeros(10, np.float32), 0.45))) == 5


def test_min_p_of_equal_tokens_keeps_all():
    assert len(kept(keep_min_p(np.zeros(10, np.float32), 1.0))) == 10


def test_excluded_tokens_stay_excluded():
    logits = np.array([0, -INF, 1, -INF, 2], np.float32)
    for result in (keep_top_k(logits, 4), keep_top_p(logits, 0.99), keep_min_p(logits, 0.01), Sampler(top_k=5, top_p=0.999).filter(logits)):
        assert kept(result) == {0, 2, 4}
    choose = Sampler(seed=0).chooser()
    assert {choose(logits) for _ in range(200)} == {0, 2, 4}


def test_large_logits_do_not_overflow():
    logits = np.array([1e4, 1e4 - 1, -1e4], np.float32)
    np.testing.assert_allclose(softmax(logits), softmax(np.array([1.0, 0.0, -20000.0])), atol=1e-12)
    assert kept(keep_top_p(logits, 0.999)) == {0, 1}


@pytest.mark.parametrize("damage", [math.nan, INF])
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.1), dict(repetition_penalty=1.3)], ids=str)
def test_damaged_logits_are_refused(settings, damage):
    logits = random_logits(0)
    logits[3], logits[7] = -INF, damage
    with pytest.raises(GenerationError) as error:
        Sampler(**settings).chooser()(logits, [7])
    assert str(error.value) == "logits should be finite, found NaN or infinity: are the weights damaged?"


@pytest.mark.parametrize("history", [(), [], np.array([], int), np.array([])], ids=repr)
def test_a_penalty_without_a_history_changes_nothing(history):
    logits = random_logits(0)
    assert np.array_equal(penalize_repetition(logits, history, 1.3), logits)
    assert np.array_equal(Sampler(repetition_penalty=1.3, top_k=0).filter(logits, history), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_a_penalty_brings_no_excluded_token_back(penalty):
    logits = random_logits(0)
    logits[[3, 9]] = -INF
    assert kept(penalize_repetition(logits, [3, 4, 3], penalty)) == kept(logits)


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(repetition_penalty=1.3, temperature=5)], ids=str)
def test_a_single_token_left_is_taken(settings):
    logits = np.full(60, -INF, np.float32)
    logits[41] = -30
    assert Sampler(**settings).chooser()(logits, [41, 2]) == 41


def test_no_token_left_is_refused():
    with pytest.raises(GenerationError, match="NaN or infinity"):
        Sampler().filter(np.full(5, -INF, np.float32))


def test_greedy_takes_the_largest_and_knows_the_penalty():
    logits = np.array([1.0, 5.0, 4.0], np.float32)
    assert Sampler(temperature=0).chooser()(logits) == 1
    assert Sampler(temperature=0, repetition_penalty=2).chooser()(logits, [1]) == 2


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.5, top_k=0), dict(temperature=2, top_p=0.8), dict(min_p=0.05)])
def test_draws_are_as_frequent_as_probable(settings):
    logits, n = random_logits(1, 40), 20_000
    sampler = Sampler(**settings, seed=3)
    choose, expected = sampler.chooser(), softmax(sampler.filter(logits))
    counts = np.bincount([choose(logits) for _ in range(n)], minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    assert np.all(np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected * (1 - expected)) + 1e-9)


def test_seeds():
    logits = random_logits(2)
    def draws(seed): return [choose(logits) for choose in [Sampler(seed=seed).chooser()] for _ in range(50)]
    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_a_draw_leaves_the_global_generator_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw(random_logits(0), np.random.default_rng(0))
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("settings", [
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=INF), dict(temperature="warm"), dict(temperature=None), dict(temperature=True),
    dict(top_k=-1), dict(top_k=1.5), dict(top_k=INF), dict(top_p=0), dict(top_p=1.01), dict(top_p=-0.5), dict(top_p=math.nan),
    dict(min_p=-0.1), dict(min_p=1.1), dict(min_p=math.nan), dict(repetition_penalty=0), dict(repetition_penalty=-1), dict(repetition_penalty=INF),
    dict(seed=-1), dict(seed=1.0), dict(seed="one")], ids=str)
def test_bad_arguments_are_refused_in_one_line(settings):
    [(name, value)] = settings.items()
    with pytest.raises(GenerationError) as error:
        Sampler(**settings)
    message = str(error.value)
    assert message.startswith(f"{name} should be ") and message.endswith(f"found {value!r}") and "\n" not in message


def test_numbers_of_numpy_are_numbers():
    Sampler(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.9), seed=np.int32(1)).chooser()(random_logits(0))


@pytest.fixture(scope="module")
def transformers_rules():
    "The processors that transformers' generate would use, in its own order."
    torch = pytest.importorskip("torch", reason="torch is not installed: the extra [parity]")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra [parity]")

    def apply(logits, ids, **settings):
        config = transformers.LlamaConfig(vocab_size=len(logits), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        model = transformers.LlamaForCausalLM(config)
        generation = transformers.GenerationConfig(do_sample=True, bos_token_id=None, eos_token_id=None, **settings)
        rules = model._get_logits_processor(generation, input_ids_seq_length=len(ids), logits_processor=transformers.LogitsProcessorList())
        return rules(torch.tensor([ids]), torch.tensor(logits)[None])[0].numpy()
    return apply


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0.7), dict(top_k=3), dict(top_k=0, top_p=0.9), dict(top_k=0, min_p=0.1), dict(repetition_penalty=1.3),
    dict(temperature=1.5, top_k=30, top_p=0.85, min_p=0.05, repetition_penalty=1.2)], ids=str)
def test_same_as_transformers(transformers_rules, settings):
    for seed in range(3):
        logits, ids = random_logits(seed, 200), [1, 4, 4, 150]
        found, expected = Sampler(**settings).filter(logits, ids), transformers_rules(logits, ids, **{"top_k": 50, **settings})
        assert kept(found) == kept(expected)
        np.testing.assert_allclose(found[np.isfinite(found)], expected[np.isfinite(found)], rtol=1e-6)


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra [parity]")
    theirs, ours = transformers.GenerationConfig._get_default_generation_params(), Sampler()
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == theirs[name]
    assert ours.min_p == 0 and theirs.get("min_p") is None
