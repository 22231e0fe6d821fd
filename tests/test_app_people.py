"""Four people use the page at once: each gets the answers to what they sent, and the server's memory comes back."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import psutil
import pytest
import soundfile
from app_server import MODELS, PageServer
from helpers import call
from PIL import Image

import languagebind

PEOPLE, ROUNDS, SESSIONS = 4, 2, 4
MOST_AFTER = 50  # MB that may be held more than after the first session


def write_files(folder, rng):
    """A file of each modality, of the size that people have: 9 megapixels, 30 s of sound, 4 s of 720p."""
    folder.mkdir(parents=True)
    pixels = np.kron(rng.integers(0, 255, (60, 45, 3), np.uint8), np.ones((50, 70, 1), np.uint8))
    paths = {name: folder / f"own.{name}.jpg" for name in ("image", "infrared")}
    for path in paths.values():
        Image.fromarray(pixels).save(path)
    paths |= {"depth": folder / "own.depth.png", "audio": folder / "own.wav", "video": folder / "own.mp4"}
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 30 + 500).save(paths["depth"])
    soundfile.write(paths["audio"], rng.normal(size=(48000 * 30, 2)) / 10, 48000)
    with av.open(str(paths["video"]), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for _ in range(100):
            frame = np.kron(rng.integers(0, 255, (9, 16, 3), np.uint8), np.ones((80, 80, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return paths


@pytest.mark.slow
def test_four_people_get_their_own_answers_and_memory_comes_back(toys, tmp_path):
    from gradio_client import Client, handle_file

    people = [write_files(tmp_path / "media" / f"person{k}", np.random.default_rng(k)) for k in range(PEOPLE)]
    sources = [str(toys / name) for name in MODELS.values()]
    call("-m", "languagebind.index", str(tmp_path / "media"), "--model", *sources, f"--output={tmp_path / 'index'}")
    models = languagebind.load(*sources)
    texts = [f"texts of person {k}\nand a dog" for k in range(PEOPLE)]
    with PageServer(*sources, f"--index={tmp_path / 'index'}") as server:
        process, peak, stop = psutil.Process(server.process.pid), [], threading.Event()

        def held():
            return process.memory_info().rss / 2**20

        def watch():
            while not stop.wait(0.05):
                peak.append(held())

        def person(number):
            client = Client(server.address, verbose=False)
            own, lines = people[number], texts[number]
            for _ in range(ROUNDS):
                for name, path in own.items():
                    found = client.predict(handle_file(path), lines, api_name=f"/similarity_{name}")
                    expected = models.encode(**{name: [path]}) @ models.encode(text=lines.splitlines(), of=name).T
                    assert found["texts"] == lines.splitlines()
                    np.testing.assert_allclose(found["cosines"], expected[0], atol=2e-4)
                hits = client.predict("", handle_file(own["depth"]), "depth", 0.5, 1, api_name="/search")
                assert hits["depth"][0]["file"] == f"person{number}/own.depth.png"
                assert hits["depth"][0]["score"] > 0.999

        def all_at_once():
            with ThreadPoolExecutor(PEOPLE) as pool:
                list(pool.map(person, range(PEOPLE)))
            time.sleep(3)
            return held()

        threading.Thread(target=watch, daemon=True).start()
        start, begin = held(), time.monotonic()
        levels = [all_at_once() for _ in range(SESSIONS)]  # the first also has what libraries load and keep
        seconds, most = time.monotonic() - begin, max(peak)
        stop.set()
    print(f"{SESSIONS * PEOPLE * ROUNDS * (len(MODELS) + 1)} requests in {seconds:.0f} s, MB at most {most:.0f}")
    print(f"MB at the start {start:.0f}, after each session {[round(level) for level in levels]}")
    assert max(levels) < levels[0] + MOST_AFTER
    assert "Traceback" not in server.output
