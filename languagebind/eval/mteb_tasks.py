"""Depth and infrared classification as mteb tasks, and our encoders as mteb models; needs `pip install mteb`.

    import languagebind, mteb
    from languagebind.eval.mteb_tasks import MtebEncoder, mteb_task

    model = MtebEncoder(languagebind.load("LanguageBind_Depth"))
    mteb.evaluate(model, mteb_task("nyu_v2", "/data"))

mteb lacks these modalities, so it treats the files as pictures and passes them on unchanged. It uses one prompt per
class, so its numbers differ from those with the templates in the configs.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta

from ..config import UserError
from ..hub.encoders import TEXT, Encoders
from ..modalities import modality_class
from .data.datasets import DatasetConfig, load_dataset_config
from .data.samples import class_names, read_samples
from .features import class_prompts
from .score.zero_shot import label_targets, single_labels

PICTURE = AbsTaskZeroShotClassification.input_column_name


class FolderTask(AbsTaskZeroShotClassification):
    """Zero-shot classification of one of our datasets of picture files. Use `mteb_task` to make one."""

    def __init__(self, config: DatasetConfig, template: str):
        if config.task != "classification" or config.modality is None or "{c}" not in template:
            needs = f"needs a classification dataset with a modality, and {{c}} in the template {template!r}"
            raise UserError(f"{config.name}: mteb's task {needs}")
        self.config, self.template = config, template
        self.data_loaded = False
        super().__init__()

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """List the files and their classes. mteb reads the files later."""
        if self.data_loaded:
            return
        samples = read_samples(self.config, modality_class(str(self.config.modality))())
        targets = label_targets(samples, class_names(self.config), self.config.name)
        files = [sample.source for sample in samples]
        if not all(isinstance(file, Path) and file.is_file() for file in files):
            raise UserError(f"{self.config.name}: mteb's task needs one file per sample, not shards or frames")
        columns = {PICTURE: list(map(str, files)), self.label_column_name: single_labels(targets).tolist()}
        split = Dataset.from_dict(columns).cast_column(PICTURE, Image())
        self.dataset, self.data_loaded = DatasetDict({self.config.split or "test": split}), True

    def get_candidate_labels(self) -> list[str]:
        return class_prompts(list(class_names(self.config).values()), [self.template])


class MtebEncoder(AbsEncoder):
    """Lets mteb call our encoders of one modality of pictures, and of texts, as the model ORGANISATION/NAME."""

    def __init__(self, encoders: Encoders, name: str = "languagebind/encoder"):
        (self.modality,) = encoders.modalities
        self.encoders = encoders
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "modalities": [TEXT, PICTURE]})

    def encode(self, inputs: Iterable[dict[str, Any]], **_: Any) -> np.ndarray:
        """Return the unit-norm features (N, D) of batches. Each batch has a column of texts or of PIL images."""
        found: list[Any] = []
        for batch in inputs:
            key, own = (PICTURE, self.modality) if PICTURE in batch else (TEXT, TEXT)
            columns: dict[str, Any] = {own: list(batch[key]), "to": "numpy"}
            found.append(self.encoders.encode(**columns))
        return np.concatenate(found)


def mteb_task(
    config: str | Path, data_root: str | Path | None = None, template: str = "a photo of a {c}."
) -> FolderTask:
    """Return the mteb task of a dataset's config, a name such as nyu_v2 or llvip, or a YAML file.

    The `template` is a prompt with {c} for the class. Raises `UserError` if the config is wrong, its task is not
    classification, or its class names are missing.
    """
    dataset = load_dataset_config(config, Path(data_root) if data_root else None)
    metadata = TaskMetadata(
        name="".join(part.title() for part in dataset.name.split("_")) + "ZeroShot",
        description=f"{dataset.name}: {dataset.modality} as pictures, one prompt a class.",
        reference=None,
        dataset={"path": dataset.name, "revision": dataset.split or "test"},
        type="ZeroShotClassification",
        category="i2t",
        modalities=[PICTURE, TEXT],
        eval_splits=[dataset.split or "test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )
    # mteb reads the metadata from the class, also when it unloads the data
    return type(metadata.name, (FolderTask,), {"metadata": metadata})(dataset, template)
