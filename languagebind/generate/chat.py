"""Ask a model: behind any OpenAI-compatible server (vLLM, `transformers serve`), or of transformers in this process."""

import json
import os
import re
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import UserError, at_least, first_line
from ..data.vidal import caption_fault
from ..distributed import own_device
from .models import HubModel

Question = str | list[dict[str, Any]]  # a user's message in OpenAI's format: a text, or a list of pictures and texts
ASKS = 3  # times that a question is asked until the answer can be used
WARMER = 0.7  # temperature after the first time: at 0, the same answer would come again

_THOUGHTS = re.compile(r"(?s)^.*</think>")
_QUOTED = re.compile(r'["“]([^"“”]*)["”]')
_REFUSAL = re.compile(
    r"(?i)\W*((i['’]?m|i am) (sorry|unable|not able)|sorry,|i apologi[sz]e|as an ai\b|unfortunately, i\b"
    r"|i (can['’]?t|cannot|can not) (\w+ )?(assist|describe|determine|help|provide|see|view)\b)"
)


@dataclass(frozen=True)
class ChatOptions:
    """The model that writes, and how it is asked."""

    endpoint: str | None = None
    """URL of an OpenAI-compatible server, such as http://localhost:8000/v1; its key, if it needs one, is read from the
    environment variable OPENAI_API_KEY of each worker"""
    api_model: str | None = None
    """name of the model at the endpoint"""
    model: str | None = None
    """in place of an endpoint, a model of transformers, name or folder, which each worker loads"""
    revision: str | None = None
    """revision of --model"""
    device: str | None = None
    """device of --model; None: a GPU if there is one. Under torchrun, each rank uses its own"""
    prompts: Path | None = None
    """folder with this step's prompts; None: those of the package, languagebind/generate/prompts"""
    max_tokens: int = 200
    """longest answer in tokens; answers that are cut off are asked for again"""
    longest: int = 500
    """longest answer in characters"""
    seed: int = 0
    """seed of answers that are drawn because the first one, at temperature 0, is empty, a refusal or too long"""
    extra: str = "{}"
    """JSON object of further fields of each request, such as {"chat_template_kwargs": {"enable_thinking": false}}, the
    only one that --model heeds"""
    concurrency: int = 8
    """requests in flight of each worker, one for each entry of its batch"""
    requests_per_minute: float | None = None
    """limit of each worker"""
    timeout: float = 120.0
    """seconds without an answer after which a request has failed"""
    tries: int = 8
    """times that a request is sent while the server is busy, hangs or is away; the wait doubles from 0.5 s to 8 s, or
    is what the server asks for"""

    def __post_init__(self):
        at_least(1, max_tokens=self.max_tokens, longest=self.longest, concurrency=self.concurrency, tries=self.tries)
        at_least(0.001, requests_per_minute=self.requests_per_minute, timeout=self.timeout)
        if bool(self.endpoint) != bool(self.api_model) or bool(self.endpoint) == bool(self.model):
            raise UserError("pass --endpoint URL and --api-model NAME, or --model NAME alone")
        try:
            dict(json.loads(self.extra))
        except (ValueError, TypeError) as error:
            raise UserError(f"--extra should be a JSON object, got {self.extra}") from error


class Answer(NamedTuple):
    """What a model wrote, and why it cannot be used, if so."""

    text: str
    fault: str | None = None


class Unanswered(Exception):
    """Raised with the reason and details if there is no answer that can be used."""


def ask(model: "Endpoint | Local", question: Question) -> str:
    """Return the answer to a question. Raises `Unanswered` if there is none that can be used."""
    for number in range(ASKS):
        answer = model(question, model.options.seed + number, WARMER if number else 0.0)
        text, fault = judged(answer, model.options.longest)
        if fault is None:
            return text
    raise Unanswered(fault, f"{text[:80]!r}")


def judged(answer: Answer, longest: int) -> Answer:
    """Return an answer as a caption, without thoughts, line breaks and quotation marks around it; and its fault."""
    text = " ".join(_THOUGHTS.sub("", answer.text).split())
    text = found[1] if (found := _QUOTED.fullmatch(text)) else text
    empty = "empty answer" if caption_fault(text) else None
    refusal = "refusal" if _REFUSAL.match(text) else None
    return Answer(text, answer.fault or empty or refusal or ("long answer" if len(text) > longest else None))


class Endpoint:
    """An OpenAI-compatible server. Threads may call it at once."""

    def __init__(self, options: ChatOptions):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UserError("--endpoint needs the package openai: pip install 'languagebind[generate]'") from error
        self.options, self.at_once = options, options.concurrency
        self.lock, self.turn = threading.Lock(), 0.0
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key"
        where = {"base_url": options.endpoint, "api_key": self.key}
        self.client: Any = OpenAI(**where, timeout=options.timeout, max_retries=options.tries - 1)

    def record(self) -> dict[str, Any]:
        """Return what answers depend on. Where the server is does not matter."""
        return {"model": self.options.api_model}

    def __call__(self, question: Question, seed: int, temperature: float) -> Answer:
        """Return the answer. Raises `UserError` if the server is away or refuses every request."""
        import openai

        self._wait_for_turn()
        try:
            reply = self.client.chat.completions.create(
                model=self.options.api_model, messages=[{"role": "user", "content": question}], seed=seed,
                max_tokens=self.options.max_tokens, temperature=temperature, extra_body=json.loads(self.options.extra),
            )  # fmt: skip
            choice = reply.choices[0]
            message, reason = choice.message, choice.finish_reason
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            advice = "check --endpoint, --api-model and OPENAI_API_KEY"
            raise UserError(f"{self.options.endpoint} refuses requests ({self._said(error)}): {advice}") from error
        except (openai.APITimeoutError, openai.RateLimitError, openai.InternalServerError) as error:
            raise Unanswered("no answer", self._said(error)) from error
        except openai.APIConnectionError as error:
            problem = f"nothing answers at {self.options.endpoint} ({error.__cause__})"
            raise UserError(f"{problem}: start the server and run this again") from error
        except openai.APIError as error:
            raise Unanswered("refused request", self._said(error)) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unanswered("no answer", f"it is not a chat completion: {first_line(error)}") from error
        refusal = "refusal" if message.refusal or reason == "content_filter" else None
        return Answer(message.content or "", "answer cut off" if reason == "length" else refusal)

    def _said(self, error: Any) -> str:
        """Return what the server says, in which it may repeat the key."""
        reply = getattr(error, "response", None)
        said = f"{reply.status_code} {' '.join(reply.text.split())}" if reply is not None else first_line(error)
        return said.replace(self.key, "[key]")[:300]

    def _wait_for_turn(self) -> None:
        """Sleep until the limit of requests per minute allows one more."""
        if self.options.requests_per_minute:
            with self.lock:
                turn = self.turn = max(self.turn + 60 / self.options.requests_per_minute, time.monotonic())
            time.sleep(max(0.0, turn - time.monotonic()))


class Local:
    """A model of transformers that reads pictures and texts, or texts alone. One thread may call it."""

    at_once = 1

    def __init__(self, options: ChatOptions):
        self.options, self.template = options, json.loads(options.extra).get("chat_template_kwargs", {})
        self.hub = HubModel(str(options.model), options.revision)

    def record(self) -> dict[str, Any]:
        """Return what answers depend on."""
        return self.hub.record()

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its processor, or its tokenizer if it reads texts alone."""
        import transformers as hf
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

        kinds: Any = (hf.AutoModelForCausalLM, hf.AutoTokenizer), (hf.AutoModelForImageTextToText, hf.AutoProcessor)
        kind, reader = kinds[self.hub.config.get("model_type") in SEEING]
        model = self.hub.load(kind, own_device(self.options.device), None)
        return model, reader.from_pretrained(self.hub.found, **self.hub.hub)

    def __call__(self, question: Question, seed: int, temperature: float) -> Answer:
        """Return the answer of the model's pipeline, which does not tell whether it was cut off."""
        model, processor = self.loaded
        if not isinstance(question, str) and not hasattr(processor, "image_processor"):
            raise UserError(f"--model {self.options.model} does not read pictures")
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", **self.template,
        )  # fmt: skip
        inputs = {k: x.to(model.device, model.dtype if x.is_floating_point() else None) for k, x in inputs.items()}
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        torch.manual_seed(seed)
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=self.options.max_tokens, **drawn)
        tokens = made[0, inputs["input_ids"].shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        cut = len(tokens) == self.options.max_tokens and tokens[-1] not in (end if isinstance(end, list) else [end])
        return Answer(processor.decode(tokens, skip_special_tokens=True), "answer cut off" if cut else None)
