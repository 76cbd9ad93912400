"""Speculative decoding is lossless: with any drafter the text is that of plain decoding, token for token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from scripted_drafts import ScriptedDrafts
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config

from ray_app.core.speculative.decoding import Decoded, FixedGamma, Gamma, Greedy, Proposal, Proposer, Sampled, decode
from ray_app.errors import InputError
from ray_app.language_models.answers import answer
from ray_app.language_models.drafting import EarlyExit, EarlyExitProposer, ModelProposer, require_same_tokens
from ray_app.language_models.kinds import load
from ray_app.language_models.model import LanguageModel

QUESTION = "What is there ?"
VOCABULARY = len(tiny_models.SPECIAL) + len(tiny_models.WORDS)
LENGTH = 24
FRAMES = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)

SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5}
CAUSAL = {
    "llama": LlamaConfig(**{**tiny_models.llama(), "num_hidden_layers": 4}),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": GPTNeoXConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "qwen2": Qwen2Config(
        **SMALL,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    ),
}
KINDS = (*CAUSAL, "video_llava", "llava")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_target(folder / "video_llava")
    tiny_models.save_llava(folder / "llava")
    for name, config in CAUSAL.items():
        tiny_models.save_causal(folder / name, config)
    return {name: load(folder / name, "float32", "cpu") for name in KINDS}


def frames(model: LanguageModel) -> np.ndarray | None:
    return FRAMES if model.sees else None


def decoded(
    model: LanguageModel,
    proposer: Proposer | None,
    gamma: Gamma | int = 4,
    length: int = LENGTH,
    choice: Greedy | Sampled | None = None,
    end_token: int = 2,
) -> Decoded:
    return decode(
        model.context(),
        model.prefix(model.prompt(frames(model), QUESTION)),
        proposer,
        choice=choice or Greedy(),
        gamma=FixedGamma(gamma) if isinstance(gamma, int) else gamma,
        max_new_tokens=length,
        end_token=end_token,
        clock=model.now,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_plain_decoding_is_what_transformers_generates(kind: str, models: dict[str, LanguageModel]) -> None:
    model = models[kind]
    prefix_PD = model.prefix(model.prompt(frames(model), QUESTION))
    made = model.model.generate(
        inputs_embeds=prefix_PD[None], do_sample=False, max_new_tokens=LENGTH, eos_token_id=2, pad_token_id=2
    )
    assert list(decoded(model, None).tokens) == made[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_any_drafts_give_the_text_of_plain_decoding(kind: str, models: dict[str, LanguageModel]) -> None:
    model = models[kind]
    plain = decoded(model, None).tokens
    for seed in range(12):
        rng = np.random.default_rng(seed)
        wrong, gamma = float(rng.choice([0.0, 0.1, 0.5, 1.0])), int(rng.integers(1, 9))
        length = int(rng.integers(1, LENGTH + 1))
        drafts = ScriptedDrafts(plain, VOCABULARY, wrong, rng)
        made = decoded(model, drafts, gamma, length)
        assert made.tokens == plain[:length]
        assert all(each.accepted <= each.drafted <= each.gamma <= gamma for each in made.passes)
        assert sum(each.accepted for each in made.passes) + len(made.passes) in (
            len(made.tokens),
            len(made.tokens) + 1,
        )
        if wrong == 0.0 and gamma > 2 and length == LENGTH:
            assert len(made.passes) < LENGTH


@pytest.mark.parametrize("kind", ["llama", "video_llava"])
def test_an_answer_ends_at_its_end_token_wherever_a_draft_has_it(kind: str, models: dict[str, LanguageModel]) -> None:
    model = models[kind]
    plain = decoded(model, None).tokens
    for end in sorted(set(plain)):
        whole = plain[: plain.index(end) + 1]
        assert decoded(model, None, end_token=end).tokens == whole
        for seed in range(3):
            rng = np.random.default_rng(seed)
            drafts = ScriptedDrafts(plain, VOCABULARY, 0.1 * seed, rng)
            assert decoded(model, drafts, 6, end_token=end).tokens == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_was_cropped_reads_on_as_one_that_never_read_more(
    kind: str, models: dict[str, LanguageModel]
) -> None:
    model = models[kind]
    prefix_PD = model.prefix(model.prompt(frames(model), QUESTION))
    text = torch.randint(5, VOCABULARY, (10,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = model.context()
    whole.prefill(prefix_PD)
    expected_KV = whole.step(text)
    for length in range(11):
        context = model.context()
        context.prefill(prefix_PD)
        context.step([*text[:length], *[7] * 5])
        context.crop(5)
        assert context.length == len(prefix_PD) + length
        for place in range(length, 10):
            torch.testing.assert_close(
                context.step(text[place : place + 1])[0], expected_KV[place], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("kind", ["llama", "video_llava", "gpt2"])
@pytest.mark.parametrize("drafter", ["itself", "another", "early exit"])
def test_models_draft_without_changing_the_text(
    kind: str, drafter: str, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    model = models[kind]
    plain = decoded(model, None).tokens
    prefix_PD = model.prefix(model.prompt(frames(model), QUESTION))
    context = model.context()
    if drafter == "early exit":
        if kind == "gpt2":
            with pytest.raises(InputError, match="does not list its layers; take fewer"):
                EarlyExit(model, 1, range(VOCABULARY))
            return
        early = EarlyExit(model, 1, range(2, VOCABULARY))
        proposer: Proposer = EarlyExitProposer(early, context, prefix_PD, None)
    elif drafter == "itself":
        proposer = ModelProposer(model, lambda: prefix_PD, VOCABULARY, None)
    else:
        other = load(tiny_models.save_drafter(tmp_path / "other"), "float32", "cpu")
        asked_PD = other.prefix(other.prompt(None, QUESTION))
        proposer = ModelProposer(other, lambda: asked_PD, VOCABULARY, None)
    made = decode(
        context,
        prefix_PD,
        proposer,
        choice=Greedy(),
        gamma=FixedGamma(3),
        max_new_tokens=LENGTH,
        end_token=2,
        clock=model.now,
    )
    assert made.tokens == plain
    if drafter == "itself":
        assert all(each.accepted == each.drafted for each in made.passes)


def test_an_early_exit_drafts_what_its_layers_say_from_the_beginning(models: dict[str, LanguageModel]) -> None:
    model = models["llama"]
    ids = list(range(2, VOCABULARY, 2))
    early = EarlyExit(model, 2, ids)
    text = list(decoded(model, None).tokens)
    prefix_PD = model.prefix(model.prompt(None, QUESTION))
    short = load(model.folder, "float32", "cpu")
    short.model.model.layers = short.model.model.layers[:2]
    short.model.config.num_hidden_layers = 2
    for place in (0, 1, 5):
        context = model.context()
        context.prefill(prefix_PD)
        if place > 1:
            context.step(text[: place - 1])
        length = context.length
        drafted = EarlyExitProposer(early, context, prefix_PD, None).propose(text[:place], 3).tokens
        assert context.length == length, "drafting leaves the target's context alone"
        said: list[int] = text[:place]
        for _ in drafted:
            with torch.inference_mode():
                asked_1PD = torch.cat([prefix_PD, model.model.get_input_embeddings()(torch.tensor(said, dtype=int))])
                logits_V = short.model(inputs_embeds=asked_1PD[None], use_cache=False).logits[0, -1]
            said.append(ids[int(logits_V[ids].argmax())])
        assert list(drafted) == said[place:]


class MarkovTarget:
    """Logits that depend on the last token alone."""

    def __init__(self, logits_VV: torch.Tensor) -> None:
        self._logits_VV = logits_VV

    def prefill(self, prefix: int) -> torch.Tensor:
        return self._logits_VV[prefix][None]

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        return self._logits_VV[list(tokens)]

    def crop(self, num_tokens: int) -> None:
        pass


class MarkovDrafts:
    """Drawn from a Markov chain of its own; or its most likely tokens, which were not drawn."""

    def __init__(self, q_VV: np.ndarray, rng: np.random.Generator, drawn: bool) -> None:
        self._q_VV, self._rng, self._drawn = q_VV, rng, drawn

    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        last, tokens, rows = accepted[-1] if accepted else 0, [], []
        for _ in range(num_tokens):
            rows.append(self._q_VV[last])
            last = int(self._rng.choice(len(rows[-1]), p=rows[-1]) if self._drawn else rows[-1].argmax())
            tokens.append(last)
        return Proposal(tuple(tokens), np.stack(rows) if self._drawn else None)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_sampled_texts_have_the_distribution_of_plain_sampling(drawn: bool, temperature: float, top_p: float) -> None:
    """Chi-square over all texts of three tokens; the limit is the 1 % point, by Wilson and Hilferty."""
    size, length, num_texts = 4, 3, 2500
    rng = np.random.default_rng(5)
    logits_VV = torch.from_numpy(rng.normal(0, 1.5, (size, size)))
    sampled = Sampled(temperature, top_p, rng)
    drafts = MarkovDrafts(rng.dirichlet(np.ones(size), size), rng, drawn)
    counts = np.zeros((size,) * length)
    for _ in range(num_texts):
        made = decode(
            MarkovTarget(logits_VV),
            0,
            drafts,
            choice=sampled,
            gamma=FixedGamma(2),
            max_new_tokens=length,
            end_token=-1,
            clock=lambda: 0.0,
        )
        counts[made.tokens] += 1
    p_VV = np.exp(logits_VV.numpy() / temperature)
    p_VV /= p_VV.sum(axis=1, keepdims=True)
    if top_p < 1.0:
        for p_V in p_VV:
            order = np.argsort(-p_V)
            kept = int(np.searchsorted(np.cumsum(p_V[order]), top_p)) + 1
            p_V[order[kept:]] = 0.0
        p_VV /= p_VV.sum(axis=1, keepdims=True)
    expected = num_texts * np.einsum("a,ab,bc->abc", p_VV[0], p_VV, p_VV)
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    rest = (counts[~likely].sum() - expected[~likely].sum()) ** 2 / max(expected[~likely].sum(), 1e-9)
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum() + (
        rest if (~likely & (expected > 0)).any() else 0
    )
    freedom = int(likely.sum()) - 1 + bool((~likely & (expected > 0)).any())
    limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


@pytest.mark.parametrize("drafter", ["another", "early exit"])
def test_models_that_draw_their_drafts_keep_the_target_s_distribution(
    drafter: str, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    """The first two tokens of many sampled answers against the target's own probabilities of the first."""
    model = models["llama"]
    prefix_PD = model.prefix(model.prompt(None, QUESTION))
    other = load(tiny_models.save_drafter(tmp_path / "other"), "float32", "cpu")
    asked_PD = other.prefix(other.prompt(None, QUESTION))
    early = EarlyExit(model, 1, range(2, VOCABULARY))
    sampled = Sampled(2.0, 1.0, np.random.default_rng(1))
    first_V = sampled.probabilities(model.context().prefill(prefix_PD))[0]
    counts = np.zeros(VOCABULARY)
    num_texts = 200
    for _ in range(num_texts):
        context = model.context()
        proposer = (
            EarlyExitProposer(early, context, prefix_PD, sampled)
            if drafter == "early exit"
            else ModelProposer(other, lambda: asked_PD, VOCABULARY, sampled)
        )
        made = decode(
            context,
            prefix_PD,
            proposer,
            choice=sampled,
            gamma=FixedGamma(2),
            max_new_tokens=2,
            end_token=2,
            clock=model.now,
        )
        counts[made.tokens[0]] += 1
    likely = first_V * num_texts >= 5
    seen, expected = (
        np.append(counts[likely], counts[~likely].sum()),
        num_texts * np.append(first_V[likely], first_V[~likely].sum()),
    )
    freedom = len(seen) - 1
    assert freedom > 3
    limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3
    assert ((seen - expected) ** 2 / expected).sum() < limit


def test_a_drafted_token_outside_the_vocabulary_is_an_error(models: dict[str, LanguageModel]) -> None:
    class Foreign:
        def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:  # noqa: ARG002
            return Proposal((VOCABULARY,))

    with pytest.raises(InputError, match=f"gave token {VOCABULARY}, outside the vocabulary of {VOCABULARY} tokens"):
        decoded(models["llama"], Foreign())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (
            MistralConfig(
                **SMALL,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                sliding_window=8,
            ),
            "mistral. keeps sliding windows",
        ),
        (MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, state_size=4), "mamba. keeps recurrent layers"),
    ],
)
def test_a_cache_that_cannot_be_cropped_is_refused_by_name(config: object, kind: str, tmp_path: Path) -> None:
    model = load(tiny_models.save_causal(tmp_path / "model", config), "float32", "cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{tmp_path / 'model'} .{kind} in its cache"):
        model.context()


def test_a_context_that_outgrows_the_model_names_both_numbers(models: dict[str, LanguageModel]) -> None:
    with pytest.raises(InputError, match=r"answer of up to 125 tokens outgrow .*gpt2, which reads 128"):
        answer(models["gpt2"], None, QUESTION, max_new_tokens=125)


def test_tokenizers_that_differ_are_both_named_with_a_token(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    words = [*tiny_models.WORDS[:4], "other", *tiny_models.WORDS[4:]]
    other = load(tiny_models.save_drafter(tmp_path / "other", words=words), "float32", "cpu")
    message = (
        r"other cannot draft for .*llama: their tokenizers differ \(token 'is' is 10 in the one and 9 in the other"
    )
    with pytest.raises(InputError, match=message):
        require_same_tokens(other, models["llama"])
    require_same_tokens(models["gpt2"], models["llama"])


def test_pictures_reach_the_models_that_see(models: dict[str, LanguageModel]) -> None:
    for kind in ("video_llava", "llava"):
        model = models[kind]
        seen = [answer(model, pixels, QUESTION, max_new_tokens=8).tokens for pixels in (FRAMES, 255 - FRAMES, None)]
        assert len({tuple(tokens) for tokens in seen}) == 3
