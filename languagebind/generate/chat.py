"""Ask a model: on an OpenAI-compatible server (vLLM, `transformers serve`), or of transformers in this process."""

import os
import re
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, at_least, first_line, package
from ..data.vidal import LONGEST, caption_fault
from ..distributed import own_device
from .models import EXTRA, HubModel
from .steps import Unmade

Message = str | list[dict[str, Any]]  # its content in OpenAI's format: a text, or a list of pictures and texts
Answer = tuple[str, bool]  # a text, and whether it was cut off
TEMPERATURES = (0.0, 0.7, 0.7)  # of the tries until an answer can be used; at 0, the same answer would come again
REFUSED = re.compile(r"(?i)\W*(sorry,|i apolog|as an ai |i(['’]| a)m (sorry|unable|not )|i can(['’]t|not| not) )").match


@dataclass(frozen=True)
class ChatOptions:
    """The model, and how it is asked."""

    endpoint: str | None = None
    """URL of an OpenAI-compatible server; workers read its key, if any, from the variable OPENAI_API_KEY"""
    api_model: str | None = None
    """name of the model at the endpoint"""
    model: str | None = None
    """in place of an endpoint, a transformers model that each worker loads: a folder or hub id"""
    prompts: Path = Path(__file__).parent / "prompts"
    """folder with the prompt of each field, such as ofa.txt"""
    max_tokens: int = 128
    """maximum tokens of an answer; one that is cut off there is not used"""
    thinking: bool = False
    """let the model think first; by default, models such as Qwen3 are told not to, in a way that some servers refuse"""
    concurrency: int = 8
    """requests that a worker sends at once, at most one for each entry of its batch"""
    requests_per_minute: float | None = None
    """limit of each worker"""
    timeout: float = 120.0
    """seconds without an answer after which a request is sent again"""
    tries: int = 8
    """times to send a request while the server is busy, hangs or is away, up to 8 s apart or as the server asks"""

    def __post_init__(self):
        at_least(1, max_tokens=self.max_tokens, concurrency=self.concurrency, tries=self.tries, timeout=self.timeout)
        if bool(self.endpoint) != bool(self.api_model) or bool(self.endpoint) == bool(self.model):
            raise UserError("pass --endpoint URL and --api-model NAME, or --model NAME alone")


def ask(model: "Endpoint | Local", message: Message) -> str:
    """Return an answer, without thoughts and enclosing quotation marks. Raises `Unmade` if none can be used."""
    chat = [{"role": "user", "content": message}]
    for seed, temperature in enumerate(TEMPERATURES):
        answer, cut = model(chat, seed, temperature)
        text = re.sub(r'^["“]([^"“”]*)["”]$', r"\1", " ".join(answer.rpartition("</think>")[2].split()))
        cut |= len(text) > LONGEST  # of a server that ignores the limit
        fault = "too long" if cut else "empty answer" if caption_fault(text) else "refusal" if REFUSED(text) else None
        if fault is None:
            return text
    raise Unmade(fault, repr(text[:80]))


class Endpoint:
    """An OpenAI-compatible server, for several threads. Raises `UserError` if it is away or refuses every request."""

    def __init__(self, options: ChatOptions):
        openai = package("openai", "--endpoint", EXTRA)
        self.options, self.at_once, self.openai = options, options.concurrency, openai
        self.lock, self.turn = threading.Lock(), 0.0  # of the next request
        key = os.environ.get("OPENAI_API_KEY") or "no-key"
        patience: dict[str, Any] = {"timeout": options.timeout, "max_retries": options.tries - 1}
        self.client: Any = openai.OpenAI(base_url=options.endpoint, api_key=key, **patience)

    def record(self) -> dict[str, Any]:
        return {"model": self.options.api_model}  # wherever the server is

    def __call__(self, chat: list[dict[str, Any]], seed: int, temperature: float) -> Answer:
        with self.lock:
            time.sleep(max(0.0, self.turn - time.monotonic()))
            self.turn = time.monotonic() + 60 / (self.options.requests_per_minute or float("inf"))
        extra = None if self.options.thinking else {"chat_template_kwargs": {"enable_thinking": False}}
        how = {"max_tokens": self.options.max_tokens, "seed": seed, "temperature": temperature, "extra_body": extra}
        try:
            reply = self.client.chat.completions.create(model=self.options.api_model, messages=chat, **how)
            text = str.strip(reply.choices[0].message.content or "")  # raises TypeError for lists of parts
            return text, reply.choices[0].finish_reason == "length"
        except self.openai.APIError as error:
            said = first_line(error).replace(self.client.api_key, "[key]")[:300]  # a server may repeat the key
            away = type(error) is self.openai.APIConnectionError  # and not a timeout, which is a subclass
            if away or getattr(error, "status_code", None) in (401, 403, 404):
                raise UserError(f"cannot use --endpoint ({said}): check it, --api-model and OPENAI_API_KEY") from None
            raise Unmade("no answer", said) from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Unmade("no answer", f"not a chat completion: {first_line(error)}") from error


class Local(HubModel):
    """A model of transformers. Raises `UserError` for pictures if it reads only text."""

    def __init__(self, options: ChatOptions):
        super().__init__(str(options.model))
        self.options, self.at_once = options, 1

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model, and its processor or tokenizer."""
        import transformers as hf
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

        kinds: Any = (hf.AutoModelForCausalLM, hf.AutoTokenizer), (hf.AutoModelForImageTextToText, hf.AutoProcessor)
        kind, reader = kinds[self.config.get("model_type") in SEEING]
        return self.load(kind, reader, own_device())

    def __call__(self, chat: list[dict[str, Any]], seed: int, temperature: float) -> Answer:
        model, reader = self.loaded
        if not isinstance(chat[0]["content"], str) and not hasattr(reader, "image_processor"):
            raise UserError(f"--model {self.name} does not read pictures")
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = reader.apply_chat_template(chat, **how, enable_thinking=self.options.thinking)
        inputs = {k: x.to(model.device, model.dtype if x.is_floating_point() else None) for k, x in inputs.items()}
        torch.manual_seed(seed)
        limit, drawn = self.options.max_tokens, {"do_sample": temperature > 0, "temperature": temperature or 1.0}
        tokens = model.generate(**inputs, max_new_tokens=limit, **drawn)[0, inputs["input_ids"].shape[1] :]
        return reader.decode(tokens, skip_special_tokens=True), len(tokens) >= limit
