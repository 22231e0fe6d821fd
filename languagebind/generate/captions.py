"""Caption frames and clips; then write better captions, and captions of the sound, from these and the titles."""

import base64
from abc import abstractmethod
from pathlib import Path
from string import Template
from typing import Any, ClassVar

from ..config import UserError, digest
from ..data.vidal import clean_captions, clean_title, texts_of
from ..modalities import DecodeError
from .chat import ChatOptions, Endpoint, Local, Message, ask
from .steps import VIDEO, Entry, Made, Step, Unmade


class TextStep(Step):
    """A step that asks a model for the fields that an entry lacks. If one answer fails, the entry gets none."""

    fields: ClassVar[tuple[str, ...]]  # of the annotation; each has a prompt
    words: ClassVar[tuple[str, ...]] = ()  # that prompts may contain, such as $title

    def __init__(self, root: Path, options: ChatOptions):
        self.root, self.options = root, options
        self.model = Endpoint(options) if options.endpoint else Local(options)
        self.at_once = self.model.at_once
        self.prompts = {field: self._prompt(options.prompts / f"{field}.txt") for field in self.fields}

    def record(self) -> dict[str, Any]:
        hashes = {f"prompt {field}": digest(prompt.template) for field, prompt in self.prompts.items()}
        return self.model.record() | {"max_tokens": self.options.max_tokens, "thinking": self.options.thinking} | hashes

    def is_done(self, entry: Entry) -> bool:
        return not self._lacking(entry)

    def make(self, entry: Entry) -> Made:
        messages = self.messages(entry)
        texts = {field: [ask(self.model, each) for each in messages[field]] for field in self._lacking(entry)}
        return Made(texts={field: found if len(found) > 1 else found[0] for field, found in texts.items()})

    @abstractmethod
    def messages(self, entry: Entry) -> dict[str, list[Message]]:
        """Return the messages that ask for each field. Raises `Unmade` if the entry lacks what they need."""

    def _lacking(self, entry: Entry) -> list[str]:
        usable = clean_captions({field: entry.fields.get(field) for field in self.fields})
        return [field for field in self.fields if field not in usable]

    def _prompt(self, path: Path) -> Template:
        if not path.is_file():
            raise UserError(f"there is no prompt {path}")
        prompt = Template(path.read_text(encoding="utf-8").strip())
        if unknown := set(prompt.get_identifiers()) - set(self.words):
            raise UserError(f"{path}: {self.name} cannot fill in ${min(unknown)}")
        return prompt


class Captions(TextStep):
    """A caption of each frame (`ofa`), and one of all frames together (`mplug`)."""

    name = "captions"
    fields = ("ofa", "mplug")

    def messages(self, entry: Entry) -> dict[str, list[Message]]:
        frames = entry.places(self.root, "video")[1]
        try:
            VIDEO.decode(frames)
        except DecodeError as error:
            raise Unmade("no readable frames", f"{error}; generate frames makes them") from error
        data = [base64.b64encode(path.read_bytes()).decode() for path in frames]
        pictures = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{each}"}} for each in data]
        frame, clip = ({"type": "text", "text": prompt.safe_substitute()} for prompt in self.prompts.values())
        return {"ofa": [[picture, frame] for picture in pictures], "mplug": [[*pictures, clip]]}


class Polish(TextStep):
    """A better caption (`polish_mplug`) and one of what may be heard (`sound_mplug`), from the title and captions."""

    name = "polish"
    fields = ("polish_mplug", "sound_mplug")
    words = ("title", "frames", "clip")

    def messages(self, entry: Entry) -> dict[str, list[Message]]:
        known = clean_captions({field: entry.fields.get(field) for field in ("raw", *Captions.fields)})
        if not known.keys() >= set(Captions.fields):
            raise Unmade("no captions", f"{entry.id} lacks ofa or mplug: run generate captions first")
        title, *captions = ("\n".join(texts_of(known.get(field))) for field in ("raw", *Captions.fields))
        words = dict(zip(self.words, [clean_title(title) or "(none)", *captions], strict=True))
        return {field: [prompt.safe_substitute(words)] for field, prompt in self.prompts.items()}
