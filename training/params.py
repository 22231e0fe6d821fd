"""The command line of training: `--config` and `--model` files first, then flags; the last one wins."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from languagebind.config import UserError, at_least, expand_config, parse, take_flag, yaml_to_argv
from languagebind.modalities import Modality, modality_class
from languagebind.model import ModelConfig
from languagebind.text import TextConfig

from .checkpoint import CheckpointConfig
from .engines import check_engine
from .engines.base import EngineConfig
from .logger import LogConfig
from .optim import OptimConfig
from .remote_sync import RemoteConfig
from .stream import DataConfig

M = TypeVar("M", bound=Modality)

MODEL_FOLDER = Path(__file__).parent.parent / "configs" / "model"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training."""

    val_config: tuple[Path, ...] = ()
    """YAML files of evaluation data sets"""
    val_data_root: Path | None = None
    """folder that the data sets' relative paths start from"""
    val_every_n_steps: int = 0
    """evaluate each N steps and at the end; 0: only at the end"""
    val_batch_size: int = 64

    def __post_init__(self):
        at_least(1, val_batch_size=self.val_batch_size)
        at_least(0, val_every_n_steps=self.val_every_n_steps)


@dataclass(frozen=True)
class TrainConfig(Generic[M]):
    """Fits an encoder to a frozen text tower. Give --modality first: its own options are among the flags."""

    modality: str
    """a file name in languagebind/modalities"""
    inputs: M
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0
    """decides the order of the samples, what is drawn for them, and the random weights"""
    device: Literal["cuda", "cpu"] | None = None
    """by default a GPU when there is one"""

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed should be in [0, 2^63), got {self.seed}")


def parse_args(argv: Sequence[str]) -> TrainConfig:
    """The options of a run.

    Raises:
        UserError: no modality, or an unknown one; an unreadable config file; options that exclude each other.
    """
    argv = expand_config(argv)
    models, argv = take_flag(argv, "--model")
    if models:
        argv = yaml_to_argv(model_file(models[-1])) + argv
    names, argv = take_flag(argv, "--modality")
    if not names:
        raise UserError("--modality is needed, on the command line or in the --config file")
    try:
        modality = modality_class(names[-1])
    except ValueError as error:
        raise UserError(str(error)) from error
    config = parse(TrainConfig[modality], [f"--modality={names[-1]}", *argv], prog="training.main")
    check_engine(config.engine, config.optim)
    if (config.optim.loss == "siglip") != (config.model.init.init_logit_bias is not None):
        raise UserError(
            "--loss siglip and --init-logit-bias belong together: SigLIP starts at"
            " --init-logit-bias -10 --init-temperature 0.1"
        )
    return replace(config, model=replace(config.model, text=found_from_anywhere(config.model.text)))


def found_from_anywhere(text: TextConfig) -> TextConfig:
    """The same text tower by absolute paths: the run may be loaded from another folder than it was started in."""
    schema, _, folder = text.text_tower.partition(":")
    if schema in ("local-dir", "hf") and Path(folder).is_dir():
        text = replace(text, text_tower=f"{schema}:{Path(folder).absolute()}")
    if text.text_pretrained and Path(text.text_pretrained).is_file():
        text = replace(text, text_pretrained=str(Path(text.text_pretrained).absolute()))
    return text


def model_file(name: str) -> Path:
    """The YAML of a model's sizes: a path, or a name in configs/model.

    Raises:
        UserError: there is no such model.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else MODEL_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MODEL_FOLDER.glob("*.yaml")))
        raise UserError(f"no model {name!r}: give a YAML file, or one of {known}")
    return path
