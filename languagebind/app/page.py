"""The page: what Gradio shows, and the same functions as an API with names."""

import html
import logging
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import HTTPException
from gradio import processing_utils, routes

from ..config import UserError, first_line
from ..modalities import DecodeError
from . import functions as do
from .drawing import data_uri

log = logging.getLogger(__name__)

AT_ONCE = 1  # requests that decode and encode at the same time, which bounds the memory; others wait in the queue
CSS = """
.lb img {width: 100%; max-height: 20rem; object-fit: contain; image-rendering: pixelated; border-radius: 4px}
.lb figcaption, .lb .note, .lb .text {overflow-wrap: anywhere}
.lb figcaption {font-size: .8rem; opacity: .8; margin: .2rem 0 .6rem}
.lb figure {margin: 0}
.lb table {width: 100%; border-collapse: collapse; font-size: .9rem; margin: 0}
.lb th, .lb td {padding: .25rem .4rem; border: 0; text-align: right; vertical-align: top; white-space: nowrap}
.lb th:first-child, .lb td:first-child {text-align: left; white-space: normal; padding-left: 0}
.lb td {border-top: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums}
.lb .bar {height: 4px; margin-top: .2rem; border-radius: 2px; background: var(--color-accent); min-width: 1px}
.lb .note {font-size: .85rem; margin-top: .6rem; padding: .4rem .6rem; border-left: 3px solid #d97706}
"""
THEME = gr.themes.Default(font="system-ui", font_mono="monospace")


def file_input(name: str) -> Any:
    """Return the input for a file of a modality: Gradio's own for sounds, clips and pictures, where one can record."""
    shown: dict[str, Any] = {"label": name.capitalize(), "elem_id": f"file-{name}"}
    if name == "audio":
        return gr.Audio(type="filepath", sources=["upload", "microphone"], **shown)
    if name == "video":
        return gr.Video(sources=["upload", "webcam"], height=240, **shown)
    if name == "image":
        picture = gr.Image(sources=["upload", "webcam", "clipboard"], **shown)
        picture.preprocess = lambda payload: payload and payload.path  # the file as it is, however damaged
        return picture
    return gr.File(height=140, **shown)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn every exception into a sentence on the page. The log has the traceback of those that nobody expects."""

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except DecodeError as error:
            message = f"{Path(error.source).name}: {error.reason}"
        except UserError as error:
            message = first_line(error)
        except Exception as error:
            log.exception("a request failed")
            message = first_line(error) if isinstance(error, ValueError) else "the request failed; the log says why"
        raise gr.Error(html.escape(message), duration=20, print_exception=False)

    return call


def refuse_addresses() -> None:
    """Keep Gradio's server from downloading what a request names: it reads uploads, and asks no other server."""

    async def refuse_input(*_: Any, **__: Any) -> Any:
        raise gr.Error("the server does not download files: upload them", print_exception=False)

    async def refuse_file(*_: Any, **__: Any) -> Any:
        raise HTTPException(403, "the server does not download files")

    for module, name, refuse in (
        (processing_utils, "async_ssrf_protected_download", refuse_input),
        (routes, "secure_url_stream_response", refuse_file),
    ):
        getattr(module, name)  # an error if another version of Gradio has no such function
        setattr(module, name, refuse)


def build(models: do.Models, examples: Sequence[Any] = ()) -> gr.Blocks:
    """Return the page of some models. An example has `path`, `modality` and `texts`."""
    refuse_addresses()
    with gr.Blocks(title="LanguageBind", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.Markdown("# LanguageBind\nCompare files with texts, and with each other.")
        with gr.Tab("Similarity"):
            _similarity_tab(models, examples)
        _api(models)
    return page.queue(max_size=64, default_concurrency_limit=AT_ONCE)


def listen(listener: Any, function: Callable[..., Any], inputs: Any, outputs: Any, api_name: str = "") -> None:
    """Run a function of the page in the one queue of all. With an `api_name`, it is public, as an API."""
    listener(
        told(function), inputs, outputs, api_name=api_name or None, api_visibility="public" if api_name else "private",
        concurrency_limit=AT_ONCE, concurrency_id="encoders",
    )  # fmt: skip


def _similarity_tab(models: do.Models, examples: Sequence[Any]) -> None:
    shown = dict.fromkeys(text for example in examples for text in example.texts[:2])
    with gr.Row(equal_height=True):
        texts = gr.Textbox("\n".join(shown), label="texts, one a line", lines=4, scale=4)
        button = gr.Button("Compare", variant="primary", scale=1, min_width=120)
    with gr.Row():
        for name in models.encoders.modalities:
            with gr.Column(min_width=300):
                file = file_input(name)
                if own := [[str(x.path), "\n".join(x.texts)] for x in examples if x.modality == name]:
                    names = [Path(path).stem for path, _ in own]
                    gr.Examples(own, [file, texts], example_labels=names, label="examples", api_visibility="private")
                result = gr.HTML(elem_classes="lb", elem_id=f"similarity-{name}")
                listen(
                    partial(gr.on, [file.change, button.click]), partial(_column, models, name), [file, texts], result
                )


def _column(models: do.Models, name: str, file: str | None, texts: str) -> str:
    """Return what a column shows of a file: its picture and its texts, the best one first."""
    if not file:
        return ""
    own = do.view(models.encoders, name, file)
    found = do.rate(models, name, own.feature, do.lines(texts))
    return shown_view(own) + rated(found)


def shown_view(own: do.View) -> str:
    """Return the picture of a file, with what its colours mean below it."""
    picture, meaning = data_uri(own.picture), html.escape(own.meaning)
    return f'<figure><img src="{picture}" alt=""><figcaption>{meaning}</figcaption></figure>'


def rated(found: dict[str, Any]) -> str:
    """Return a table of the texts of `functions.rate`, the best one first, and the note."""
    rows = sorted(zip(found["probabilities"], found["cosines"], found["texts"], strict=True), reverse=True)
    body = "".join(
        f'<tr><td class="text">{html.escape(text)}<div class="bar" style="width:{100 * share:.1f}%"></div></td>'
        f"<td>{100 * share:.1f} %</td><td>{cosine:.3f}</td></tr>"
        for share, cosine, text in rows
    )
    note = f'<div class="note">{html.escape(found["note"])}</div>' if found["note"] else ""
    head = "<tr><th>text</th><th>probability</th><th>cosine</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{note}"


def _api(models: do.Models) -> None:
    """Add the functions for programs, which a page does not show: see `gradio_client`."""

    def similarity(file: str, modality: str, texts: str) -> dict[str, Any]:
        """Compare a file of a modality with texts, one a line.

        Returns the texts, their probabilities (calibrated, they add up to 1) and cosines, and a note on how to read
        them, which is empty if every text resembles a caption of the encoder's training.
        """
        own = do.view(models.encoders, modality, file)
        return do.rate(models, modality, own.feature, do.lines(texts))

    with gr.Column(visible=False):
        file, modality, texts = gr.File(label="file"), gr.Textbox(label="modality"), gr.Textbox(label="texts")
        listen(gr.Button().click, similarity, [file, modality, texts], gr.JSON(), "similarity")
