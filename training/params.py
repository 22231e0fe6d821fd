"""Parse the command line of training. Flags override the --config file, then --encoder-tower, then --model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from languagebind import configs
from languagebind.config import UserError, as_flag, at_least, expand_config, flag_name, parse, take_flag, yaml_to_argv
from languagebind.modalities import Modality, modality_class
from languagebind.model import ModelConfig
from languagebind.partner import PartnerConfig
from languagebind.timm_tower import tower_options

from .batch import DataConfig
from .checkpoint import CheckpointConfig
from .engines import check_engine
from .engines.base import EngineConfig
from .logger import LogConfig
from .optim import OptimConfig
from .remote_sync import RemoteConfig

M = TypeVar("M", bound=Modality)


@dataclass(frozen=True)
class ValidationConfig:
    """Evaluation during training."""

    val_config: tuple[Path, ...] = ()
    """evaluation datasets: YAML files, or names such as nyu_v2 (see `languagebind configs`)"""
    val_data_root: Path | None = None
    """base folder for relative paths in the evaluation configs"""
    val_every_n_steps: int = 0
    """evaluate every N steps and at the end; 0: evaluate only at the end"""
    val_batch_size: int = 64
    """batch size in evaluation"""

    def __post_init__(self):
        at_least(1, val_batch_size=self.val_batch_size)
        at_least(0, val_every_n_steps=self.val_every_n_steps)


@dataclass(frozen=True)
class TrainConfig(Generic[M]):
    """Train an encoder against a text tower. Pass --modality, which determines the available flags."""

    modality: str
    """modality to train: the name of a module in languagebind/modalities"""
    inputs: M
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    partner: PartnerConfig = field(default_factory=PartnerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    eval: ValidationConfig = field(default_factory=ValidationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    mixture: tuple[str, ...] = ()
    """relative numbers of steps of --config files of several modalities, as in depth=2 infrared=1; by default equal"""
    seed: int = 0
    """seed of the sample order, the augmentations and the initial weights"""
    device: Literal["cuda", "cpu"] | None = None
    """device to train on; by default the GPU if there is one"""

    def __post_init__(self):
        at_least(0, seed=self.seed)


def parse_args(argv: Sequence[str]) -> TrainConfig:
    """Return the options of a run from its command line."""
    argv = expand_config(argv, lambda name: configs.find(name, "recipe"))
    order = [flag_name(word) for word in argv if flag_name(word) in ("model", "encoder_tower")]
    models, argv = take_flag(argv, "--model")
    sizes = yaml_to_argv(configs.find(models[-1], "model")) if models else []
    names, argv = take_flag(argv, "--modality")
    if not names:
        raise UserError("--modality is required, on the command line or in the --config file")
    modality = modality_class(names[-1])
    tower = tower_flags(argv, modality)
    argv = [*tower, *sizes, *argv] if order[-1:] == ["model"] else [*sizes, *tower, *argv]  # the later one wins
    kind = TrainConfig[modality]  # type: ignore[valid-type]  # the class depends on --modality
    config = parse(kind, [f"--modality={names[-1]}", *argv], prog="training.main")
    check_engine(config.engine, config.optim)
    encoder, inputs = config.model.encoder, vars(config.inputs)
    unmasked = encoder.temporal_head is None or encoder.temporal_attention or not any(inputs.get("image_mean", [1]))
    if inputs.get("frames_per_second") and unmasked:
        needs = "a --temporal-head, such as mean, no --temporal-attention, and an --image-mean above 0"
        raise UserError(f"--frames-per-second pads short clips, which needs {needs}")
    if encoder.temporal_head == "pairs":
        raise UserError("--temporal-head pairs is for evaluation alone: train another head")
    if (config.optim.loss == "siglip") != (config.model.init.init_logit_bias is not None):
        raise UserError("--loss siglip and --init-logit-bias belong together: use both (SigLIP's bias is -10) or none")
    if config.data.negatives and (config.optim.loss == "siglip" or config.model.tuning.tune_text):
        raise UserError("--negatives works with --loss clip alone, and not with --tune-text; leave it out")
    text = config.model.text  # with absolute paths, checkpoints load from any working directory
    schema, _, folder = text.text_tower.partition(":")
    if schema in ("local-dir", "hf", "clip4clip") and Path(folder).exists():
        text = replace(text, text_tower=f"{schema}:{Path(folder).absolute()}")
    if text.file:
        text = replace(text, text_pretrained=str(Path(text.file).absolute()))
    return replace(config, model=replace(config.model, text=text))


def tower_flags(argv: Sequence[str], modality: type[Modality]) -> list[str]:
    """Return the flags of sizes and preprocessing that --encoder-tower sets, and training's default of resizing."""
    names = ("--encoder-tower", "--encoder-pretrained", "--cache-dir")
    given = [take_flag(argv, name)[0][-1:] for name in names]
    tower, pretrained, folder = (None if value in ([], ["None"]) else value[0] for value in given)  # tyro writes None
    if tower and pretrained is None:
        raise UserError(f"--encoder-tower {tower} needs --encoder-pretrained: a tag, a file or none")
    encoder, inputs = tower_options(tower or "none", pretrained, folder)
    known = {option.name for option in fields(modality)}
    inputs = {"fast_resize": True, **inputs}
    options = encoder | {name: value for name, value in inputs.items() if name in known}
    return [word for name, value in options.items() for word in as_flag(name, value)]
