"""Write captions: of frames and clips from pictures, then better ones, and of sounds, from titles and captions."""

import base64
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any, ClassVar

from ..config import UserError, digest
from ..data.vidal import clean_captions, clean_title, media_paths, texts_of
from ..modalities import DecodeError, modality_class
from .chat import ChatOptions, Endpoint, Local, Question, Unanswered, ask
from .steps import Entry, Failed, Made, Step

PROMPTS = Path(__file__).parent / "prompts"


class Written(Step):
    """A step whose results are a model's answers. An entry gets all that it lacks or, if one fails, none."""

    fields: ClassVar[Mapping[str, str]]  # of the annotation, each with the name of its prompt
    words: ClassVar[tuple[str, ...]] = ()  # that a prompt fills in

    def __init__(self, root: Path, options: ChatOptions):
        self.root, self.options = root, options
        self.model = Endpoint(options) if options.endpoint else Local(options)
        self.prompts = {field: self._read(options.prompts or PROMPTS, name) for field, name in self.fields.items()}

    def record(self) -> dict[str, Any]:
        hashes = {f"prompt {self.fields[field]}": digest(prompt.template) for field, prompt in self.prompts.items()}
        names = ("max_tokens", "longest", "seed", "extra")
        return self.model.record() | {name: getattr(self.options, name) for name in names} | hashes

    def is_done(self, entry: Entry) -> bool:
        return not self._missing(entry)

    def __call__(self, entries: Sequence[Entry]) -> list[Made | Failed]:
        with ThreadPoolExecutor(self.model.at_once) as pool:
            return list(pool.map(self.one, entries))

    @abstractmethod
    def questions(self, entry: Entry) -> dict[str, list[Question]]:
        """Return the questions of each field. Raises `Unanswered` if the entry lacks what they are made of."""

    def _missing(self, entry: Entry) -> list[str]:
        texts = clean_captions({field: entry.fields.get(field) for field in self.fields})
        return [field for field in self.fields if field not in texts]

    def one(self, entry: Entry) -> Made | Failed:
        try:
            questions = self.questions(entry)
            texts = {field: [ask(self.model, each) for each in questions[field]] for field in self._missing(entry)}
        except Unanswered as error:
            return Failed(*error.args)
        return Made(texts={field: found if len(found) > 1 else found[0] for field, found in texts.items()})

    def _read(self, folder: Path, name: str) -> Template:
        """Return a prompt. Raises `UserError` if it is missing or has a word that is not filled in."""
        path = folder / f"{name}.txt"
        try:
            prompt = Template(path.read_text(encoding="utf-8").strip())
            prompt.substitute(dict.fromkeys(self.words, ""))
        except OSError as error:
            raise UserError(f"cannot read the prompt {path}: {error.strerror}") from error
        except (KeyError, ValueError) as error:
            known = ", ".join(f"${word}" for word in self.words) or "nothing"
            raise UserError(f"{path}: {known} can be filled in, and $$ is a dollar sign, but not {error}") from error
        return prompt


class Captions(Written):
    """A caption of each frame, and one of all frames together."""

    name = "captions"
    fields: ClassVar = {"ofa": "frame", "mplug": "clip"}

    def questions(self, entry: Entry) -> dict[str, list[Question]]:
        frames = media_paths(self.root, entry.id, str(entry.fields.get("folder", "")), "video")[1]
        try:
            pictures = [_part(path) for path in frames]
        except FileNotFoundError as error:
            raise Unanswered("no frames", f"{error.filename} does not exist: run generate frames first") from error
        except DecodeError as error:
            raise Unanswered("unreadable frames", str(error)) from error
        frame, clip = ({"type": "text", "text": prompt.substitute()} for prompt in self.prompts.values())
        return {"ofa": [[picture, frame] for picture in pictures], "mplug": [[*pictures, clip]]}


class Polish(Written):
    """A better caption, and one of what may be heard, from the title and the captions of frames and clip."""

    name = "polish"
    fields: ClassVar = {"polish_mplug": "polish", "sound_mplug": "sound"}
    words: ClassVar = ("title", "frames", "clip")

    def questions(self, entry: Entry) -> dict[str, list[Question]]:
        known = clean_captions({field: entry.fields.get(field) for field in ("raw", *Captions.fields)})
        if absent := [field for field in Captions.fields if field not in known]:
            raise Unanswered("no captions", f"{entry.id} lacks {' and '.join(absent)}: run generate captions first")
        title, clip = (" ".join(texts_of(known.get(field))) for field in ("raw", "mplug"))
        frames = "\n".join(f"{number}. {text}" for number, text in enumerate(texts_of(known["ofa"]), 1) if text)
        words = {"title": clean_title(title) or "(none)", "frames": frames, "clip": clip}
        return {field: [prompt.substitute(words)] for field, prompt in self.prompts.items()}


def _part(path: Path) -> dict[str, Any]:
    """Return a JPEG file as a part of a message. Raises `DecodeError` if it is not a picture."""
    data = base64.b64encode(path.read_bytes()).decode()
    modality_class("image")().decode(path)
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
