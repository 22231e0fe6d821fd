"""Results in the form that an evaluation writes, of three tasks, with files that their examples are read from."""

import io
import tarfile
from pathlib import Path

import av
import numpy as np
import soundfile
from helpers import depth_png
from PIL import Image

from languagebind.config import to_dict
from languagebind.modalities import modality_class

EVIL = "<script>alert('x')</script>"
CLASSES = [EVIL, "dining & living room", *(f"class {k}" for k in range(2, 12))]
DIRECTIONS = ("text_to_modality", "modality_to_text")
CAPTION = f"a dog barks {EVIL} 日本語\x00"


def example(key: str, source: list, text: str, found: str, rank: int, score: float) -> dict:
    return {"key": key, "source": source, "text": text, "found": found, "rank": rank, "score": score}


def result(dataset: str, model: str, task: str, metrics: dict, half: float, **more) -> dict:
    """In the form that an evaluation writes; each interval reaches `half` to both sides of the value."""
    protocol = {
        "split": "test",
        "limit": None,
        "data_sha256": "ab12",
        "samples": 240,
        "inputs": to_dict(modality_class(model)()),
        "versions": {"torch": "2.11.0"},
        "chance": dict.fromkeys(metrics, 0.0833),
    }
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": None,
        "task": task,
        "metrics": metrics,
        "intervals": {name: [value - half, value + half] for name, value in metrics.items() if np.isfinite(value)},
        "statistics": {"bootstrap": 1000, "seed": 0, "confidence": 0.95},
        "ties": 3,
        "language": "en",
        "protocol": protocol | more.pop("protocol", {}),
        **more,
    }


def media(folder: Path) -> dict[str, list]:
    """A depth map, one in a shard, a sound, a video, one of frames, and nothing; as `source` of an example."""
    rng = np.random.default_rng(0)
    (folder / "room.png").write_bytes(depth_png(1, rng))
    with tarfile.open(folder / "00000.tar", "w") as archive:
        png = depth_png(2, rng)
        info = tarfile.TarInfo("s0.depth.png")
        info.size = len(png)
        archive.addfile(info, io.BytesIO(png))
    with tarfile.open(folder / "00000.tar") as archive:
        member = archive.getmembers()[0]
    place = {"shard": str(folder / "00000.tar"), "name": member.name, "offset": member.offset_data, "size": member.size}
    tone = np.sin(np.linspace(0, 1.5, 24000) ** 2 * 4000) / 4
    soundfile.write(folder / "tone.wav", tone, 16000)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for step in range(12):
            frame = np.full((120, 160, 3), (230, 40, 30), np.uint8)
            frame[40:80, 10 + step * 10 : 40 + step * 10] = (20, 60, 220)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames = [str(folder / f"frame{step}.png") for step in range(4)]
    for step, path in enumerate(frames):
        Image.new("RGB", (80, 60), (60 * step, 90, 20)).save(path)
    names = {"depth": "room.png", "audio": "tone.wav", "video": "clip.mp4", "gone": "gone.png"}
    return {kind: [str(folder / name)] for kind, name in names.items()} | {"shard": [place], "frames": frames}


def classification(shift: float, sources: dict) -> dict:
    values = np.linspace(0.2, 0.95, 12) - shift
    classes = [
        {"label": f"c{k}", "name": name, "samples": 20, "top1": round(float(values[k]), 4)}
        for k, name in enumerate(CLASSES)
    ]
    right = [round(20 * value) for value in values]
    confusion = sorted(
        [[k, k, n] for k, n in enumerate(right)] + [[k, (k + 1) % 12, 20 - n] for k, n in enumerate(right)]
    )
    best = [
        example("bathroom/room.png", sources["depth"], "class 2", "class 2", 1, 0.93),
        example("00000.tar/s0", sources["shard"], "class 3", "class 3", 1, 0.91),
    ]
    worst = [example("gone.png", sources["gone"], EVIL, "class 3", 12, 0.11)]
    metrics = {"top1": 0.6123 - shift, "top5": 0.9 - shift, "mean_per_class": 0.6 - shift, "chance": 1 / 12}
    examples = {"best": best, "worst": worst}
    return result(
        "nyu_v2", "depth", "classification", metrics, 0.05, classes=classes, confusion=confusion, examples=examples
    )


def multilabel(shift: float, sources: dict) -> dict:
    classes = [
        {"label": str(k), "name": f"sound {k}", "samples": 7 + k, "AP": 0.05 * k + shift, "AUC": 0.5 + 0.02 * k}
        for k in range(1, 13)
    ]
    classes.append({"label": "13", "name": "never heard", "samples": 0, "AP": None, "AUC": None})
    worst = [example("tone", sources["audio"], "sound 1, sound 2", "sound 9", 4, 0.21)]
    metrics = {"mAP": 0.31 + shift, "mAUC": 0.9, "d_prime": float("inf")}
    return result(
        "audioset", "audio", "multilabel", metrics, 0.004, classes=classes, examples={"best": [], "worst": worst}
    )


def retrieval(shift: float, sources: dict) -> dict:
    recalls = {"R@1": 0.4271 + shift, "R@5": 0.7 + shift, "R@10": 0.8 + shift}
    metrics = {f"{way}/{name}": value for way in DIRECTIONS for name, value in recalls.items()}
    metrics["text_to_modality/median_rank"] = 2.0
    ks = [1, 2, 3, 5, 10, 20, 50, 100, 200, 240]
    curves = {
        way: [[k, min(1.0, 0.4271 + shift + lift + 0.24 * np.log10(k))] for k in ks]
        for way, lift in zip(DIRECTIONS, (0, -0.03), strict=True)
    }
    best = [example("video7", sources["video"], CAPTION, CAPTION, 1, 0.41)]
    worst = [example("video8", sources["frames"], "two cats", "video7", 240, 0.02)]
    return result("msrvtt", "video", "retrieval", metrics, 0.03, curves=curves, examples={"best": best, "worst": worst})
