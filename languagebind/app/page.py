"""The page. Each of its functions is an endpoint with a name, too, for programs: see `gradio_client`."""

import html
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
from gradio import processing_utils
from gradio.utils import get_upload_folder
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from ..config import UserError, first_line
from ..index import Index
from ..modalities import DecodeError
from . import functions as do

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
THEME = gr.themes.Default(font="system-ui", font_mono="monospace")
STYLE: Any = {"css_paths": TEMPLATES / "page.css", "theme": THEME}
FILES = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
DRAW = FILES.get_template("results.html").make_module({"zip": zip})  # functions from data to HTML
GUESS = "by name and content"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "queue": False}
LEVELS = "Colours fill the range of each pair of modalities, because their cosines differ in level. "
APART = "Cells with – are empty: these encoders were trained with different text towers, so they share no space."


def build(models: do.Models, examples: Mapping[str, Any] = {}, index: Index | None = None, note: str = "") -> gr.Blocks:
    """Return the page of some models, with a note at its top. Examples have the names of their classes."""
    # Gradio would download whatever address a request names, whole and of any size
    processing_utils.async_transport = httpx.MockTransport(lambda _: httpx.Response(403))  # type: ignore[assignment]
    with gr.Blocks(title="LanguageBind", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        names = ", ".join(models.encoders.modalities)
        gr.Markdown(f"# LanguageBind\nCompare {names} and texts with each other. {note}")
        with gr.Tab("Similarity"):
            _similarity_tab(models, examples)
        with gr.Tab("Matrix"):
            _matrix_tab(models)
        if index:
            with gr.Tab("Search"):
                _search_tab(index)
        kinds = models.encoders.encoders.items()
        if stills := [name for name, (_, x) in kinds if hasattr(x, "resize_mode") and x.input_shape[1] == 1]:
            with gr.Tab("Segmentation"):
                _segmentation_tab(models, stills)
    return page.queue(max_size=64)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn every exception into a sentence on the page. The log has the traceback of those that nobody expects."""

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            if any(isinstance(value, str) and len(value) > do.MOST_LETTERS for value in args):
                raise UserError(f"a text has more than {do.MOST_LETTERS} characters: shorten it")
            return function(*args)
        except Exception as error:
            if not isinstance(error, (UserError, DecodeError)):
                log.exception("a request failed")
            message = first_line(error) if isinstance(error, ValueError) else "the request failed; the log says why"
        message = re.sub(re.escape(get_upload_folder()) + "/[^/]*/", "", message)  # files by their names alone
        raise gr.Error(html.escape(message, quote=False), duration=20, print_exception=False)

    return call


def offer(name: str, triggers: list[Any], function: Callable[..., Any], inputs: list[Any], outputs: Any) -> Any:
    """Run a function of the page and of the API. Requests run one at a time, which bounds memory."""
    return gr.on(triggers, told(function), inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="models")


def offer_data(name: str, triggers: list[Any], function: Callable[..., Any], inputs: list[Any], draw: str) -> None:
    """Offer a function whose result is JSON; the page shows the HTML that a macro of the templates makes of it."""
    data, shown = gr.JSON(visible=False), gr.HTML(elem_classes="lb", elem_id=name)
    done = offer(name, triggers, function, inputs, data)
    done.success(lambda found: found and str(getattr(DRAW, draw)(found)), data, shown, **PRIVATE)
    done.failure(lambda: "", None, shown, **PRIVATE)


def file_input(name: str) -> Any:
    """Return the input for a file of a modality: for sounds, clips and pictures, that of Gradio which can record."""
    shown: Any = {"label": name.capitalize(), "elem_id": f"file-{name}"}
    if name == "audio":
        return gr.Audio(type="filepath", buttons=["download"], **shown)
    if name == "video":
        return gr.Video(buttons=["download"], **shown)
    if name == "image":
        picture: Any = gr.Image(type="filepath", buttons=["fullscreen"], **shown)
        picture.preprocess = lambda payload: payload and payload.path  # the file as it is, however damaged
        return picture
    return gr.File(height=140, **shown)


def texts_input(texts: Iterable[str] = ()) -> gr.Textbox:
    return gr.Textbox("\n".join(texts), label="Texts, one a line", lines=4, max_lines=12)


def modality_input(names: Sequence[str]) -> gr.Radio:
    return gr.Radio([(name.capitalize(), name) for name in names], value=names[0], label="Modality of the file")


def _similarity_tab(models: do.Models, examples: Mapping[str, list[Path]]) -> None:
    texts = texts_input(path.stem for own in examples.values() for path in own[:2])
    with gr.Accordion("Arithmetic: add a text to each file, or subtract one", open=False), gr.Row():
        plus, minus = gr.Textbox("", label="Plus"), gr.Textbox("", label="Minus")
    button = gr.Button("Compare", variant="primary")
    with gr.Row():
        for name in models.encoders.modalities:
            with gr.Column(min_width=280):
                file = file_input(name)
                if own := examples.get(name):
                    labels = [path.stem for path in own]
                    rows = [[str(path), "\n".join(labels)] for path in own]
                    gr.Examples(rows, [file, texts], example_labels=labels, label="Examples", api_visibility="private")
                triggers, inputs = [file.change, button.click], [file, texts, plus, minus]
                offer_data(f"similarity_{name}", triggers, _similarity(models, name), inputs, "rated")


def _similarity(models: do.Models, name: str) -> Callable[..., Any]:
    def similarity(file: str | None, texts: str, plus: str, minus: str) -> dict[str, Any] | None:
        """Compare a file, plus a text, minus another (both may be empty), with texts, one a line.

        Returns the texts with their probabilities, which are calibrated and add up to 1, and their cosines; a note on
        how to read them, empty if each text resembles a caption of the encoder's training; and the file's picture, a
        data URI, with the meaning of its colours.
        """
        if not file:
            return None
        (x, picture, meaning), words = do.view(models.encoders, name, file), do.lines(texts, least=0)
        found = do.rate(models, name, do.arithmetic(models.encoders, name, x, plus, minus), words) if words else {}
        return found | {"picture": do.data_uri(picture), "meaning": meaning}

    return similarity


def _matrix_tab(models: do.Models) -> None:
    names = models.encoders.modalities

    def matrix(texts: str, *files: list[str] | None) -> tuple[Image.Image, str, str]:
        """Compare all files and texts with each other, across modalities, too.

        Returns a picture of the cosines, a CSV file of them, and how to read them. Cells of modalities whose text
        towers differ are empty, because such encoders share no space.
        """
        chosen = [(name, file) for name, own in zip(names, files, strict=True) for file in own or ()]
        picture, table, whole = do.matrix(models.encoders, chosen, do.lines(texts, least=0))
        path = processing_utils.save_bytes_to_cache(table.encode(), "matrix.csv", sheet.GRADIO_CACHE)
        return picture, path, LEVELS + APART * (not whole)

    texts, button = texts_input(), gr.Button("Compare", variant="primary")
    with gr.Row():
        files = [gr.File(label=name.capitalize(), file_count="multiple", height=140, min_width=200) for name in names]
    buttons: Any = ["fullscreen", "download"]  # without Gradio's own, which would share it on the net
    picture = gr.Image(label="Cosines", format="png", elem_id="matrix", buttons=buttons, interactive=False)
    meaning, sheet = gr.Markdown(), gr.File(label="CSV", height=80)
    options = (inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names)
    first, _ = inspect.signature(matrix).parameters.values()
    matrix.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]  # names for the API
    offer("matrix", [button.click], matrix, [texts, *files], [picture, sheet, meaning])


def _search_tab(index: Index) -> None:
    def search(text: str, file: str | None, modality: str, weight: float, top: int) -> dict[str, list[dict[str, Any]]]:
        """Search the index by a text, by a file, or by both, of which the text has a weight from 0 to 1.

        Returns by modality the best files: the path below the indexed folder, cosine, start and end in seconds within a
        long sound or video, and a picture as a data URI.
        """
        kind = None if modality == GUESS else modality
        found = index.search(text or "", file, kind, weight, top=min(int(top or 8), do.MOST_TEXTS))
        return {name: [do.shown_hit(index, hit) for hit in own] for name, own in found.items()}

    names = index.encoders.modalities
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(label="Text")
            weight = gr.Slider(0, 1, 0.5, label="Weight of the text, if there is a file, too")
            top = gr.Number(8, label="Results of each modality", minimum=1, precision=0)
        with gr.Column():
            file = gr.File(label="File", height=140)
            modality = modality_input([GUESS, *names])
    button = gr.Button("Search", variant="primary")
    offer_data("search", [button.click, text.submit], search, [text, file, modality, weight, top], "hits")


def _segmentation_tab(models: do.Models, names: list[str]) -> None:
    def segment(file: str | None, modality: str, texts: str) -> dict[str, Any]:
        """Find the best of some texts, one a line, for each pixel of a picture.

        Returns each text's colour and share of the picture; the picture with these colours over it; and as `classes`, a
        PNG of the texts' numbers, from 0. Pictures are data URIs.
        """
        if not file:
            raise UserError("choose a file first")
        return do.segment(models.encoders, modality, file, do.lines(texts))

    with gr.Row():
        with gr.Column():
            file = gr.File(label="File", height=140)
            modality = modality_input(names)
            texts, button = texts_input(), gr.Button("Segment", variant="primary")
        with gr.Column():
            offer_data("segment", [button.click], segment, [file, modality, texts], "segmented")
