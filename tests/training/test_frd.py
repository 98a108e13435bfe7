"""Feature recalibration distillation: the recovering module against loops, the losses against their formulas."""

import pytest
import torch
from torch import nn

import visiontok as vt
from visiontok.models.lvvit import LVViT
from visiontok.training import frd
from visiontok.training.frd import FeatureRecalibration, LayerTokens, ReverseTSM


def randomised(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / 3)
    return module


def tiny():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    return LVViT(p_emb="naive", **sizes).eval()


def two_layers(mlp, row):
    """The MLP of one vector, one unit at a time."""

    def line(layer, values):
        return [sum(w * v for w, v in zip(ws, values)) + b for ws, b in zip(layer.weight, layer.bias)]

    return line(mlp.fc2, [nn.functional.gelu(h) for h in line(mlp.fc1, row)])


@pytest.mark.parametrize(("kept", "full"), [(2, 5), (1, 3), (4, 4), (6, 3)])
def test_recovering_equals_loops(kept, full):
    module = randomised(ReverseTSM(4, kept, full)).double().requires_grad_(False)
    x = torch.randn(2, kept, 4, dtype=torch.float64)
    out = module(x)
    assert out.shape == (2, full, 4)
    for b in range(2):
        normed = torch.stack([module.norm1(token) for token in x[b]])
        columns = [two_layers(module.mlp1, normed[:, c]) for c in range(4)]
        for n in range(full):
            token = torch.stack([column[n] for column in columns])
            want = token + torch.stack(two_layers(module.mlp2, module.norm2(token)))
            torch.testing.assert_close(out[b, n], want, rtol=1e-12, atol=1e-12)


def test_blocks_before_the_first_reduction_have_no_module():
    made = FeatureRecalibration([8, 8, 4, 4, 8], 8, 6)
    assert [type(module).__name__ for module in made.rtsm] == ["Identity"] * 2 + ["ReverseTSM"] * 3
    assert {name.split(".")[1] for name in made.state_dict()} == {"2", "3", "4"}
    assert "rtsm.2.mlp1.fc1.weight" in made.state_dict()
    tokens = [torch.randn(2, n, 6) for n in (8, 8, 4, 4, 8)]
    full = made.recalibrated(tokens)
    assert full[0] is tokens[0]
    assert [tuple(x.shape) for x in full] == [(2, 8, 6)] * 5


def test_losses_follow_their_formulas():
    torch.manual_seed(1)
    student = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    mine, theirs = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    labels = torch.randn(2, 5).softmax(dim=1)
    made = FeatureRecalibration([3, 3], 3, 4, lambda_token=3.0, lambda_logits=0.5, tau=2.0)
    losses = made(student, teacher, mine, theirs, labels)

    squares = [((a - b) ** 2).sum() / a.numel() for a, b in zip(student, teacher)]
    torch.testing.assert_close(losses["loss_token"], 3.0 * (squares[0] + squares[1]) / 2)
    p, q = (theirs / 2).softmax(dim=1), (mine / 2).softmax(dim=1)
    torch.testing.assert_close(losses["loss_logits"], 0.5 * 4 * (p * (p / q).log()).sum() / 2)
    torch.testing.assert_close(losses["loss_cls"], -(labels * mine.softmax(dim=1).log()).sum() / 2)
    total = losses["loss_token"] + losses["loss_logits"] + losses["loss_cls"]
    torch.testing.assert_close(losses["loss"], total)
    losses["loss"].backward()
    assert theirs.grad is None
    assert all(x.grad is None for x in teacher)
    assert mine.grad is not None
    assert all(x.grad is not None for x in student)

    hard = frd.cls_loss(mine, torch.tensor([1, 4]))
    torch.testing.assert_close(hard, -(mine.log_softmax(dim=1)[[0, 1], [1, 4]]).mean())
    assert set(made(student, teacher, mine, theirs)) == {"loss", "loss_token", "loss_logits"}


def test_halves_are_compared_in_single_precision():
    x = torch.full((1, 2, 2), 300.0, dtype=torch.float16)
    assert frd.token_loss([x], [-x]).item() == 360000.0
    assert frd.logits_loss(torch.zeros(1, 3).half(), torch.zeros(1, 3).half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: FeatureRecalibration([], 4, 6), "tokens and full must be token counts"),
        (lambda: FeatureRecalibration([4, 0], 4, 6), r"got \[4, 0\] and 4"),
        (lambda: FeatureRecalibration([4, 2], 4, [6]), r"one entry per block \(2\), got 1"),
        (lambda: FeatureRecalibration([4], 4, 6, tau=0), "tau must be above 0"),
        (lambda: FeatureRecalibration([4, 2], 4, 6).recalibrated([torch.zeros(1, 4, 6)]), r"made for \[4, 2\]"),
        (lambda: frd.token_loss([torch.zeros(1, 4, 6)], [torch.zeros(1, 5, 6)]), r"block 0: .* \(1, 4, 6\), .* \(1, 5"),
        (lambda: frd.token_loss([], []), "got 0 and 0"),
    ],
)
def test_misfits_are_named(call, said):
    with pytest.raises(vt.VisionTokError, match=said):
        call()


def test_tokens_of_both_models_train_student_and_modules():
    student, teacher, image = tiny(), tiny(), torch.randn(2, 3, 32, 32)
    red = vt.patch(student, "sit", keep=0.5)
    made = FeatureRecalibration.for_plan(red.plan, student.embed_dim)
    with LayerTokens(student) as mine, LayerTokens(teacher) as theirs:
        logits = student.train()(image)
        with torch.no_grad():
            aim = teacher(image)
    assert [x.shape[1] for x in mine.tokens] == [8, 4, 2, 2]
    assert [x.shape[1] for x in theirs.tokens] == [16] * 4
    assert not any(block._forward_hooks for block in [*student.blocks, *teacher.blocks])
    made(mine.tokens, theirs.tokens, logits, aim, torch.tensor([0, 3]))["loss"].backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is not None for name, p in student.named_parameters() if "visiontok" in name)
    assert all(p.grad is None for p in teacher.parameters())


def test_tokens_are_those_after_the_reduction_without_the_prefix():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 3}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    vt.patch(model, "tome", r=4)
    with LayerTokens(model) as layers:
        assert layers.tokens == []
        features = model.forward_features(torch.randn(1, 3, 32, 32))
    assert [x.shape[1] for x in layers.tokens] == [12, 8]
    torch.testing.assert_close(model.norm(layers.tokens[1]), features[:, 4:])
