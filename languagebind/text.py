"""Text towers: CLIP's, with the published parameter names, and any other tower of open_clip.

A tower maps token ids (B, L) to (B, D) and has a `tokenizer`. A projection into the shared space follows it.
Shapes: B batch, L tokens, D width.
"""

import hashlib
import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip4clip import CLIP4CLIP, clip_model
from .clip_text import CONTEXT_LENGTH, ClipText, ClipTextConfig, Encode, Tokenizer
from .config import UserError, at_least
from .weights import State, clip_text_state, hash_tensor, load_strict, read_state

# The fingerprint covers the token ids of these texts: case, accents, punctuation, entities, an over-long text.
PROBE_TEXTS = ["A photo of 2 Dogs, running!", "Café &amp; naïve — ünïcödé", "#hashtag  spaced\tout", "long " * 200]
TextSide = tuple[nn.Module, nn.Module, int]  # a tower, its projection, and the size D of the shared space


@dataclass(frozen=True)
class TextConfig:
    """The text tower."""

    text_tower: str = "ViT-L-14"
    """open_clip model name, hf-hub:ORG/NAME or local-dir:FOLDER of an open_clip model, clip4clip:FILE,
    hf:FOLDER_OR_NAME of a sentence encoder (mean pooled), or package:MODULE/FOLDER of one in a Python package"""
    text_pretrained: str | None = None
    """open_clip's pretrained tag, a file with CLIP's weights, or a folder in the published layout; needed with an
    open_clip model name"""
    context_length: int | None = None
    """tokens per text, including start and end; longer texts are cut; None: as many as the tower reads"""
    cache_dir: str | None = None
    """folder for downloaded weights"""

    def __post_init__(self):
        at_least(3, context_length=self.context_length)

    @property
    def file(self) -> str | None:
        """The file or folder of the weights, if `text_pretrained` is one."""
        path = self.text_pretrained
        return path if path and Path(path).exists() else None


class OpenClipText(nn.Module):
    """Any other text tower of open_clip, with its projection, (B, L) -> (B, D)."""

    def __init__(self, tower: nn.Module, tokenizer: Tokenizer):
        super().__init__()
        self.tower = tower
        self.tokenizer = tokenizer

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tower(input_ids)


def build_text(config: TextConfig, pretrained: bool = True) -> TextSide:
    """Return the pretrained tower, its projection and the size D of the shared space, or raise `UserError`.

    Without `pretrained`, the weights of CLIP's tower are random, for a checkpoint that holds them.
    """
    if folder := _sentence_encoder_folder(config):
        return _sentence_encoder(folder, text_tokens(config))
    if config.file or not pretrained:
        sizes, size = clip_text_sizes(config)
        if sizes is not None:
            return _clip_text(config, sizes, size, read_state(str(config.file)) if pretrained else None)
    return open_clip_text(_open_clip_model(config), config)


def open_clip_text(model: Any, config: TextConfig) -> TextSide:
    """Return the text side of the config's open_clip model, or raise `UserError` if it has no separate text tower."""
    tower = getattr(model, "text", model)  # open_clip keeps CLIP's own text tower in the model itself
    if sizes := _clip_sizes(tower, config):
        return _clip_text(config, sizes, tower.text_projection.shape[1], clip_text_state(tower.state_dict()))
    hf_config = getattr(tower, "config", None)
    if config.context_length not in (None, own := getattr(tower, "context_length", None)) and hf_config is None:
        raise UserError(f"{config.text_tower} reads exactly {own} tokens; leave out --context-length")
    if hf_config is None and tower is model:
        raise UserError(f"open_clip's {config.text_tower} does not have a separate text tower; choose another")
    encode = text_tokens(config)
    width = model.encode_text(encode(["a"])).shape[1]
    # Only Hugging Face's towers mask the padding. In other towers, trimming the padding would change the features.
    tokenizer = Tokenizer(encode, cut=False) if hf_config is None else Tokenizer(encode, hf_config.pad_token_id)
    return OpenClipText(tower, tokenizer), nn.Identity(), width


def clip_text_sizes(config: TextConfig) -> tuple[ClipTextConfig | None, int]:
    """Return the sizes of CLIP's text tower and of the shared space, without reading weights; for others None and 0."""
    if _sentence_encoder_folder(config):
        return None, 0
    model = _open_clip_model(config, sizes_only=True)
    tower = getattr(model, "text", model)
    sizes = _clip_sizes(tower, config)
    return sizes, tower.text_projection.shape[1] if sizes else 0


@torch.no_grad()
def encode_text(text_model: nn.Module, text_projection: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Return the text features (B, D) of token ids: unit norm, float32, without gradients."""
    return F.normalize(text_projection(text_model(**tokens)).float(), dim=-1)


def fingerprint(text_model: nn.Module, text_projection: nn.Module) -> str:
    """Return the SHA-256 of a text tower's weights and of the token ids of a few texts."""
    digest = hashlib.sha256()
    for module in (text_model, text_projection):
        for name, parameter in sorted(module.named_parameters()):  # buffers vary with the version of transformers
            hash_tensor(digest, name, parameter)
    for ids in probe_tokens(text_model):
        digest.update(ids.numpy().data)
    return digest.hexdigest()


def probe_tokens(text_model: nn.Module) -> list[Tensor]:
    """Return the token ids (1, L) of a few texts, which tell whether two tokenizers are the same."""
    tokenizer = cast(Tokenizer, text_model.tokenizer)
    return [tokenizer([text])["input_ids"] for text in PROBE_TEXTS]


@cache
def clip_tokens(context_length: int) -> Encode:
    """Return CLIP's tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


def is_clip_tokens(encode: Encode) -> bool:
    """Tell whether a tokenizer is CLIP's."""
    from open_clip.tokenizer import SimpleTokenizer

    return isinstance(encode, SimpleTokenizer)


@cache
def text_tokens(config: TextConfig) -> Encode:
    """Return a tower's tokenizer without reading weights, or raise `UserError` if the tower is not found."""
    from open_clip import get_tokenizer
    from open_clip.tokenizer import HFTokenizer

    if folder := _sentence_encoder_folder(config):
        with _sentence_encoder_config(folder) as sizes:
            longest = min(sizes.max_position_embeddings, 256)
            if (config.context_length or 0) > sizes.max_position_embeddings:
                limit = f"{config.text_tower} reads at most {sizes.max_position_embeddings} tokens"
                raise UserError(f"{limit}; lower --context-length")
            return HFTokenizer(folder, context_length=config.context_length or longest)
    if config.text_tower.startswith(CLIP4CLIP):
        return clip_tokens(config.context_length or CONTEXT_LENGTH)
    return get_tokenizer(config.text_tower, config.context_length, cache_dir=config.cache_dir)


def bundled_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's vocabulary (token -> id) and merges, both taken from open_clip."""
    tokenizer: Any = clip_tokens(CONTEXT_LENGTH)
    # open_clip has other names for the last two tokens
    tokens = [*list(tokenizer.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, list(tokenizer.bpe_ranks)


def _open_clip_model(config: TextConfig, sizes_only: bool = False) -> Any:
    schema = config.text_tower.partition(":")[0]
    if schema not in ("hf-hub", "local-dir", "clip4clip") and config.text_pretrained is None:
        advice = "set it to a tag in open_clip.list_pretrained() or to a file"
        raise UserError(f"--text-tower {config.text_tower} needs --text-pretrained: {advice}")
    pretrained = None if sizes_only and config.file else config.text_pretrained  # open_clip reads no folders
    return clip_model(config.text_tower, pretrained, config.cache_dir, sizes_only)


def _clip_sizes(tower: Any, config: TextConfig) -> ClipTextConfig | None:
    """Return the sizes of an open_clip text tower; None unless it is CLIP's own, causal and pooled at the end."""
    if not hasattr(tower, "transformer") or not hasattr(tower.transformer, "resblocks"):
        return None
    pool_type = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if pool_type != "argmax" or tower.attn_mask is None or isinstance(tower.text_projection, nn.Module):
        return None
    block = tower.transformer.resblocks[0]
    return ClipTextConfig(
        vocab_size=tower.token_embedding.num_embeddings,
        context_length=max(tower.positional_embedding.shape[0], config.context_length or 0),  # files may have more
        width=tower.positional_embedding.shape[1],
        depth=len(tower.transformer.resblocks),
        num_heads=block.attn.num_heads,
        mlp_dim=block.mlp.c_fc.out_features,
        activation=activation_of(block),
    )


def activation_of(block: Any) -> str:
    """Return the activation of an open_clip transformer block."""
    return "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu"


def _clip_text(config: TextConfig, sizes: ClipTextConfig, size: int, state: State | None = None) -> TextSide:
    """Return CLIP's text side, with the weights in `state`, if any."""
    text_model, projection = ClipText(sizes, Tokenizer(text_tokens(config))), nn.Linear(sizes.width, size, bias=False)
    if state is not None:
        rows = len(state.get("text_model.embeddings.position_embedding.weight", range(sizes.context_length)))
        if rows != sizes.context_length:
            remedy = f"not {sizes.context_length}; set --context-length {rows}"
            raise UserError(f"the text tower is for texts of {rows} tokens, {remedy}")
        state = {key: value for key, value in state.items() if key.startswith(("text_model.", "text_projection."))}
        both = nn.ModuleDict({"text_model": text_model, "text_projection": projection})
        load_strict(both, state, "the text tower")
    return text_model, projection, size


def _sentence_encoder_folder(config: TextConfig) -> str | None:
    """Return the folder or hub id of a sentence encoder; None for open_clip's towers."""
    schema, _, rest = config.text_tower.partition(":")
    if schema == "local-dir" and not Path(rest).is_dir():
        raise UserError(f"--text-tower {config.text_tower}: there is no folder {Path(rest).absolute()}")
    if schema != "package":
        return rest if schema == "hf" else None
    module, _, folder = rest.partition("/")
    try:
        return str(importlib.resources.files(module) / folder)
    except ImportError as error:
        raise UserError(f"--text-tower {config.text_tower}: the package {module} is not installed") from error


def _sentence_encoder(folder: str, encode: Encode) -> TextSide:
    from open_clip.hf_model import HFTextEncoder

    with _sentence_encoder_config(folder) as sizes:
        tower = HFTextEncoder(folder, sizes.hidden_size, pooler_type="mean_pooler", proj_type=None)
    return OpenClipText(tower, Tokenizer(encode, sizes.pad_token_id)), nn.Identity(), sizes.hidden_size


@contextmanager
def _sentence_encoder_config(folder: str) -> Iterator[Any]:
    """Yield the config of a sentence encoder; turn errors while reading the encoder's files into a `UserError`."""
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it warns about the pooler's weights, which mean pooling does not use
    logging.disable_progress_bar()
    try:
        yield AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the sentence encoder {folder}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
