"""The dual encoder: one modality's encoder, trained, beside a frozen text tower."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError, at_least
from .text import TextConfig, build_text, encode_text, fingerprint, open_clip_text
from .tuning import TuningConfig
from .vit import EncoderConfig, VisionTransformer
from .weights import WeightsError, init_encoder, open_clip_model, published_names, read_state

TEXT_PREFIXES = ("text_model.", "text_projection.")


@dataclass(frozen=True)
class InitConfig:
    """What the encoder starts from."""

    encoder_pretrained: str | None = None
    """file with CLIP vision weights, or open_clip's pretrained tag for --encoder-tower; `none`: random weights"""
    encoder_tower: str | None = None
    """open_clip model name that the tag belongs to"""
    init_temperature: float = 0.07
    """the logit scale starts at ln(1 / temperature); 0 keeps that of the pretrained weights"""
    init_logit_bias: float | None = None
    """train a bias on the logits as well, from this value: SigLIP's loss needs one"""
    allow_partial: bool = False
    """continue if the weights fit the encoder only in part"""

    def __post_init__(self):
        at_least(0, init_temperature=self.init_temperature)
        if not math.isfinite(self.init_logit_bias or 0):
            raise UserError(f"init_logit_bias should be a number, got {self.init_logit_bias}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a model is built from, but for its input shape."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    init: InitConfig = field(default_factory=InitConfig)


def text_state(model: nn.Module) -> dict[str, Tensor]:
    """The text tower's part of a state dict."""
    return {key: value for key, value in model.state_dict().items() if key.startswith(TEXT_PREFIXES)}


def same_text(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have one text tower, compared in the coarser of their types."""
    a, b = text_state(one), text_state(other)
    kinds = {x.dtype for x in (*a.values(), *b.values()) if x.is_floating_point()}
    coarse = max(kinds, key=lambda dtype: torch.finfo(dtype).eps)
    return a.keys() == b.keys() and all(torch.equal(a[key].to(coarse), b[key].to(coarse)) for key in a)


class DualEncoder(nn.Module):
    """Encodes inputs and texts into one space.

    Args:
        input_shape: (C, T, H, W) of one sample.
        encoder: sizes of the encoder.
        text: the frozen tower, its projection and the size D of the shared space, as `build_text` gives them.
        logit_bias: of an encoder that was trained with SigLIP's loss; None: there is none.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int, int],
        encoder: EncoderConfig,
        text: tuple[nn.Module, nn.Module, int],
        logit_bias: float | None = None,
    ):
        super().__init__()
        text_model, text_projection, self.embed_dim = text
        self.vision_model = VisionTransformer(input_shape, encoder)
        self.visual_projection = nn.Linear(encoder.width, self.embed_dim, bias=False)
        nn.init.trunc_normal_(self.visual_projection.weight, std=encoder.width**-0.5)
        self.text_model = text_model.requires_grad_(False)
        self.text_projection = text_projection.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))
        self.train(self.training)

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D), unit norm, float32."""
        return F.normalize(self.project(inputs).float(), dim=-1)

    def project(self, inputs: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D), in the shared space but of any norm. Inputs take the weights' type."""
        return self.visual_projection(self.vision_model(inputs.to(self.visual_projection.weight.dtype)))

    @torch.no_grad()
    def project_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """What `tokenize` gives -> (B, D), of any norm, never with a gradient."""
        return self.text_projection(self.text_model(**tokens))

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """What `tokenize` gives -> (B, D), unit norm, float32, never with a gradient."""
        return encode_text(self.text_model, self.text_projection, tokens)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids on the CPU, for `encode_text`."""
        return self.text_model.tokenizer(texts)

    def train(self, mode: bool = True) -> "DualEncoder":
        """The text tower stays in evaluation mode: dropout there would be noise in the targets."""
        super().train(mode)
        self.text_model.eval()
        self.text_projection.eval()
        return self

    def encoder_state(self) -> dict[str, Tensor]:
        """The state dict without the text tower."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(TEXT_PREFIXES)}

    def text_fingerprint(self) -> str:
        """SHA-256 of the text tower's weights and tokenizer."""
        return fingerprint(self.text_model, self.text_projection)


def build_model(config: ModelConfig, input_shape: tuple[int, int, int, int]) -> DualEncoder:
    """A model whose encoder and text tower hold the weights that the config names.

    Raises:
        UserError: weights are not given, cannot be found, or do not fit.
    """
    init, tower, clip = config.init, config.text, None
    if (init.encoder_tower, init.encoder_pretrained) == (tower.text_tower, tower.text_pretrained):
        clip = open_clip_model(tower.text_tower, tower.text_pretrained, tower.cache_dir)  # one CLIP for both sides
    text = build_text(tower) if clip is None else open_clip_text(clip, tower)
    model = DualEncoder(input_shape, config.encoder, text, init.init_logit_bias)
    state = _encoder_weights(config, clip)
    if state is not None:
        try:
            init_encoder(model, state, config.init.allow_partial)
        except WeightsError as error:
            raise WeightsError(f"{error}\nuse --allow-partial to continue with what fits") from error
    if config.init.init_temperature:
        model.logit_scale.data.fill_(math.log(1 / config.init.init_temperature))
    elif state is None or "logit_scale" not in state:
        raise UserError("--init-temperature 0 keeps the pretrained logit scale, but the weights bring none")
    else:
        model.logit_scale.data.copy_(state["logit_scale"])
    return model


def _encoder_weights(config: ModelConfig, clip: nn.Module | None) -> dict[str, Tensor] | None:
    pretrained, tower = config.init.encoder_pretrained, config.init.encoder_tower
    if pretrained is None:
        raise UserError(
            "say what the encoder starts from: --encoder-pretrained FILE, or --encoder-tower NAME"
            " --encoder-pretrained TAG (open_clip's), or --encoder-pretrained none for random weights"
        )
    if pretrained == "none":
        return None
    if Path(pretrained).exists():
        return read_state(pretrained)
    if tower is None:
        raise UserError(f"--encoder-pretrained {pretrained} is no file; a tag needs --encoder-tower as well")
    clip = open_clip_model(tower, pretrained, config.text.cache_dir) if clip is None else clip
    blocks = getattr(getattr(clip.visual, "transformer", None), "resblocks", None)
    if not blocks:
        raise UserError(f"--encoder-tower {tower} is no plain vision transformer")
    activation = "quick_gelu" if type(blocks[0].mlp.gelu).__name__ == "QuickGELU" else "gelu"
    if activation != config.encoder.activation:
        raise UserError(f"{tower} {pretrained} was trained with {activation}: set --activation {activation}")
    return published_names(clip.state_dict())
