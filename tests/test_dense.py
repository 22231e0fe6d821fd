"""Dense features and class maps, against the papers' descriptions written out here, torch and Pillow."""

import re

import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT
from imagebind_files import small_state
from timm.layers import apply_rot_embed_cat
from tiny_towers import VISION
from torch import distributed as dist
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from languagebind import UserError, load
from languagebind.dense import dense_tower, score_maps
from languagebind.modalities.depth import Depth
from languagebind.modalities.image import Image
from languagebind.modalities.video import Video
from languagebind.model import DualEncoder
from languagebind.timm_tower import build_encoder
from languagebind.vit import EncoderConfig

OURS = EncoderConfig(patch_size=8, width=32, depth=2, num_heads=4, mlp_dim=64)
TIMM = {kind: EncoderConfig(timm_model=f"tiny_{kind}", timm_options=("global_pool=map",) * (kind != "vit"))
        for kind in VISION}  # fmt: skip
NARROW = ("depth=2", "embed_dim=32", "num_heads=2")
OTHERS = {
    "bias_apart": EncoderConfig(timm_model="eva_giant_patch14_224", timm_options=("patch_size=8", *NARROW)),
    "qk_norm": EncoderConfig(timm_model="tiny_vit", timm_options=("qk_norm=true", "init_values=0.5")),
    "avg": EncoderConfig(timm_model="tiny_vit", timm_options=('global_pool="avg"',)),
}


def tower_of(config, shape=(3, 1, 32, 32), std=0.2):
    torch.manual_seed(0)
    tower = build_encoder(shape, config).eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=std)
    return tower


def every_token(tower, x):
    return tower.post_layernorm(tower.encoder(tower.embed(x))[0])


def model_of(config, shape=(3, 1, 32, 32)):
    """A model without a text tower's weight, whose encoder is random."""
    text = nn.Linear(2, 2)
    model = DualEncoder(shape, config, (text, nn.Identity(), 16)).eval()
    model.vision_model = tower_of(config, shape)
    return model


def attention(q, v, heads):
    """Softmax of queries with queries, head by head, of (B, L, D)."""
    q, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, v))
    weights = torch.einsum("bhid,bhjd->bhij", q, q) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", weights.exp() / weights.exp().sum(-1, keepdim=True), v)


def unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("frames", [1, 4])
def test_the_last_block_of_our_vit_attends_from_queries_to_queries(frames):
    shape = (3, frames, 32, 32)
    model = model_of(EncoderConfig(**{**vars(OURS), "temporal_attention": frames > 1}), shape)
    x, tower = torch.randn(2, *shape), model.vision_model
    with torch.no_grad():
        tokens = tower.blocks[0](tower.embed(x))[0]
        last = tower.blocks[1]
        if frames > 1:  # attention over frames stays, as the published towers were trained with it
            clips = tokens.unflatten(0, (2, 4)) + last.temporal_embedding[:, :, None]
            rows = last.temporal_layer_norm1(clips.transpose(1, 2).flatten(0, 1))
            mixed = F.multi_head_attention_forward(
                *[rows.transpose(0, 1)] * 3, 32, 4, None,
                torch.cat([getattr(last.temporal_attn, f"{p}_proj").bias for p in "qkv"]), None, None, False, 0.0,
                last.temporal_attn.out_proj.weight, last.temporal_attn.out_proj.bias, training=False,
                use_separate_proj_weight=True, need_weights=False,
                **{f"{p}_proj_weight": getattr(last.temporal_attn, f"{p}_proj").weight for p in "qkv"},
            )[0].transpose(0, 1)  # fmt: skip
            tokens = (clips.transpose(1, 2) + mixed.unflatten(0, (2, -1))).transpose(1, 2).flatten(0, 1)
        normed = last.layer_norm1(tokens)
        mixed = attention(last.self_attn.q_proj(normed), last.self_attn.v_proj(normed), heads=4)
        y = tower.post_layernorm(last.self_attn.out_proj(mixed.transpose(1, 2).flatten(2)))
        expected = unit(model.visual_projection(y[:, 1:])).view(2, frames, 4, 4, 16)
        torch.testing.assert_close(model.encode_dense(x), expected, atol=1e-5, rtol=1e-5)
        plain = unit(model.visual_projection(every_token(tower, x)[:, 1:])).view(2, frames, 4, 4, 16)
        torch.testing.assert_close(model.encode_dense(x, "plain"), plain)
        # The class token that is trained comes from the same tokens
        pooled = every_token(tower, x)[:, 0].unflatten(0, (2, frames)).mean(dim=1)
        torch.testing.assert_close(tower(x), pooled)


def rotated(x, rope, prefix):
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope)], dim=2)


@pytest.mark.parametrize("kind", [*TIMM, *OTHERS])
def test_so_does_that_of_timms_towers(kind):
    model = model_of((TIMM | OTHERS)[kind])
    x, trunk = torch.randn(2, 3, 32, 32), model.vision_model.trunk
    last, seen = trunk.blocks[-1], {}
    last.register_forward_hook(lambda module, args, kwargs, y: seen.update(x=args[0], **kwargs), with_kwargs=True)
    with torch.no_grad():
        trunk(x)
        normed, attn, prefix = last.norm1(seen["x"]), last.attn, trunk.num_prefix_tokens
        q, _, v = F.linear(normed, attn.qkv.weight).chunk(3, dim=-1)
        if getattr(attn, "q_bias", None) is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
        elif attn.qkv.bias is not None:
            q, v = q + attn.qkv.bias[:32], v + attn.qkv.bias[64:]
        heads, rope = attn.num_heads, seen.get("rope")
        q = attn.q_norm(q.unflatten(-1, (heads, -1)).transpose(1, 2))
        q = q if rope is None else rotated(q, rope, prefix)
        y = attention(q.transpose(1, 2).flatten(2), v, heads).transpose(1, 2).flatten(2)
        y = attn.proj(attn.norm(y))
        y = trunk.norm(last.ls1(y) if hasattr(last, "ls1") else y)
        for mode, tokens in (("qq", y), ("plain", trunk.forward_features(x))):
            patches = tokens[:, prefix:]
            if (pool := trunk.attn_pool) is not None:  # all attention on one patch: its value
                patches = pool.proj(F.linear(patches, pool.kv.weight[32:], pool.kv.bias[32:]))
                patches = patches + pool.mlp(pool.norm(patches))
            expected = unit(model.visual_projection(trunk.fc_norm(patches))).view(2, 1, 4, 4, 16)
            torch.testing.assert_close(model.encode_dense(x[:, :, None], mode), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "pe", "siglip"])
def test_larger_inputs_interpolate_positions_and_change_nothing_else(kind):
    model = model_of({"ours": OURS, **TIMM}[kind])
    tower, x = model.vision_model, torch.randn(2, 3, 1, 48, 80)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), torch.random.fork_rng():
        state = torch.get_rng_state()
        features = model.train().encode_dense(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in tower.modules())
    assert features.shape == (2, 1, 6, 10, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    larger = tower_of({"ours": OURS, **TIMM}[kind], (3, 1, 48, 80))
    trained = tower.embeddings.position_embedding.weight if kind == "ours" else tower.trunk.pos_embed[0]
    prefix = len(trained) - 16
    grid = trained[prefix:].T.reshape(1, 32, 4, 4)
    grid = F.interpolate(grid, (6, 10), mode="bicubic", align_corners=False, antialias=True)
    positions = torch.cat([trained[:prefix], grid.flatten(2)[0].T])
    shared = {name: value for name, value in tower.state_dict().items() if not re.search("pos(_|ition_)embed", name)}
    larger.load_state_dict(shared, strict=False)
    if kind == "ours":
        larger.embeddings.position_embedding.weight.data.copy_(positions)
    else:
        larger.trunk.pos_embed.data.copy_(positions[None])
    model.vision_model = larger.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_dense(x), features, atol=1e-5, rtol=1e-5)


def test_half_precision_gives_unit_float32():
    model, x = model_of(OURS), torch.randn(2, 3, 1, 32, 32)
    with torch.no_grad():
        exact, half = model.encode_dense(x), model.bfloat16().encode_dense(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=-1), torch.ones(2, 1, 4, 4))
    assert F.cosine_similarity(half, exact, dim=-1).min() > 0.95


def test_adapters_take_part_and_gradients_reach_the_weights():
    from languagebind.lora import inject_lora

    model, x = model_of(OURS), torch.randn(1, 3, 1, 32, 32)
    inject_lora(model.vision_model, rank=2, alpha=2, dropout=0.0)
    for name, parameter in model.vision_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted = model.encode_dense(x)
    adapted[..., :3].sum().backward()
    last = model.vision_model.blocks[-1].self_attn
    assert last.q_proj.lora_B.default.weight.grad.any()
    assert last.k_proj.lora_B.default.weight.grad is None  # the keys are left out
    nn.init.zeros_(last.q_proj.lora_B.default.weight)
    assert not torch.allclose(model.encode_dense(x), adapted, atol=1e-5)


def test_what_has_no_dense_features_is_refused(toys, files, tmp_path):
    torch.save(small_state(), tmp_path / "imagebind.pth")
    with pytest.raises(UserError, match="has no dense features; use an encoder"):
        load({"depth": f"imagebind:{tmp_path}/imagebind.pth"}).encode_dense(depth=files["depth"])
    with pytest.raises(UserError, match="has no dense features; use an encoder"):
        dense_tower(nn.Linear(2, 2), (32, 32), "qq")
    with pytest.raises(ValueError, match="mode should be 'qq' or 'plain', not 'kk'"):
        dense_tower(tower_of(OURS), (32, 32), "kk")
    model = load(toys / "audio", toys / "depth")
    with pytest.raises(ValueError, match=r"pass one list of a modality: audio, depth"):
        model.encode_dense(text=["a box"])
    with pytest.raises(ValueError, match=r"pass one list of a modality: audio, depth"):
        model.segment(text=["a box"])
    with pytest.raises(UserError, match="only pictures and videos have maps of classes; use encode_dense"):
        model.segment(audio=files["audio"], text=["a box"])


def test_a_sharded_encoder_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tower = fully_shard(tower_of(OURS), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match="while FSDP shards it; use its checkpoint"):
            dense_tower(tower, (32, 32), "qq")
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------- from files


def test_files_to_features_of_patches(toys, files):
    model = load(toys / "depth", toys / "video")
    found = {"depth": model.encode_dense(depth=files["depth"], batch_size=1)}
    found["video"] = model.encode_dense(video=files["video"][:1])
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "depth": (len(files["depth"]), 1, 4, 4, 16), "video": (1, 8, 4, 4, 16),
    }  # fmt: skip
    inputs = torch.stack([Depth(image_size=56).preprocess(file) for file in files["depth"]])
    torch.testing.assert_close(found["depth"], model.model("depth").encode_dense(inputs))
    assert model.encode_dense(depth=files["depth"], image_size=112).shape[2:4] == (8, 8)


def test_a_map_of_a_square_is_the_nearest_text_of_its_patches(toys):
    model = load(toys / "image")
    picture = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
    prompts = [["a box", "the a box"], ["a pole", "the a pole", "a stick", "the a stick"]]
    (found,) = model.segment(image=[picture], text=prompts)
    texts = torch.stack([unit(model.encode(text=own).mean(dim=0)) for own in prompts])
    scores = model.encode_dense(image=[picture])[0, 0] @ texts.T  # (h, w, K)
    fine = F.interpolate(scores.permute(2, 0, 1)[None], (56, 56), mode="bilinear", align_corners=False)
    assert found.dtype == torch.int64
    assert torch.equal(found, fine[0].argmax(dim=0))
    clips = load(toys / "video").segment(video=[np.zeros((9, 60, 80, 3), np.uint8)], text=["a", "b"])
    assert clips[0].shape == (8, 60, 80)
    with pytest.raises(TypeError, match="a list, text="):
        model.segment(image=[picture], text="a box")
    for wrong in ([], [["a box"], []]):
        with pytest.raises(ValueError, match="at least one prompt for each"):
            model.segment(image=[picture], text=wrong)


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, None), (50, 131, None), (90, 60, 96), (41, 300, 64)])
def test_windows_put_together_are_the_picture(height, width, size):
    """Scores that are the mean colours of patches give the picture back, smoothed over a patch."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 128], axis=-1).astype(np.uint8)
    sizes = []

    def score(windows):
        sizes.append(tuple(windows.shape))
        return F.avg_pool2d(windows[:, :, 0], 4).permute(0, 2, 3, 1).unsqueeze(1)

    image = Image(image_size=size or 32, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    found = score_maps(score, image, image.load(pixels), window=32)
    assert found.shape == (1, 3, height, width)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert (found[0] - wanted).abs().max() < 0.15  # at the edges of the picture
    inner = (found[0] - wanted)[:, 8:-8, 8:-8].abs()
    assert inner.max() < 0.03
    assert {shape[1:] for shape in sizes} == {(3, 1, 32, 32)}
    short = size or 32
    long = short * max(height, width) // min(height, width)
    across = [1 + -(-(side - 32) // 16) for side in (short, long)]
    assert sum(shape[0] for shape in sizes) == across[0] * across[1]


def test_the_range_of_a_picture_is_that_of_the_whole_not_of_a_window():
    raw = torch.cat([torch.full((40, 40), 1.0), torch.full((40, 80), 4.0)], dim=1)
    whole = {"image_size": 20, "resize_mode": "whole"}
    x = Depth(max_depth=0.0, image_mean=(0,) * 3, image_std=(1,) * 3, **whole).transform(raw)
    assert x.shape == (3, 1, 20, 60)
    assert torch.allclose(x[0, 0, 10, [5, 50]], torch.tensor([0.25, 1.0]))
    clip = Video(num_frames=4, **whole).transform(torch.zeros(4, 3, 40, 120, dtype=torch.uint8))
    assert clip.shape == (3, 4, 20, 60)
    square = Depth(image_size=20).transform(raw[:, :40])
    torch.testing.assert_close(Depth(**whole).transform(raw[:, :40]), square)


# ------------------------------------------------------------------------------------------------------- sound


def test_a_sound_in_the_second_half_is_found_there(toys):
    """Frame f of 10 ms begins at second f / 100; with 14 frames in a patch, column j covers seconds 0.14 j onwards."""
    model = load(toys / "audio")
    vision, rate = model.model("audio").vision_model, 16_000
    nn.init.zeros_(vision.embeddings.position_embedding.weight)  # then equal patches have equal features
    time = np.arange(int(0.98 * rate) + 240) / rate  # 98 frames of 25 ms every 10 ms
    starts = 0.63  # s, in the middle of column 4
    tone = np.where(time < starts, 0.1 * np.sin(2 * np.pi * 400 * time), 0.1 * np.sin(2 * np.pi * 3000 * time))
    features = model.encode_dense(audio=[(tone.astype(np.float32), rate)])
    assert features.shape == (1, 1, 2, 7, 16)
    columns = features[0, 0].mean(dim=0)  # (w, D)
    similarity = model.similarity(columns, columns[[0, -1]])
    later = (similarity[:, 1] > similarity[:, 0]).tolist()
    assert [later[j] for j in (0, 1, 2, 3, 5, 6)] == [(j + 0.5) * 0.14 > starts for j in (0, 1, 2, 3, 5, 6)]
    twice = model.encode_dense(audio=[(np.tile(tone, 2).astype(np.float32), rate)], target_length=196)
    assert twice.shape == (1, 1, 2, 14, 16)


def test_the_recipe_of_the_page_says_which_sound_is_heard_when(toys, tmp_path):
    """A projection fitted to a file of a bell and then rain finds them in a longer file in another order."""
    model = load(toys / "audio")
    encoder, rate = model.model("audio"), 44_100
    nn.init.zeros_(encoder.vision_model.embeddings.position_embedding.weight)
    time = np.arange(int(1.4 * rate)) / rate  # ten columns
    bell = sum(0.2 * np.sin(2 * np.pi * pitch * time) for pitch in (523, 1250, 2810)) * np.exp(-(time % 0.7))
    rain = 0.2 * np.random.default_rng(0).standard_normal(len(time))
    texts, tokens = ["a bell", "rain"], []
    hook = encoder.visual_projection.register_forward_hook(lambda module, args, output: tokens.append(args[0]))
    soundfile.write(tmp_path / "fit.wav", np.concatenate([bell, rain]), rate)
    model.encode_dense(audio=[tmp_path / "fit.wav"], target_length=280)
    hook.remove()
    x = tokens[0].flatten(0, -2)  # (2 * 20, width), a row of low frequencies and one of high ones
    goals = model.encode(text=texts, of="audio").repeat_interleave(10, dim=0).repeat(2, 1)
    encoder.visual_projection.weight.data = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ goals).T
    soundfile.write(tmp_path / "both.wav", np.concatenate([rain, bell, rain[: len(rain) // 2]]), rate)  # 3.5 s
    page = (ROOT / "docs" / "dense.md").read_text()
    (recipe,) = re.findall(r"```python\n(import math\n.*?)\nheard = ", page, re.DOTALL)
    names = {"model": model}
    exec(compile(recipe, "docs/dense.md", "exec"), names)
    heard = names["listen"](tmp_path / "both.wav", texts)
    assert [start for start, _ in heard] == pytest.approx([0.14 * column for column in range(25)])
    assert [text for _, text in heard] == ["rain"] * 10 + ["a bell"] * 10 + ["rain"] * 5
