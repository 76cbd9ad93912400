"""Strategies other than the reference's: what they compute and where they start."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_adapters import PAIRS, VAL, in_batches, perturbed, small_adapter, small_pairs, small_start

from ray_app.core.adapters.base import NoisyDropout
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.initialization import GRID, compute_stats
from ray_app.core.adapters.registry import STRATEGIES, build_adapter, meta_adapter, num_parameters
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.augmentation import Augmentation
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.metrics import cos_sim
from ray_app.core.optimizer_step import CosineByEpoch, make_optimizer
from ray_app.errors import ConfigError
from ray_app.store.checkpoint import load_checkpoint, replay_golden, save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec

IMAGE = (3, 16, 16)
WIDTH = 768


def conv_config(**changes: object) -> AdapterConfig:
    small = AdapterConfig("conv", WIDTH, WIDTH, 8, event_shape=IMAGE, target_shape=IMAGE, depth=2, patch=4)
    return replace(small, **changes)


@pytest.mark.parametrize("size", [3, 24])
def test_subspaces_are_those_of_a_singular_value_decomposition_however_the_pairs_are_divided(size: int) -> None:
    event, target = small_pairs()
    start = compute_stats(in_batches(event, target, size), "subspaces", 4, PAIRS, seed=0)
    for side, x in (("event", event), ("target", target)):
        x = x.double().numpy()
        _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
        basis, scale = start[f"{side}_basis"].double().numpy(), start[f"{side}_scale"].numpy()
        np.testing.assert_allclose(np.abs(np.sum(basis * vt[:4].T, axis=0)), 1.0, atol=1e-4)
        np.testing.assert_allclose(scale, s[:4] / PAIRS**0.5, rtol=1e-4)
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(start[f"{side}_mean"].numpy(), x.mean(0), rtol=1e-5)
        assert (basis.max(axis=0) >= -basis.min(axis=0)).all(), "the largest component is positive"


def test_what_cannot_give_a_start_is_refused() -> None:
    event, target = small_pairs()
    with pytest.raises(ConfigError, match=r"--rank \(24\) is not below the number of training pairs \(24\)"):
        compute_stats(in_batches(event, target), "subspaces", 24, PAIRS, seed=0)
    constant = event.clone()
    constant[:, 3:] = 0.5
    with pytest.raises(ConfigError, match=r"event features of the training part vary in 3 directions only.*--rank 3"):
        compute_stats(in_batches(constant, target), "subspaces", 4, PAIRS, seed=0)
    with pytest.raises(ConfigError, match="nothing to learn"):
        compute_stats(in_batches(torch.full_like(event, 0.5), target), "subspaces", 4, PAIRS, seed=0)
    with pytest.raises(ConfigError, match="mean training target is zero"):
        compute_stats(in_batches(event, torch.zeros_like(target)), "means", 4, PAIRS, seed=0)
    with pytest.raises(ConfigError, match=r"--rank \(64\) is above the width"):
        meta_adapter(AdapterConfig("lowrank", 48, 48))


def test_ridge_is_the_closed_form_with_the_best_of_its_grid() -> None:
    event, target = small_pairs()
    found = small_adapter("ridge").eval()(event[-VAL:]).double()
    x, y, v, w = (part.double().numpy() for part in (event[:-VAL], target[:-VAL], event[-VAL:], target[-VAL:]))
    kernel = (x - x.mean(0)) @ (x - x.mean(0)).T
    cosines = []
    for relative in GRID:
        inverse = np.linalg.inv(kernel + relative * kernel.trace() / len(x) * np.eye(len(x)))
        aligned = y.mean(0) + (v - x.mean(0)) @ (x - x.mean(0)).T @ inverse @ (y - y.mean(0))
        cosines.append(
            (np.mean(np.sum(aligned * w, 1) / np.linalg.norm(aligned, axis=1) / np.linalg.norm(w, axis=1)), aligned)
        )
    best = max(cosines, key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(found.numpy(), best, atol=1e-4)


def test_a_solved_adapter_keeps_its_pairs_as_stored_and_answers_its_golden_inputs(tmp_path: Path) -> None:
    adapter = small_adapter("ridge")
    adapter.event_pairs = (adapter.event_pairs * 100).round().clamp(0, 255).to(torch.uint8)
    adapter.event_unit = torch.tensor([0.01])
    side = FeatureSpec(dtype="uint8", shape=(48,), scale=1 / 255)
    features = Features(event=side, target=side)
    save_checkpoint(tmp_path / "c", adapter, metrics={}, provenance={}, features=features)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.adapter.event_pairs.dtype == torch.uint8
    replay_golden(loaded)


@pytest.mark.parametrize("strategy", ["conv", "lowrank"])
def test_training_begins_at_the_mean_target_exactly(strategy: str) -> None:
    event, target = small_pairs()
    adapter = small_adapter(strategy).eval()
    torch.testing.assert_close(adapter(event), target[:-VAL].mean(0).expand_as(target), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["lightweight", "lightweight_reference", "bottleneck"])
def test_a_pca_start_is_near_the_mean_target_and_reads_the_subspace(strategy: str) -> None:
    event, target = small_pairs()
    adapter = small_adapter(strategy, pca=True).eval()
    residual = {"lightweight": 1.0, "lightweight_reference": 0.1}.get(strategy, 0.0)
    expected = target[:-VAL].mean(0) + residual * (event - event[:-VAL].mean(0))
    assert float((adapter(event) - expected).detach().abs().max()) < 0.02
    start = small_start(strategy, event, target, 5)
    weights = adapter.state_dict()
    read = event @ weights["input.weight"][:5].T + weights["input.bias"][:5]
    torch.testing.assert_close(read[:-VAL].std(dim=0, correction=0), torch.ones(5), atol=1e-3, rtol=1e-3)
    columns = weights["output.weight"][:, :5]
    directions = columns / columns.norm(dim=0)
    torch.testing.assert_close(directions, start["target_basis"], atol=1e-5, rtol=1e-4)


def test_every_strategy_of_full_width_layers_has_a_pca_start() -> None:
    with_pca = {name for name, kind in STRATEGIES.items() if kind.PCA_REQUIRES == "subspaces"}
    assert with_pca == {"lightweight", "lightweight_reference", "bottleneck", "linear"}


def test_a_linear_map_with_a_pca_start_says_a_thousandth_of_the_mean_target_s_directions() -> None:
    """Of events as many standard deviations off their mean, targets are a thousandth of as many off theirs."""
    event, target = small_pairs()
    adapter = small_adapter("linear", pca=True).eval()
    x, y = event[:-VAL].double().numpy(), target[:-VAL].double().numpy()
    (u, _, _), (_, s, vt) = (np.linalg.svd(side - side.mean(0), full_matrices=False) for side in (x, y))
    along = (adapter(event[:-VAL]).detach().double().numpy() - y.mean(0)) @ vt.T
    spread = s[:5] / len(x) ** 0.5
    np.testing.assert_allclose(np.abs(along[:, :5] / spread), 1e-3 * np.abs(u[:, :5]) * len(x) ** 0.5, atol=1e-5)
    np.testing.assert_allclose(along[:, 5:], 0.0, atol=1e-5)


def test_conv_is_small_and_takes_the_sides_of_its_images_from_the_features() -> None:
    shape = (3, 224, 224)
    with torch.device("meta"):
        whole = STRATEGIES["conv"](
            AdapterConfig("conv", 150_528, 150_528, 64, event_shape=shape, target_shape=shape, depth=3)
        )
    assert num_parameters(whole) == 184_320
    oblong = conv_config(
        event_dim=3 * 16 * 24, event_shape=(3, 16, 24), target_dim=3 * 8 * 12, target_shape=(3, 8, 12)
    )
    assert build_adapter(oblong, 0)(torch.rand(2, 3 * 16 * 24)).shape == (2, 3 * 8 * 12)
    assert build_adapter(conv_config(), 0)(torch.rand(0, WIDTH)).shape == (0, WIDTH)


def test_a_changed_patch_of_events_moves_the_whole_answer_through_the_context() -> None:
    adapter = perturbed(build_adapter(conv_config(depth=1), 0)).eval()
    blank = torch.ones(1, 3, 64, 64)
    config = replace(
        adapter.config, event_shape=(3, 64, 64), target_shape=(3, 64, 64), event_dim=12288, target_dim=12288
    )
    adapter = perturbed(build_adapter(config, 0)).eval()
    one = blank.clone()
    one[..., :4, :4] = 0
    moved = (adapter(one.flatten(1)) - adapter(blank.flatten(1))).detach().view(3, 64, 64).abs().amax(dim=0)
    assert float(moved[-4:, -4:].max()) > 1e-6, "far outside of the kernel"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"event_shape": (768,)}, r"conv works on images .* the event feature has shape \[768\]"),
        ({"target_shape": (48, 16)}, r"conv works on images .* the target feature has shape \[48, 16\]"),
        ({"patch": 5}, r"--patch \(5\) must divide .* try 2, 4, 8, 16"),
    ],
)
def test_features_that_conv_cannot_take_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        meta_adapter(conv_config(**changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_untrained_adapter_is_no_nearer_to_its_target_than_its_event_by_more_than_chance(strategy: str) -> None:
    """Unseen pairs, their targets drawn apart from everything, and as the training pairs have them.

    Of the second kind no adapter may be above `before` that does not begin at the mean training target. Those that do
    begin there say the same for every pair, and so see none's target: they may be as near as that baseline. `ridge`
    is solved and never untrained: of true pairs it knows what the training part taught it.
    """
    event, true = small_pairs(pairs=400, seed=1)
    apart = torch.randn(400, 48, generator=torch.Generator().manual_seed(2))
    aligned = small_adapter(strategy).eval()(event).detach()
    assert not surely_nearer(aligned, event, apart)
    if strategy == "ridge":
        return
    mean = small_pairs()[1][:-VAL].mean(0).expand_as(true)
    assert surely_nearer(mean, event, true), "so that it makes a difference which of the two is the bound"
    at_the_mean = {"conv", "lowrank"}
    assert not surely_nearer(aligned, mean if strategy in at_the_mean else event, true)


def surely_nearer(one: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether its mean cosine is above the other's by more than four standard errors."""
    ahead = (cos_sim(one, target) - cos_sim(other, target)).double()
    return bool(ahead.mean() > 4 * ahead.std() / len(ahead) ** 0.5 + 1e-6)


def images(pairs: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Event images of red and blue on white with a target that has the same marks, so that moves can be compared."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(pairs, 1, 16, 16, generator=generator) < 0.3
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    return torch.where(marks, red, 1.0).flatten(1), marks.expand(-1, 3, -1, -1).float().flatten(1)


@pytest.mark.parametrize("kind", ["flip", "shift"])
def test_both_images_of_a_pair_move_together(kind: str) -> None:
    event, target = images()
    change = Augmentation(IMAGE, IMAGE, **{kind: 0.5 if kind == "flip" else 0.3})
    moved_event, moved_target = change(event, target, BatchNoise(0, 0, 0, 6, 6))
    assert not torch.equal(moved_event, event)
    marks = moved_event.view(6, *IMAGE)[:, 1] == 0
    assert torch.equal(marks, moved_target.view(6, *IMAGE)[:, 0] == 1)


def test_events_come_and_go_and_targets_stay() -> None:
    event, target = images()
    change = Augmentation(IMAGE, IMAGE, event_dropout=0.8, event_noise=0.5)
    changed, same = change(event, target, BatchNoise(0, 1, 0, 6, 6))
    assert torch.equal(same, target)
    pixels = changed.view(6, 3, -1).transpose(1, 2).reshape(-1, 3)
    kinds = {tuple(pixel) for pixel in pixels.tolist()}
    assert kinds == {(1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)}


def test_augmentation_is_the_same_however_a_batch_is_divided_and_leaves_its_input_alone() -> None:
    event, target = images()
    change = Augmentation(IMAGE, IMAGE, flip=0.5, shift=0.2, event_dropout=0.5, event_noise=0.2)
    kept = event.clone(), target.clone()
    whole = change(event, target, BatchNoise(3, 4, 0, 6, 6))
    parts = [change(event[a:b], target[a:b], BatchNoise(3, 4, a, b - a, 6)) for a, b in ((0, 2), (2, 6), (6, 6))]
    for side in (0, 1):
        assert torch.equal(whole[side], torch.cat([part[side] for part in parts]))
        assert torch.equal((event, target)[side], kept[side])


def test_validation_pairs_are_not_changed() -> None:
    event, target = images()
    adapter = build_adapter(conv_config(), 0)
    objective = AlignmentObjective(adapter, LossWeights(), Augmentation(IMAGE, IMAGE, flip=1.0))
    perturbed(adapter)
    plain = AlignmentObjective(adapter, LossWeights()).eval()(event, target)["loss"]
    assert torch.equal(objective.eval()(event, target)["loss"], plain)
    assert not torch.equal(objective.train()(event, target, BatchNoise(0, 0, 0, 6, 6))["loss"], plain)


def test_augmentation_of_vectors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the target feature has shape \[768\]"):
        Augmentation(IMAGE, (768,), flip=0.5)


def test_the_learning_rate_falls_along_half_a_cosine() -> None:
    optimizer = make_optimizer(build_adapter(conv_config(), 0), 0.2, 0.0)
    schedule = CosineByEpoch(optimizer, 0.2, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(0.0)
    np.testing.assert_allclose(rates, [0.2, 0.1 + 0.1 / 2**0.5, 0.1, 0.1 - 0.1 / 2**0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_names_the_settings_that_change_it(strategy: str) -> None:
    tokens = strategy.startswith("token")
    shape = (4, 192) if tokens else IMAGE
    small = AdapterConfig(strategy, WIDTH, WIDTH, 8, 0.0, shape, shape, depth=1, patch=8, rank=4)

    def built(config: AdapterConfig) -> list[object]:
        with torch.device("meta"):
            adapter = STRATEGIES[strategy](config)
        shapes = [(name, tuple(value.shape)) for name, value in adapter.state_dict().items()]
        return [*shapes, *(each.probability for each in adapter.modules() if isinstance(each, NoisyDropout))]

    changes = {"hidden_dim": 16, "depth": 2, "patch": 4, "rank": 5, "dropout": 0.5}
    used = {name for name, value in changes.items() if built(replace(small, **{name: value})) != built(small)}
    assert used - ({"rank"} if strategy == "ridge" else set()) == STRATEGIES[strategy].SETTINGS


@pytest.mark.parametrize("strategy", ["lightweight", "lightweight_reference", "bottleneck"])
def test_a_deeper_adapter_has_that_many_hidden_layers_more(strategy: str) -> None:
    shallow = small_adapter(strategy)
    deep = build_adapter(replace(shallow.config, depth=3), 0)
    hidden = shallow.config.hidden_dim
    assert num_parameters(deep) - num_parameters(shallow) == 2 * (hidden * hidden + 3 * hidden)
    assert not any(name.startswith("deeper") for name in shallow.state_dict())
    event, target = small_pairs()
    deep.initialize_from(small_start(strategy, event, target, 5), pca=True)
    deep = perturbed(deep).eval()
    answers = deep(event)
    weights = {name: value for name, value in deep.state_dict().items() if name.startswith("deeper")}
    found = deep.deeper(torch.ones(1, hidden))
    activation = (
        torch.relu if strategy.startswith("lightweight") and "ref" not in strategy else torch.nn.functional.gelu
    )
    by_hand = torch.ones(1, hidden)
    for n in range(2):
        x = by_hand @ weights[f"deeper.{n}.linear.weight"].T + weights[f"deeper.{n}.linear.bias"]
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        by_hand = activation(x * weights[f"deeper.{n}.norm.weight"] + weights[f"deeper.{n}.norm.bias"])
    torch.testing.assert_close(found, by_hand)
    with torch.no_grad():
        deep.deeper[1].linear.weight.zero_()
    assert not deep(event).allclose(answers), "its answers go through them"


def test_conv_reads_a_white_patch_as_zero() -> None:
    """No events are no input: white patches give the bias alone, whatever the weights."""
    adapter = perturbed(build_adapter(conv_config(), 0)).eval()
    event = torch.ones(1, *IMAGE)
    event[..., :8, :8] = 0.25
    patches = adapter.patches(event.flatten(1))
    assert float(patches.flatten(1, 2)[0].abs().sum(dim=1).ne(0).sum()) == 64 / adapter.config.patch**2
    assert torch.equal(patches.unique(), torch.tensor([0.0, 0.75]))


def test_lowrank_reads_whitened_coordinates_and_answers_in_the_targets_units() -> None:
    """By hand: h = W (Bᵀ(x − m) / s), aligned = mean + C · t · out, with scales that are far from one."""
    event, _ = small_pairs()
    adapter = perturbed(small_adapter("lowrank")).eval()
    stats = {name: getattr(adapter, name) for name in ("event_basis", "event_mean", "event_scale")}
    seen = {}
    adapter.input.register_forward_hook(lambda _, args, __: seen.update(coordinates=args[0]))
    adapter.output.register_forward_hook(lambda _, __, out: seen.update(out=out))
    aligned = adapter(event).detach()
    whitened = (event - stats["event_mean"]) @ stats["event_basis"] / stats["event_scale"]
    torch.testing.assert_close(seen["coordinates"], whitened, atol=1e-4, rtol=1e-4)
    training = whitened[:-VAL]
    np.testing.assert_allclose(training.std(dim=0, correction=0), 1.0, atol=0.05)
    assert float((stats["event_scale"] - 1).abs().min()) > 0.05
    expected = adapter.target_mean + (seen["out"] * adapter.target_scale) @ adapter.target_basis.T
    torch.testing.assert_close(aligned, expected.detach())


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_schedule_that_resumes_gives_the_rates_of_one_that_never_stopped(finished: int) -> None:
    def rates(schedule: CosineByEpoch, epochs: int) -> list[float]:
        seen = []
        for _ in range(epochs):
            schedule.step(0.0)
            seen.append(schedule.optimizer.param_groups[0]["lr"])
        return seen

    def new() -> CosineByEpoch:
        return CosineByEpoch(make_optimizer(build_adapter(conv_config(), 0), 0.2, 0.0), 0.2, 5)

    whole, first, second = new(), new(), new()
    expected = rates(whole, 5)
    before = rates(first, finished)
    second.load_state_dict(first.state_dict())
    assert before + rates(second, 5 - finished) == expected
    assert len(set(expected)) == 5
