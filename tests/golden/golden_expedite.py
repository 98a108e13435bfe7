"""Runs Expedite's golden files through the public API; steps and names as in the method's golden README."""

from __future__ import annotations

import functools
from typing import Any

import torch
from golden_case import Case
from golden_models import build
from torch import Tensor, nn

import visiontok as vt
from visiontok.backbones.hf_sam import partition, segment_anything_keys
from visiontok.backbones.torchvision_vit import swag_keys
from visiontok.ops import clustering


def run_op(case: Case) -> None:
    """op_cluster_*, op_recon_*, op_roundtrip*: through the ops, and through the reducer's map where it can be."""
    if case.given("feat_before") is not None:
        reconstruct(case)
    elif case.weights():
        roundtrip(case)
    else:
        check_map(case, case.need("x"), clusters(case, case.need("x")))


def name_of(params: dict[str, Any], *names: str) -> Any:
    """The first of several names that the parameters have."""
    return next(params[name] for name in names if name in params)


def clusters(case: Case, x: Tensor) -> clustering.Clusters:
    params = case.params
    grid, cells, rows = (x.shape[2], x.shape[3]), (params["h"], params["w"]), x.flatten(2).transpose(1, 2)
    window, iters = name_of(params, "window_size", "window"), name_of(params, "n_iters", "iters")
    made = clustering.cluster(rows, grid, cells, iters, params["temperature"], window, official=True)
    for name, got in (
        ("init_centroids", clustering.pooled(rows, grid, cells).transpose(1, 2)),
        ("init_label", clustering.home(grid, cells).expand(len(rows), -1)),
        ("clusters", made.centroids),
        ("hard_labels", clustering.hard_labels(rows, made.centroids)),
    ):
        if case.has(name):
            case.check(name, got)
    return made


def check_map(case: Case, x: Tensor, made: clustering.Clusters) -> None:
    """The reducer's map of the same tokens behind a class token gives the same clusters."""
    params, rows = case.params, x.flatten(2).transpose(1, 2)
    tokens = torch.cat((rows[:, :1], rows), dim=1)
    grid, cells = (x.shape[2], x.shape[3]), (params["h"], params["w"])
    if cells == grid:
        return
    options = {"iters": params["n_iters"], "temperature": params["temperature"], "window": params["window_size"]}
    reducer = vt.reducers.create("expedite", clusters=cells, compat="official", **options)
    state = vt.TokenState.initial(tokens, prefix=1, grid=grid, layer=1, depth=2)
    asked = rows.shape[1] - cells[0] * cells[1]
    tm = reducer.decide(vt.Signals.of(HIDDEN=tokens, GRID=grid), state, budget=asked)
    assert tm is not None
    assert tm.grid == cells
    reduced, _ = vt.apply(tm, tokens, state)
    case.check("clusters", reduced[:, 1:])
    assert torch.equal(reduced[:, 0], tokens[:, 0])
    assert torch.equal(tm.assign[:, 1:] - 1, clustering.hard_labels(rows, made.centroids))


def reconstruct(case: Case) -> None:
    params = case.params
    before, after, x = case.need("feat_before"), case.need("feat_after"), case.need("x")
    weights = clustering.reconstruct_weights(before, after, params["k"], params["temperature"], "l2", official=True)
    case.check("x", weights @ x)
    case.check("row_l1", weights.abs().sum(dim=-1))


def roundtrip(case: Case) -> None:
    """Cluster, change the clusters, rebuild the tokens from the changed ones."""
    params, x = case.params, case.need("x")
    made = clusters(case, x).centroids
    # Compared above; from here on those of the file, because rounding decides between nearly equal ones.
    made = case.tensors.get("out.clusters", made)
    (matrix,) = case.weights().values()
    changed, rows = torch.tanh(made @ matrix), x.flatten(2).transpose(1, 2)
    k, t = name_of(params, "k", "reconstruction_k"), name_of(params, "recon_temperature", "temperature")
    weights = clustering.reconstruct_weights(rows, made, k, t, "l2", official=True)
    results = {"row_l1": weights.sum(dim=-1), "z": changed, "x_after": changed}
    for name, want in case.tensors.items():
        short = name.removeprefix("out.")
        if short == name or name in case.compared:
            continue
        got = results.get(short, weights @ changed)
        case.check(short, got.transpose(1, 2).reshape(want.shape) if want.dim() == 4 else got)


def run_model(case: Case) -> None:
    """model_*: a patched timm ViT, torchvision ViT (SWAG) or SAM encoder, layer by layer."""
    if "img_size" not in case.params:
        swag(case)
    elif "out_chans" in case.params:
        sam(case)
    else:
        timm(case)


def outputs(layers: Any, forward: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's output and that of every block."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[-1].detach())) for layer in layers]
    try:
        with torch.no_grad():
            return forward(x), seen
    finally:
        for hook in hooks:
            hook.remove()


def timm(case: Case) -> None:
    params, x = case.params, case.need("image")
    case.params = {**params, "qkv_bias": True, "norm_eps": params.get("norm_eps", 1e-6)}
    case.tensors["in.x"] = x
    model: Any = build(case)
    del case.tensors["in.x"]
    start, beta = params["cluster_after_block"] + 1, params["reconstruct_after_block"]
    red = vt.patch(
        model,
        "expedite",
        trace=True,
        clusters=params["num_cluster"],
        start=start,
        end=None if beta is None else beta + 1,
        iters=params["n_iters"],
        temperature=params["temperature"],
        window=params["window_size"],
        k=params["k"],
        norm="l2",
        compat="official",
    )
    tokens, seen = outputs(model.blocks, model, x)
    case.check("tokens", tokens)
    plain = vt.unpatch(model)
    _, full = outputs(plain.blocks, plain, x)
    case.check("pre_cluster", full[start - 1])
    case.check("clusters", seen[start - 1][:, 1:])
    for i, got in enumerate(seen):
        case.check(f"tokens_after_block{i}", got)
    if beta is not None:
        case.check("reconstructed_at_beta", seen[beta])
    assert red.trace[0].map.grid is not None


def swag(case: Case) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    params, x = case.params, case.need("image")
    names = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "num_classes")
    options = {name: params[name] for name in names}
    model: Any = VisionTransformer(**options, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))
    model.load_state_dict(swag_keys(case.weights()), strict=True)
    model.to(x.dtype).eval()
    start = params["clustering_location"] + int(params["cluster_after_output"])
    logits, plain = outputs(model.encoder.layers, model, x)
    if not 0 <= params["clustering_location"] < params["num_layers"]:
        case.check("logits", logits)
        for i, got in enumerate(plain):
            case.check(f"tokens_after_block{i}", got)
        return
    before = plain[start - 1] if start else embedded(model, x)
    options = {"iters": params["cluster_iters"], "temperature": params["temperature"], "window": params["window_size"]}
    options |= {"compat": "official", "reconstruct": False}
    red = vt.patch(model, "expedite", trace=True, clusters=params["num_cluster"], start=start, **options)
    logits, seen = outputs(model.encoder.layers, model, x)
    case.check("logits", logits)
    side = params["image_size"] // params["patch_size"]
    case.check("pre_cluster_map", before[:, 1:].transpose(1, 2).unflatten(2, (side, side)))
    case.check("clusters", red.trace[0].map.reduce(before)[:, 1:])
    case.check("hard_labels", red.trace[0].map.assign[:, 1:] - 1)
    for i, got in enumerate(seen):
        # The golden notes a block's output before the clustering that follows it.
        case.check(f"tokens_after_block{i}", plain[i] if i == start - 1 else got)
    vt.unpatch(model)


def embedded(model: Any, x: Tensor) -> Tensor:
    """What the first layer of a torchvision ViT is given."""
    seen: list[Tensor] = []
    hook = model.encoder.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


def sam_model(case: Case) -> Any:
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    params = case.params
    config = SamVisionConfig(
        hidden_size=params["embed_dim"],
        output_channels=params["out_chans"],
        num_hidden_layers=params["depth"],
        num_attention_heads=params["num_heads"],
        image_size=params["img_size"],
        patch_size=params["patch_size"],
        mlp_dim=int(params["embed_dim"] * params["mlp_ratio"]),
        window_size=params["window_size"],
        global_attn_indexes=list(params["global_attn_indexes"]),
    )
    model: Any = SamVisionEncoder(config)
    model.load_state_dict(segment_anything_keys(case.weights()), strict=True)
    return model.to(case.need("image").dtype).eval()


def sam(case: Case) -> None:
    params, x = case.params, case.need("image")
    model = sam_model(case)
    read = lambda image: model(image).last_hidden_state  # noqa: E731
    embedding, plain = outputs(model.layers, read, x)
    if case.has("embedding_unreduced"):
        case.check("embedding_unreduced", embedding)
    start, base = params["clustering_location"], params["window_size"]
    seen = plain
    if 0 <= start < params["depth"]:
        cells = round(params["num_cluster"] ** 0.5)
        options = {"iters": params["cluster_iters"], "temperature": params["temperature"]}
        options |= {"window": params["cluster_window_size"], "k": params["reconstruction_k"]}
        red = vt.patch(
            model, "expedite", trace=True, clusters=cells * cells, start=start, norm="l2", compat="official", **options
        )
        embedding, seen = outputs(model.layers, read, x)
        check_windows(case, model, plain, start, base, cells, red)
        vt.unpatch(model)
    case.check("embedding", embedding)
    for i, got in enumerate(seen):
        # A block's output is noted before the clustering that precedes the next one.
        case.check(f"after_block{i}", plain[i] if i == start - 1 else got)


def check_windows(case: Case, model: Any, plain: list[Tensor], start: int, base: int, cells: int, red: Any) -> None:
    """The windows before block `start`, clustered, against the golden's."""
    if start == 0:
        with torch.no_grad():
            whole = model.patch_embed(case.need("image")) + model.pos_embed
    else:
        whole = plain[start - 1]
    windows = partition(whole, (base, base))
    tm = red.trace[0].map
    got = tm.reduce(windows)
    if case.has("window_clusters"):
        case.check("window_clusters", got.unflatten(1, (cells, cells)))
    if case.has("hard_labels"):
        case.check("hard_labels", tied(windows, got, tm.assign, case.tensors["out.hard_labels"]))


def tied(x: Tensor, clusters: Tensor, chosen: Tensor, golden: Tensor) -> Tensor:
    """The golden's label where its cluster is just as near: cells that hold only padding are all the same."""
    distance = torch.cdist(x.double(), clusters.double())
    ours, theirs = distance.gather(2, chosen.unsqueeze(2)), distance.gather(2, golden.unsqueeze(2))
    same = (ours - theirs).abs() <= 1e-5 * theirs
    return torch.where(same.squeeze(2), golden, chosen)
