"""The dual encoder: a trained encoder of one modality and a text tower."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip4clip import CLIP4CLIP, clip_model, read_head
from .config import UserError, at_least
from .dense import Mode, dense_tower
from .temporal import build_head, head_from_text, real_frames
from .text import TextConfig, TextSide, Tokenizer, build_text, encode_text, fingerprint, open_clip_text
from .timm_tower import TIMM, build_encoder, read_options, timm_model, tower_options
from .tuning import TuningConfig
from .vit import EncoderConfig
from .weights import State, WeightsError, init_encoder, load_strict, published_names, read_file, read_state

log = logging.getLogger(__name__)

TEXT_PREFIXES = ("text_model.", "text_projection.")


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of the encoder and its temporal head."""

    encoder_pretrained: str | None = None
    """file with the weights, a folder in the published layout, the pretrained tag for --encoder-tower, or `none` for
    random weights"""
    encoder_tower: str | None = None
    """open_clip model name, timm/NAME or clip4clip:FILE, whose vision transformer is the encoder; sets its sizes and
    preprocessing; none: our own ViT"""
    init_temperature: float = 0.07
    """initial temperature, the inverse of the logit scale; 0 keeps the pretrained logit scale"""
    init_logit_bias: float | None = None
    """initial value of a learned bias on the logits, which SigLIP's loss needs"""
    allow_partial: bool = False
    """continue if only some of the weights fit the encoder"""

    def __post_init__(self):
        at_least(0, init_temperature=self.init_temperature)


@dataclass(frozen=True)
class ModelConfig:
    """All options of a model except its input shape."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    init: InitConfig = field(default_factory=InitConfig)


def text_state(model: nn.Module) -> State:
    """Return the text tower's part of a model's state dict."""
    return {key: value for key, value in model.state_dict().items() if key.startswith(TEXT_PREFIXES)}


def same_text(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models have the same text tower, compared in the coarser of their dtypes."""
    a, b = text_state(one), text_state(other)
    kinds = {x.dtype for x in (*a.values(), *b.values()) if x.is_floating_point()}
    coarse = max(kinds, key=lambda dtype: torch.finfo(dtype).eps)
    sizes = [getattr(model.text_model, "sizes", None) for model in (one, other)]  # the activation is not in the weights
    same = a.keys() == b.keys() and sizes[0] == sizes[1]
    return same and all(torch.equal(a[key].to(coarse), b[key].to(a[key].device, coarse)) for key in a)


class DualEncoder(nn.Module):
    """Encodes inputs and texts into one space.

    Args:
        input_shape: (C, T, H, W) of one sample.
        encoder: sizes of the encoder.
        text: the frozen tower, its projection and the size D of the shared space, from `build_text`.
        logit_bias: initial value of a learned bias on the logits, for SigLIP's loss; None for no bias.
    """

    trained_with: tuple[str, ...] = ("text",)  # and the modality of a partner, if there was one

    def __init__(
        self,
        input_shape: tuple[int, int, int, int],
        encoder: EncoderConfig,
        text: TextSide,
        logit_bias: float | None = None,
    ):
        super().__init__()
        text_model, text_projection, self.embed_dim = text
        self.vision_model = build_encoder(input_shape, encoder)
        width, bias = self.vision_model.width, self.vision_model.projection_bias
        self.visual_projection = nn.Linear(width, self.embed_dim, bias=bias)
        nn.init.trunc_normal_(self.visual_projection.weight, std=width**-0.5)
        if bias:
            nn.init.zeros_(self.visual_projection.bias)
        head, depth = self.vision_model.head, encoder.temporal_head_depth
        self.temporal_head = build_head(head, self.embed_dim, depth, input_shape[1])
        self.text_model = text_model.requires_grad_(False)
        self.text_projection = text_projection.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))
        self.train(self.training)

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the features (B, D) of inputs (B, C, T, H, W): unit norm, float32."""
        return F.normalize(self.project(inputs).float(), dim=-1)

    def encode_dense(self, inputs: Tensor, mode: Mode = "qq") -> Tensor:
        """Return features (B, T, h, w, D) of the patches of inputs (B, C, T, H, W) of any size, as `encode` does."""
        tower = dense_tower(self.vision_model, inputs.shape[3:], mode)
        x = tower.feature_map(inputs.to(self.visual_projection.weight.dtype))
        return F.normalize(self.visual_projection(x).float(), dim=-1)

    def project(self, inputs: Tensor) -> Tensor:
        """Return the unnormalised features (B, D) of inputs (B, C, T, H, W), which are cast to the weights' dtype."""
        return project(self, inputs.to(self.visual_projection.weight.dtype))

    def project_frames(self, inputs: Tensor) -> Tensor:
        """Return the projected features (B, T * D) of the frames of inputs (B, C, T, H, W); zeros for padding."""
        x = self.visual_projection(self.vision_model(inputs.to(self.visual_projection.weight.dtype)))
        return (x * real_frames(inputs).unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def project_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return the unnormalised text features (B, D) of token ids, without gradients."""
        return self.text_projection(self.text_model(**tokens))

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return the text features (B, D) of token ids: unit norm, float32, without gradients."""
        return encode_text(self.text_model, self.text_projection, tokens)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return token ids on the CPU, for `encode_text`."""
        return cast(Tokenizer, self.text_model.tokenizer)(texts)

    def train(self, mode: bool = True) -> "DualEncoder":
        """Set the training mode, but keep the text tower in evaluation mode, as dropout would change the targets."""
        super().train(mode)
        self.text_model.eval()
        self.text_projection.eval()
        return self

    @property
    def trains_text(self) -> bool:
        """True if the text tower is trained, too."""
        return any(parameter.requires_grad for parameter in self.text_model.parameters())

    def encoder_state(self) -> State:
        """Return the state dict, without the text tower if it is frozen."""
        state = self.state_dict()
        return state if self.trains_text else {key: state[key] for key in state if not key.startswith(TEXT_PREFIXES)}

    def text_fingerprint(self) -> str:
        """Return the SHA-256 of the text tower's weights and tokenizer."""
        return fingerprint(self.text_model, self.text_projection)


def project(side: Any, inputs: Tensor) -> Tensor:
    """Return the unnormalised features (B, D) of inputs (B, C, T, H, W), for a module with a model's trained parts."""
    x = side.visual_projection(side.vision_model(inputs))
    return x if side.temporal_head is None else side.temporal_head(x, real_frames(inputs))


def build_model(config: ModelConfig, input_shape: tuple[int, int, int, int]) -> DualEncoder:
    """Build a model with the weights that the config names, or raise `UserError` if they are absent or do not fit."""
    init, tower, clip = config.init, config.text, None
    same = (init.encoder_tower, init.encoder_pretrained) == (tower.text_tower, tower.text_pretrained)
    if same and tower.file is None:
        clip = clip_model(tower.text_tower, tower.text_pretrained, tower.cache_dir)  # one CLIP for both sides
    text = build_text(tower) if clip is None else open_clip_text(clip, tower)
    model = DualEncoder(input_shape, config.encoder, text, init.init_logit_bias)
    state = _encoder_weights(config, clip)
    if state is not None and str(init.encoder_tower).startswith(TIMM) and "logit_scale" not in state:  # timm's own file
        state |= {f"visual_projection.{key}": value for key, value in model.visual_projection.state_dict().items()}
    try:
        if state is not None:
            _init_text(model, state, config)
            init_encoder(model.vision_model, model.visual_projection, state, init.allow_partial)
        _init_head(model, state or {}, init.allow_partial)
    except WeightsError as error:
        raise WeightsError(f"{error}\nuse --allow-partial to load the weights that fit") from error
    if init.init_temperature:
        model.logit_scale.data.fill_(math.log(1 / init.init_temperature))
    elif state is None or "logit_scale" not in state:
        raise UserError("--init-temperature 0 keeps the pretrained logit scale, but there is none; set it above 0")
    else:
        model.logit_scale.data.copy_(state["logit_scale"])
        if model.logit_bias is not None and "logit_bias" in state:
            model.logit_bias.data.copy_(state["logit_bias"])
    return model


def _init_text(model: DualEncoder, state: State, config: ModelConfig) -> None:
    """Initialise the text tower from a run that tuned its own. A frozen one should be that of the run already."""
    path = Path(str(config.init.encoder_pretrained))
    text = {key: value for key, value in state.items() if key.startswith(TEXT_PREFIXES)}
    tuned = text and path.is_file() and "text_fingerprint" in read_file(path)
    if tuned and config.tuning.tune_text:
        load_strict(model, model.encoder_state() | text, "the text tower", config.init.allow_partial)
    elif tuned and Path(str(config.text.file)).absolute() != path.absolute():
        raise UserError(f"{path} was trained with --tune-text; add it, or --text-pretrained {path}")


def _init_head(model: DualEncoder, state: State, allow_partial: bool) -> None:
    """Initialise the temporal head from a checkpoint with the same head, or else from CLIP's text tower."""
    head, what = model.temporal_head or nn.Identity(), f"the temporal head (--temporal-head {model.vision_model.head})"
    own = {key.removeprefix("temporal_head."): x for key, x in state.items() if key.startswith("temporal_head.")}
    if found := own or head_from_text(head, text_state(model)):
        load_strict(head, found, what, allow_partial)
    if head.state_dict() and not own:
        log.info("the temporal head starts from %s", "the text tower's first blocks" if found else "random weights")


def _encoder_weights(config: ModelConfig, clip: Any) -> State | None:
    pretrained, tower = config.init.encoder_pretrained, config.init.encoder_tower
    if pretrained is None:
        raise UserError("no initial weights are given: use --encoder-pretrained FILE, or --encoder-tower with a tag")
    named = tower_options(tower, pretrained, config.text.cache_dir)[0] if tower else {}
    if tower and named.get("timm_model") != config.encoder.timm_model:
        raise UserError(f"set timm_model to {named.get('timm_model')} for --encoder-tower {tower}")
    if pretrained == "none":
        return None
    if Path(pretrained).exists():
        return read_state(pretrained)
    if tower is None:
        raise UserError(f"--encoder-pretrained {pretrained} is not a file; for an open_clip tag, add --encoder-tower")
    if tower.startswith(TIMM):
        name, options = f"{tower.removeprefix(TIMM)}.{pretrained}", read_options(config.encoder.timm_options)
        return published_names(timm_model(name, pretrained=True, **options).state_dict())
    activation = named.get("activation", config.encoder.activation)
    if activation != config.encoder.activation:
        raise UserError(f"{tower} {pretrained} was trained with {activation}; set --activation {activation}")
    clip = clip_model(tower, pretrained, config.text.cache_dir) if clip is None else clip
    return published_names(clip.state_dict()) | (read_head(tower)[1] if tower.startswith(CLIP4CLIP) else {})
