"""The page in a real browser, and its server under requests that it should refuse."""

import http.server
import io
import re
import shutil
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from app_server import MODELS, PageServer
from helpers import ROOT
from PIL import Image
from report_world import browser_program

import languagebind
from languagebind.app import functions
from languagebind.app.__main__ import main, read_users
from languagebind.app.page import build
from languagebind.config import UserError
from languagebind.index import Index, IndexOptions, make_index

TEXTS = ["a dog barks", "a room with a sofa", "<b>rain</b>"]
LIMIT = 2  # megabytes


@pytest.fixture(scope="module")
def media(files):
    """A file of each modality."""
    return {name: Path(files[model][0]) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def media_index(toys, media, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    models = [str(toys / model) for model in MODELS.values()]
    make_index(IndexOptions(media["audio"].parent, folder, tuple(models)))
    return folder


@pytest.fixture(scope="module")
def server(toys, media_index):
    models = [str(toys / model) for model in MODELS.values()]
    options = f"--index={media_index}", f"--max-upload-mb={LIMIT}"
    with PageServer(*models, *options) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=browser_program(), args=["--no-sandbox"])
        yield program
        program.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; fails if it asks another host for anything, or logs an error."""
    address, faults, pages = server.address, [], []

    def opened(query="", width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        ours = (f"{address}/", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(ours) else faults.append(request.url))
        page.goto(f"{address}/{query}")
        page.wait_for_selector("#file-depth input[type=file]", state="attached")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert not faults


def upload(page, name, path):
    page.set_input_files(f"#file-{name} input[type=file]", path)
    page.wait_for_selector(f"#similarity_{name} td")


def rows(page, selector):
    """The cells of a table's rows, without its head."""
    return [row.locator("td").all_inner_texts() for row in page.locator(f"{selector} tr:has(td)").all()]


def test_a_file_of_each_modality_is_compared_with_texts(visit, media, toys):
    page, models = visit(), languagebind.load({name: toys / model for name, model in MODELS.items()})
    page.get_by_label("Texts, one a line").first.fill("\n".join(TEXTS))
    for name, path in media.items():
        upload(page, name, path)
        features, texts = models.encode(**{name: [path]}), models.encode(text=TEXTS, of=name)
        shares = models.similarity(features, texts, calibrated=name)[0].softmax(dim=0)
        cosines = (features @ texts.T)[0]
        expected = [
            [TEXTS[k], f"{100 * shares[k]:.1f} %", f"{cosines[k]:.3f}"] for k in shares.argsort(descending=True)
        ]
        assert [[cell.strip() for cell in row] for row in rows(page, f"#similarity_{name}")] == expected
        picture = page.locator(f"#similarity_{name} img")
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 0


def test_an_example_of_each_modality_of_the_demo_is_picked(browser, toys, media, tmp_path):
    from languagebind.app import functions, page

    examples = {name: [tmp_path / f"one of {name}{path.suffix}"] for name, path in media.items()}
    for name, (path,) in examples.items():
        shutil.copy(media[name], path)
    models = functions.load_models([str(toys / model) for model in MODELS.values()])
    built = page.build(models, examples)
    _, url, _ = built.launch(prevent_thread_lock=True, quiet=True, **page.STYLE)
    shown = browser.new_page()
    shown.goto(url)
    for name in examples:
        shown.get_by_role("button", name=f"one of {name}", exact=True).click()
        shown.wait_for_selector(f"#similarity_{name} td")
    shown.close()
    built.close()


def test_the_index_is_searched_by_text(visit, toys, media_index):
    page = visit()
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Text", exact=True).fill("a dog barks")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("#search .hits")
    models = languagebind.load(*(toys / model for model in MODELS.values()))
    found = Index(media_index, models).search("a dog barks", top=8)
    assert page.locator("#search h3").all_inner_texts() == [name.capitalize() for name in found]
    expected = [f"{hit.score:.3f} · {Path(hit.path).name}" for own in found.values() for hit in own]
    shown = page.locator("#search figcaption").all_inner_texts()
    assert [" · ".join(caption.split(" · ")[:2]) for caption in shown] == expected
    assert page.locator("#search img").evaluate_all("all => all.every(image => image.naturalWidth > 0)")


def test_a_phone_shows_the_page_without_scrolling_sideways(visit, media):
    page = visit(width=400)
    page.get_by_label("Texts, one a line").first.fill("\n".join([*TEXTS, "unbroken" * 40]))
    for name in ("audio", "depth"):
        upload(page, name, media[name])
    tabs = page.get_by_role("tab")
    for number in range(tabs.count()):
        tabs.nth(number).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, tabs.nth(number).inner_text()


def test_in_the_dark_texts_are_light(visit, media):
    page = visit("?__theme=dark")
    page.get_by_label("Texts, one a line").first.fill("\n".join(TEXTS))
    upload(page, "audio", media["audio"])
    colour = "([selector, kind]) => getComputedStyle(document.querySelector(selector))[kind]"

    def brightness(selector, kind):
        return np.mean([float(x) for x in page.evaluate(colour, [selector, kind]).strip("rgba()").split(",")[:3]])

    assert np.mean(Image.open(io.BytesIO(page.screenshot()))) < 60
    for selector in ("#similarity_audio td", "#similarity_audio th", "#similarity_audio figcaption"):
        assert brightness(selector, "color") > 120, selector


def test_the_page_says_how_large_files_may_be(visit, tmp_path):
    page = visit()
    assert f"Files may have {LIMIT} MB" in page.inner_text("body")
    (tmp_path / "room.png").write_bytes(bytes(LIMIT * 2**20 + 1))
    page.set_input_files("#file-depth input[type=file]", tmp_path / "room.png")
    assert "exceed" in page.locator(".toast-body").inner_text()


def test_a_damaged_file_is_a_sentence_on_the_page(visit, tmp_path):
    page = visit()
    page.get_by_label("Texts, one a line").first.fill("a room")
    (tmp_path / "room.png").write_bytes(b"no picture")
    page.set_input_files("#file-depth input[type=file]", tmp_path / "room.png")
    sentence = page.locator(".toast-body").inner_text()
    assert "room.png: " in sentence
    assert "Traceback" not in page.inner_text("body")


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.address, timeout=60) as client:
        yield client


@pytest.fixture
def other():
    """The address of a second server, and the requests that it got."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            got.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", got
        listening.shutdown()


def ask(client, endpoint, *values):
    """What a function of the page answers, as the text of its events."""
    done = client.post(f"/gradio_api/call/{endpoint}", json={"data": values})
    assert done.is_success, done.text
    return client.get(f"/gradio_api/call/{endpoint}/{done.json()['event_id']}").text


def file_data(path, **more):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def test_an_upload_stays_in_the_servers_own_folder_and_can_be_fetched(client, server, media):
    name = "../../../../room.png"
    (path,) = client.post("/gradio_api/upload", files={"files": (name, media["depth"].read_bytes())}).json()
    assert Path(path).is_relative_to(server.uploads)
    assert Path(path).name == "room.png"
    assert client.get(f"/gradio_api/file={path}").content == media["depth"].read_bytes()
    assert '"cosines"' in ask(client, "similarity_depth", file_data(path), "a room", "", "")


def test_an_upload_above_the_limit_is_refused(client, server):
    done = client.post("/gradio_api/upload", files={"files": ("room.png", bytes(LIMIT * 2**20 + 1))})
    assert done.status_code == 413
    assert "exceeded maximum allowed size" in done.text


@pytest.mark.parametrize(
    "address",
    ["file={secret}", "file=../../../{secret}", "file=%2e%2e/%2e%2e{secret}", "file=file://{secret}", "file/{secret}",
     "file={uploads}/../../secret.txt", "file={uploads}/%2e%2e/%2e%2e/secret.txt"],
)  # fmt: skip
def test_other_files_cannot_be_fetched(client, server, address):
    secret = server.uploads.parent.parent / "secret.txt"
    secret.write_text("a secret")
    where = address.format(secret=secret, uploads=server.uploads)
    done = client.get(httpx.URL(f"{server.address}/gradio_api/{where}"))
    assert done.status_code in (403, 404)
    assert "a secret" not in done.text


def test_other_files_cannot_be_compared(client, server, media):
    for path in (media["depth"], media["depth"].as_uri(), f"{server.uploads}/../../../..{media['depth']}"):
        answer = ask(client, "similarity_depth", file_data(path), "a room", "", "")
        assert answer.startswith("event: error")
        assert '"cosines"' not in answer


@pytest.mark.parametrize("host", [None, "https://huggingface.co", "http://192.0.2.1"])  # our own, and known to Gradio
def test_the_server_downloads_nothing(client, other, host):
    address = f"{host or other[0]}/room.png"
    for name in MODELS:
        for value in (file_data(address), file_data("room.png", url=address), file_data("", url=address), address):
            assert ask(client, f"similarity_{name}", value, "a room", "", "").startswith("event: error")
    assert client.get(f"/gradio_api/file={address}").status_code == 403
    assert client.get(f"/gradio_api/proxy={address}").status_code in (400, 403)
    assert not other[1]


def test_the_examples_of_the_document_run(server, media, tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    for name, target in {"depth": "a.depth.png", "audio": "a.wav"}.items():
        shutil.copy(media[name], tmp_path / "samples" / target)
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "app.md").read_text(), re.DOTALL):
        exec(compile(example.replace("http://127.0.0.1:7860", server.address), "docs/app.md", "exec"), names)
    assert names["found"]["texts"] == ["a ball", "a room"]
    assert set(names["hits"]) == set(MODELS)


def test_what_gradio_offers_beside_the_page_is_off(client, server):
    for address in ("/monitoring", "/gradio_api/runs", "/gradio_api/run-history/buckets", "/gradio_api/vibe-code/"):
        assert client.get(address).status_code in (403, 404), address
    assert client.get("/config").json()["analytics_enabled"] is False
    with pytest.raises(httpx.ConnectError):  # this machine has the whole of 127.0.0.0/8
        httpx.get(server.address.replace("127.0.0.1", "127.0.0.2"))


def test_with_users_everything_but_the_login_is_closed(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "users").write_text("ann:a secret\n\nbob:b:c\n")
    built = build(functions.Models(languagebind.load(toys / "depth")))
    built.launch(auth=read_users(tmp_path / "users"), prevent_thread_lock=True, quiet=True)
    with httpx.Client(base_url=built.local_url) as client:
        (tmp_path / "uploads").mkdir(exist_ok=True)
        (tmp_path / "uploads" / "a.png").write_bytes(b"a")
        file = f"/gradio_api/file={tmp_path / 'uploads' / 'a.png'}"
        calls = "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/similarity_depth"
        assert [client.get(address).status_code for address in ("/config", file, "/gradio_api/info")] == [401] * 3
        assert [client.post(address, json={"data": []}).status_code for address in calls] == [401] * 3
        assert client.post("/login", data={"username": "ann", "password": "b:c"}).status_code == 400
        assert client.post("/login", data={"username": "bob", "password": "b:c"}).is_success
        assert client.get(file).content == b"a"
    built.close()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "nonsense.invalid"], "choose others"),
        (["--host", "::1"], "choose others"),
        (["--port", "70000"], "choose others"),
        (["--port", "0"], "at least 1"),
        (["--max-upload-mb", "-1"], "at least 1"),
    ],
)
def test_a_wrong_address_or_limit_is_refused_before_models_are_read(words, told, capsys):
    with pytest.raises((UserError, SystemExit)) as error:  # SystemExit: the parser has printed the message
        main(["model", *words])
    assert told in f"{error.value} {capsys.readouterr().err}"
