"""The API of tokenizers on the shipped ones: lengths, batches, options, savings against the plain path, compilers."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import FormatError, ParameterError, UnknownNameError
from visiontok.tokenizers import loading, quality
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.checkpoint import save_weights
from visiontok.tokenizers.contribution import contribution_maps
from visiontok.tokenizers.flow import Guidance, sample, time_grid
from visiontok.tokenizers.retrieval import TokenIndex
from visiontok.tokenizers.sampling import load_sampler
from visiontok.tokenizers.statistics import token_statistics
from visiontok.training.sampler import fit_sampler, save_sampler

pytest.importorskip("sklearn")

NAMES = ("tiny_one_d_piece", "tiny_flextok")
QUICK = {"tiny_one_d_piece": {}, "tiny_flextok": {"steps": 3, "guidance": 2.0}}


@pytest.fixture(scope="module")
def models() -> dict[str, Tokenizer]:
    return {name: vt.tokenizers.load(name) for name in NAMES}


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from visiontok.training.tokenizer_loop import DigitImages

    data = DigitImages(32, "test")
    return torch.stack([data[index] for index in range(100)])


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_batch_or_length(models, digits: Tensor, name: str) -> None:
    model, images, options = models[name], digits[:6], QUICK[name]
    ids = model.encode(images)
    assert ids.dtype == torch.int64
    assert torch.equal(model.encode(images[3]), ids[3:4])
    lengths = [1, 16, 5, 8, 2, 16]
    rows = model.encode(images, lengths)
    assert [row.tolist() for row in rows] == [row[:k].tolist() for row, k in zip(ids, lengths)]
    together = model.decode(rows, **options)
    for row, image in zip(rows, together):
        torch.testing.assert_close(model.decode(row, **options)[0], image, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(rows, bucket=True, **options), together, atol=1e-4, rtol=0)
    assert torch.equal(model.reconstruct(images, lengths, **options), together)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_goes_on_where_it_stopped(models, digits: Tensor, name: str) -> None:
    started = models[name].progressive(digits[:4])
    expected = models[name].encode(digits[:4])
    for tokens in (2, 1, 7, 16):
        assert torch.equal(started.extend(tokens), expected[:, :tokens])


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_weights_get_better_with_every_doubling(models, digits: Tensor, name: str) -> None:
    from visiontok.models.tiny import digits_split, tiny_vit

    model, vit, labels = models[name], tiny_vit().eval(), digits_split().test_labels[:100]
    ids, lengths = model.encode(digits), (1, 2, 4, 8, 16)
    options = {} if name == "tiny_one_d_piece" else {"steps": 5, "guidance": 3.0}
    curve, right = [], []
    for k in lengths:
        images = model.decode(ids[:, :k], **options)
        curve.append(float(quality.psnr(images, digits).mean()))
        with torch.no_grad():
            right.append(float((vit(images * 2 - 1).argmax(1) == labels).float().mean()))
    assert all(after > before + 0.1 for before, after in itertools.pairwise(curve)), curve
    assert right[-1] > 0.8 > right[0]
    assert loading.tiny_path(name).stat().st_size < 2 << 20


def test_merged_registers_equal_the_whole_sequence(models, digits: Tensor) -> None:
    """The sampler that merges dropped and null registers, against the network as it is trained."""
    flextok = models["tiny_flextok"]
    ids = flextok.encode(digits[:3])
    keep = torch.tensor([1, 7, 16])
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = flextok.code_vectors(ids)

    @torch.no_grad()
    def plain(x: Tensor, t: float, conditional: bool) -> Tensor:
        drop = torch.full((3,), not conditional)
        return flextok.velocity(x, torch.full((3,), t), codes, keep, drop)

    expected = flextok.from_latents(sample(plain, noise, time_grid(4), Guidance(3.0)))
    rows = [row[:k] for row, k in zip(ids, keep.tolist())]
    found = flextok.decode(rows, steps=4, guidance=3.0, noise=noise, clamp=False)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_options_of_the_flow_act(models, digits: Tensor) -> None:
    flextok = models["tiny_flextok"]
    ids = flextok.encode(digits[:2])
    seen: list[int] = []
    images = flextok.decode(ids, steps=3, preview=lambda step, image: seen.append(step))
    assert seen == [0, 1, 2]
    assert torch.equal(images, flextok.decode(ids, steps=3))
    changed = {"seed": 1, "guidance": 1.0, "norm_guidance": False, "solver": "heun", "shift": 3.0, "interval": (0.5, 1)}
    for option, value in changed.items():
        assert not torch.equal(images, flextok.decode(ids, steps=3, **{option: value})), option
    seeds = flextok.decode(ids, steps=3, seed=[5, 0])
    torch.testing.assert_close(seeds[1], images[1], atol=1e-5, rtol=0)
    assert not torch.equal(seeds[0], images[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_decoder_gives_the_same(models, digits: Tensor, name: str) -> None:
    model = copy.deepcopy(models[name])
    ids = model.encode(digits[:2], 5)
    expected = model.decode(ids, bucket=True, **QUICK[name])
    model.decoder = torch.compile(model.decoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model.decode(ids, bucket=True, **QUICK[name]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_the_same_tokenizer(models, digits: Tensor, name: str, tmp_path) -> None:
    model = models[name]
    expected = model.encode(digits[:2])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.encode(digits[:2]), expected)
    save_weights(model, tmp_path / "model.safetensors")
    again = loading.load(model.name, tmp_path)
    assert again.model_id == model.model_id
    assert torch.equal(again.encode(digits[:2]), expected)
    state = dict(model.state_dict())
    state["extra"] = state.pop(next(iter(state)))
    with pytest.raises(FormatError, match="extra"):
        loading.load(model.name, state, config=model.config)


def test_mistakes_are_named(models, digits: Tensor) -> None:
    model = models["tiny_one_d_piece"]
    ids = model.encode(digits[:2])
    for bad, match in (
        (digits[:1] * 255, r"\[0, 1\], got"),
        (digits[:1, :, :16], r"\(B, 3, 32, 32\)"),
        ((digits[:1] * 255).byte(), "float tensor"),
    ):
        with pytest.raises(ParameterError, match=match):
            model.encode(bad)
    for tokens in (0, 17, [1], True):
        with pytest.raises(ParameterError, match="tokens must be"):
            model.encode(digits[:2], tokens)
    for bad_ids, match in ((ids + 256, "another tokenizer"), (ids.float(), "integers"), (ids[None], "got a tensor")):
        with pytest.raises(ParameterError, match=match):
            model.decode(bad_ids)
    with pytest.raises(UnknownNameError, match="steps"):
        model.decode(ids, steps=3)
    with pytest.raises(UnknownNameError, match="tiny_flextok"):
        vt.tokenizers.load("tiny_flextik")
    with pytest.raises(ParameterError, match="shipped"):
        vt.tokenizers.load("one_d_piece")
    assert {"flextok", "one_d_piece", "titok", *NAMES} <= set(vt.tokenizers.list_tokenizers())


def test_psnr_and_ssim_follow_their_definitions() -> None:
    random = np.random.default_rng(0)
    x, y = (torch.tensor(random.random((2, 1, 13, 14))) for _ in range(2))
    error = ((x - y) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(quality.psnr(x, y), 10 * np.log10(1 / error.numpy()), rtol=1e-5)
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / np.outer(taps, taps).sum()
    total = []
    for top, left in itertools.product(range(3), range(4)):
        a, b = (image[0, 0, top : top + 11, left : left + 11].numpy() for image in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        both = (window * (a - mean_a) * (b - mean_b)).sum()
        value = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
        total.append(value / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert float(quality.ssim(x, y)[0]) == pytest.approx(np.mean(total), rel=1e-5)
    assert float(quality.ssim(x, x).min()) == pytest.approx(1)
    with pytest.raises(ParameterError, match="alike"):
        quality.psnr(x, y[:1])


def test_the_shortest_length_is_that_of_the_whole_table(models, digits: Tensor) -> None:
    model, images = models["tiny_one_d_piece"], digits[:12]
    table = quality.rate_quality(model, images, batch_size=7)
    grid = quality.default_lengths(model)
    assert grid == (1, 2, 4, 8, 16)
    lengths, values = quality.shortest(model, images, 19.0)
    for row, length, value in zip(table, lengths, values):
        good = [k for k, found in zip(grid, row) if found >= 19.0]
        assert length == (good[0] if good else grid[int(row.argmax())])
        assert float(value) == pytest.approx(float(row[grid.index(length)]), abs=1e-4)
    assert len(set(lengths)) > 1
    one = quality.psnr(model.decode(model.encode(images[:1], 4)), images[:1])
    assert float(table[0, 2]) == pytest.approx(float(one), abs=1e-3)


def test_a_budget_is_shared_out_as_well_as_possible() -> None:
    random = np.random.default_rng(1)
    lengths = (1, 2, 3, 4)
    for _ in range(20):
        # Convex curves: falling ever more slowly.
        drops = -np.sort(-random.random((3, 3)), axis=1)
        errors = 5 - np.concatenate([np.zeros((3, 1)), drops.cumsum(1)], axis=1)
        for budget in range(3, 13):
            chosen = quality.allocate(errors, lengths, budget)
            assert chosen.sum() <= budget
            best = min(
                sum(errors[i, k - 1] for i, k in enumerate(pick))
                for pick in itertools.product(lengths, repeat=3)
                if sum(pick) <= budget
            )
            assert errors[np.arange(3), chosen - 1].sum() == pytest.approx(best)
    # A length that does not pay is stepped over.
    assert quality.allocate([[3.0, 4.0, 1.0]], (1, 2, 4), 2).tolist() == [1]
    assert quality.allocate([[3.0, 4.0, 1.0]], (1, 2, 4), 4).tolist() == [4]
    with pytest.raises(ParameterError, match="at least 2 tokens"):
        quality.allocate([[1.0], [1.0]], (1,), 1)


def test_statistics_of_tokens() -> None:
    ids = torch.tensor([[0, 1, 5], [0, 2, 5], [0, 3, 5], [0, 4, 5]])
    found = token_statistics(ids, 8)
    assert found.entropy.tolist() == [0, 2, 0]
    assert (found.images, found.tokens, found.used, found.usage) == (4, 12, 6, 0.75)
    assert found.bits_per_image == 2
    assert found.packed_bits_per_image == 9
    share = np.array([4, 4, 1, 1, 1, 1]) / 12
    assert found.perplexity == pytest.approx(2 ** -(share * np.log2(share)).sum())
    ragged = token_statistics([torch.tensor([1, 2]), torch.tensor([3])], 8)
    assert ragged.counts.tolist() == [2, 1]
    with pytest.raises(ParameterError, match="at least one"):
        token_statistics([], 8)


def test_contribution_maps_show_what_a_token_changes(models, digits: Tensor) -> None:
    model = models["tiny_one_d_piece"]
    ids = model.encode(digits[:1])[0]
    maps = contribution_maps(model, ids, draws=2, seed=3)
    assert maps.shape == (16, 32, 32)
    assert (maps.sum((1, 2)) > 0).all()
    assert torch.equal(maps, contribution_maps(model, ids, draws=2, seed=3, batch_size=5)) or torch.allclose(
        maps, contribution_maps(model, ids, draws=2, seed=3, batch_size=5), atol=1e-5
    )
    step = torch.randint(1, 256, (16, 2), generator=torch.Generator().manual_seed(3))
    changed = [ids.clone(), ids.clone()]
    for draw, row in enumerate(changed):
        row[4] = (row[4] + step[4, draw]) % 256
    by_hand = (model.decode(torch.stack(changed)) - model.decode(ids)).abs().mean((0, 1))
    torch.testing.assert_close(maps[4], by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("by", ["codes", "match"])
@pytest.mark.parametrize("name", NAMES)
def test_retrieval_finds_images_themselves_and_their_kind(models, digits: Tensor, name: str, by: str) -> None:
    from visiontok.models.tiny import digits_split

    model, labels = models[name], digits_split().test_labels[:100]
    ids = model.encode(digits)
    index = TokenIndex(model, ids)
    rows, scores = index.nearest(ids, 2, by)
    assert (scores[:, 0] > 0.999).all()
    if name == "tiny_one_d_piece":
        assert float((labels[rows[:, 1]] == labels).float().mean()) > 0.4
    short, _ = index.nearest(ids[:, :4], 1, by)
    assert short.shape == (100, 1)
    with pytest.raises(ParameterError, match="'codes' or 'match'"):
        index.nearest(ids, 101)


def test_the_sampler_draws_the_class_that_was_asked_for(models) -> None:
    from visiontok.models.tiny import tiny_vit

    sampler, model = load_sampler(), models["tiny_one_d_piece"]
    assert sampler.config["model_id"] == model.model_id
    labels = torch.arange(10).repeat(8)
    ids = sampler.sample(labels, guidance=1.5, seed=1)
    assert torch.equal(ids, sampler.sample(labels, guidance=1.5, seed=1))
    with torch.no_grad():
        seen = tiny_vit().eval()(model.decode(ids) * 2 - 1).argmax(1)
    assert float((seen == labels).float().mean()) > 0.6
    # With the cache the logits are those of the whole row.
    greedy = sampler.sample(labels[:3], temperature=0)
    with torch.no_grad():
        assert torch.equal(sampler(greedy, labels[:3]).argmax(-1), greedy)
    with pytest.raises(ParameterError, match="labels must be"):
        sampler.sample(torch.tensor([11]))


def test_a_sampler_learns_and_is_stored(models, tmp_path) -> None:
    labels = torch.arange(4).repeat(32)
    ids = torch.stack([labels * 10 + place for place in range(5)], 1)
    losses: list[float] = []
    model = fit_sampler(
        models["tiny_one_d_piece"], ids, labels, width=32, updates=200, batch_size=32, lr=1e-2,
        on_update=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.5 < losses[0]
    save_sampler(model, tmp_path / "s.safetensors", torch.float32)
    again = load_sampler(tmp_path / "s.safetensors")
    assert torch.equal(again.sample(labels[:4]), model.sample(labels[:4]))
    with pytest.raises(FormatError, match="no sampler"):
        load_sampler(loading.tiny_path("tiny_flextok"))
