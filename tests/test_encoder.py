from dataclasses import replace

import pytest
import torch

from languagebind.vit import EncoderConfig, PatchDropout, VisionTransformer

TINY = EncoderConfig(patch_size=8, width=32, depth=2, num_heads=4, mlp_dim=64)
IMAGE, CLIP, AUDIO = (3, 1, 16, 16), (3, 4, 16, 16), (3, 1, 16, 40)


def encoder(shape, **options):
    torch.manual_seed(0)
    return VisionTransformer(shape, replace(TINY, **options)).eval()


@pytest.mark.parametrize(
    ("shape", "options"),
    [(IMAGE, {}), (AUDIO, {}), (CLIP, {}), (CLIP, {"temporal_attention": True}), (CLIP, {"patch_embedding": "3d"})],
)
def test_pools_a_batch_and_every_sample_by_itself(shape, options):
    model, inputs = encoder(shape, **options), torch.randn(3, *shape)
    pooled = model(inputs)
    assert pooled.shape == (3, 32)
    alone = torch.cat([model(x[None]) for x in inputs])
    torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=0)


def test_temporal_attention_sees_the_order_of_frames_and_pooling_alone_does_not():
    inputs = torch.randn(1, *CLIP)
    with_time, without = encoder(CLIP, temporal_attention=True), encoder(CLIP)
    assert not torch.allclose(with_time(inputs), with_time(inputs.flip(2)), atol=1e-4)
    torch.testing.assert_close(without(inputs), without(inputs.flip(2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3, 2, 16, 16), (2, 3, 1, 16, 24), (3, 1, 16, 16)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, 1, 16, 16\)"):
        encoder(IMAGE)(torch.zeros(shape))


def test_inputs_smaller_than_a_patch_are_refused():
    with pytest.raises(ValueError, match="smaller than a patch"):
        encoder((3, 1, 4, 16))


def test_patch_dropout_keeps_the_class_token_and_the_same_patches_in_every_frame():
    x = torch.arange(2 * 3 * 11, dtype=torch.float32).view(6, 11, 1)  # 2 clips of 3 frames, 10 patches
    kept = PatchDropout(0.5).train()(x, num_frames=3)
    assert kept.shape == (6, 6, 1)
    assert torch.equal(kept[:, 0], x[:, 0])
    places = (kept[:, 1:, 0] % 11).view(2, 3, 5)
    assert (places == places[:, :1]).all()
    assert not torch.equal(places[0], places[1])
    assert torch.equal(PatchDropout(0.5).eval()(x, 3), x)


def test_patch_dropout_keeps_at_least_one_patch():
    assert PatchDropout(0.99).train()(torch.zeros(1, 5, 2), 1).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="patch_dropout"):
        EncoderConfig(patch_dropout=1.0)


def test_grad_checkpointing_gives_the_same_gradients():
    inputs, gradients = torch.randn(2, *CLIP), []
    for checkpointing in (False, True):
        model = encoder(CLIP, temporal_attention=True, grad_checkpointing=checkpointing).train()
        model(inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_gradients_reach_the_input():
    inputs = torch.randn(1, *IMAGE, requires_grad=True)
    encoder(IMAGE)(inputs)[:, 0].sum().backward()
    assert inputs.grad.abs().sum() > 0
