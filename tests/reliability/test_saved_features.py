"""Features of a patched model are ordinary tensors to whoever saves them."""

from __future__ import annotations

import copy
import io
import pickle

import torch

import visiontok as vt
from visiontok.backbones.timm_vit import TimmViT


def test_saved_features_load_with_weights_only_and_carry_no_state() -> None:
    model, x = TimmViT().examples()["gap"]
    with vt.patched(model, "tome", r=3), torch.no_grad():
        features = model.forward_features(x)
        buffer = io.BytesIO()
        torch.save(features, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert torch.equal(loaded, features)
        # Without sizes the pool is the plain mean, and nothing of the patched forward leaks into it.
        plain = loaded.mean(dim=1)
        torch.testing.assert_close(model.pool(loaded), plain)
        assert not torch.allclose(model.pool(features), plain, atol=1e-6)


def test_features_copied_in_memory_keep_their_sizes() -> None:
    model, x = TimmViT().examples()["gap"]
    with vt.patched(model, "tome", r=3), torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.pool(copy.deepcopy(features)), model.pool(features))
        assert torch.equal(pickle.loads(pickle.dumps(features)), features)
