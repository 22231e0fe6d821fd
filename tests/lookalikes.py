"""Small look-alikes of public datasets: the files that their authors publish, with the same names, columns and quirks.

`LOOKALIKES[name]` writes the download of the dataset of `configs/eval/<name>.yaml` into a folder, and gives its counts.
"""

import csv
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import releases
from PIL import Image

Counts = dict[str, int]
SENTENCES = ["a man is cooking", "a dog runs in the rain", 'she says "stop"', "three cars, all red", "naïve café music"]


def sound(path: Path, seconds: float = 0.2) -> Path:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).normal(size=int(16000 * seconds)) / 10
    soundfile.write(path, noise, 16000)
    return path


def film(path: Path, frames: int = 4, voice: bool = False) -> Path:
    """A video file, with `voice` of 0.4 s of noise beside the pictures."""
    from av import open as open_video
    from av.audio.frame import AudioFrame
    from av.video.frame import VideoFrame

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    with open_video(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono") if voice else None
        for _ in range(frames):
            container.mux(stream.encode(VideoFrame.from_ndarray(rng.integers(0, 255, (32, 32, 3), np.uint8))))
        container.mux(stream.encode())
        if sound:
            noise = AudioFrame.from_ndarray(rng.normal(size=(1, 6400)).astype(np.float32) / 10, "fltp", "mono")
            noise.sample_rate, noise.pts = 16000, 0
            container.mux(sound.encode(noise))
            container.mux(sound.encode())
    return path


def picture(path: Path, depth: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    pixels = (
        rng.integers(500, 9000, (20, 24)).astype(np.uint16) if depth else rng.integers(0, 255, (20, 24, 3), np.uint8)
    )
    Image.fromarray(pixels).save(path)
    return path


def table(path: Path, rows: Sequence[Sequence], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        csv.writer(file, delimiter=delimiter, quoting=quoting, quotechar='"' if delimiter == "," else None).writerows(
            rows
        )
    return path


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------ audio


def esc50(root: Path) -> Counts:
    """`<fold>-<Freesound id>-<take>-<target>.wav`; the category has underscores."""
    rows = [("filename", "fold", "target", "category", "esc10", "src_file", "take")]
    for number, (target, category) in enumerate(
        [(0, "dog"), (14, "chirping_birds"), (36, "vacuum_cleaner"), (0, "dog")]
    ):
        name = f"{number + 1}-10003{number}-A-{target}.wav"
        rows.append((name, number + 1, target, category, target == 0, f"10003{number}", "A"))
        sound(root / "audio" / name)
    table(root / "meta" / "esc50.csv", rows)
    return {"samples": 4, "classes": 3}


def vggsound(root: Path, suffix: str = ".flac") -> Counts:
    """No header; starts without zeros in the table, with six digits in the file name; labels with commas are quoted."""
    rows = [
        ("---g-f_I2yQ", 1, "people marching", "test"),
        ("--0PQM4-hqg", 30, "waterfall burbling", "train"),
        ("--56QUhyDQM", 185, "playing tennis", "test"),
        ("-3RH8_aeZkk", 0, "bird chirping, tweeting", "test"),
        ("-3RH8_aeZkk", 105, "playing tennis", "test"),
    ]
    table(root / "vggsound.csv", rows)
    for name, start, _, split in rows:
        if split == "test":
            file = root / "clips" / name[0] / f"{name}_{start:06d}{suffix}"
            sound(file) if suffix == ".flac" else film(file, voice=True)
    return {"samples": 4, "classes": 3}


def audioset(root: Path) -> Counts:
    """Three lines of comment, a space behind each comma, several machine ids in quotes."""
    for name in ("--4gqARaEJE", "--BfvyPmVMo", "--U7joUcTCo", "-0BIyqJj9ZU"):
        sound(root / "eval_segments" / f"{name}.wav")
    (root / "eval_segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n"
        "# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=6\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n'
        '--BfvyPmVMo, 20.000, 30.000, "/m/03l9g"\n'
        '--U7joUcTCo, 0.000, 10.000, "/m/068hy"\n'
        '-0BIyqJj9ZU, 30.000, 40.000, "/m/07q6cd_,/m/03l9g"\n'
    )
    rows = [
        ("index", "mid", "display_name"),
        (0, "/m/068hy", "Domestic animals, pets"),
        (1, "/m/07q6cd_", "Squeak"),
        (2, "/m/03l9g", "Hammer"),
    ]
    table(root / "class_labels_indices.csv", rows)
    return {"samples": 4, "classes": 3}


def clotho(root: Path) -> Counts:
    """File names with spaces and brackets, captions with commas."""
    names = [
        "Santa Motor.wav",
        "Radio Garble.wav",
        "Radio Fuzz for Old Radio Broadcast FF233.wav",
        "toy rattle [2].wav",
    ]
    rows = [("file_name", *(f"caption_{k}" for k in range(1, 6)))]
    rows += [(name, *(f"{text}, take {number}" for text in SENTENCES)) for number, name in enumerate(names)]
    table(root / "clotho_captions_evaluation.csv", rows)
    for name in names:
        sound(root / "evaluation" / name)
    return {"samples": 4, "captions": 20}


def audiocaps(root: Path) -> Counts:
    """A row a caption; the rows of a clip are not together."""
    names = ["vfY_TJq7n_U", "tdWhHV3X25Q", "-AheI8Epim4", "_BSmz3SEW1w"]
    rows = [("audiocap_id", "youtube_id", "start_time", "caption")]
    rows += [(97151 + k, name, 130, f"{text} {name}") for k, text in enumerate(SENTENCES) for name in names]
    table(root / "test.csv", rows)
    for name in names:
        sound(root / "test" / f"{name}.wav")
    return {"samples": 4, "captions": 20}


# ------------------------------------------------------------------------------------------------------ video


def kinetics(root: Path) -> Counts:
    rows = [
        ("label", "youtube_id", "time_start", "time_end", "split", "is_cc"),
        ("abseiling", "-3B32lodo2M", 59, 69, "val", 0),
        ("air drumming", "-KbfOS44-gM", 48, 58, "val", 0),
        ("petting animal (not cat)", "0wR5jVB-WPk", 417, 427, "val", 0),
        ("massaging person's head", "3caPS4FHFF8", 36, 46, "val", 1),
        ("abseiling", "3yaoNwz99xM", 62, 72, "val", 0),
    ]
    table(root / "annotations" / "val.csv", rows)
    for _, name, start, end, _, _ in rows[1:]:
        film(root / "val" / f"{name}_{start:06d}_{end:06d}.mp4")
    return {"samples": 5, "classes": 4}


def msrvtt(root: Path) -> Counts:
    rows = [("key", "vid_key", "video_id", "sentence")]
    rows += [(f"ret{k}", f"msr{9770 + k}", f"video{9770 + k}", text) for k, text in enumerate(SENTENCES)]
    table(root / "MSRVTT_JSFUSION_test.csv", rows)
    for k in range(5):
        film(root / "MSRVTT_Videos" / f"video{9770 + k}.{'mkv' if k == 3 else 'mp4'}", voice=True)
    film(root / "MSRVTT_Videos" / "video0.mp4")
    return {"samples": 5, "captions": 5}


def msvd(root: Path) -> Counts:
    """Captions of all splits, as words, in a pickle that Python 2 could read."""
    names = [
        f"{name}_{k}_{k + 9}"
        for k, name in enumerate(["mv89psg6zh4", "-4wsuPCjDBc", "5P6UU6m3cqk", "aXr4DkrrkPg", "train"])
    ]
    captions = {name: [[*text.split(), str(k)] for text in SENTENCES[: k + 1]] for k, name in enumerate(names)}
    root.mkdir(parents=True, exist_ok=True)
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))
    (root / "test_list.txt").write_text("\n".join(names[:4]) + "\n")
    for name in names:
        film(root / "MSVD_Videos" / f"{name}.avi")
    return {"samples": 4, "captions": 1 + 2 + 3 + 4}


def activitynet(root: Path) -> Counts:
    """Sentences start with a space; the videos are of several kinds."""
    names = ["v_uqiMw7tQ1Cc", "v_bXdq2zI1Ms0", "v_FsS8cQbfKTQ", "v_K6Tm5xHkJ5c"]
    entries = {
        name: {
            "duration": 55.15,
            "timestamps": [[0.28, 55.15], [13.79, 54.32]],
            "sentences": ["The two girls are in a gym.", f" They {text}."],
        }
        for name, text in zip(names, SENTENCES, strict=False)
    }
    write_json(root / "val_1.json", entries)
    for name, suffix in zip(names, ("mp4", "mkv", "mp4", "mkv"), strict=True):
        film(root / "Activity_Videos" / f"{name}.{suffix}")
    return {"samples": 4, "captions": 4}


def didemo(root: Path) -> Counts:
    """An entry a description; a video's name has the extension of its source, its file perhaps another."""
    names = [
        "54322086@N00_2408598493_274c77d26a.avi",
        "10015567@N08_3655084291_be8b33bce8.mov",
        "22634709@N00_5880742837_d4d8.m4v",
        "35355493@N00_4850107214_2a3d.mp4",
    ]
    entries = [
        {
            "annotation_id": 10 * k + j,
            "video": name,
            "description": f"{text} {k}",
            "num_segments": 6,
            "dl_link": "https://…",
            "times": [[0, 0], [0, 1]],
            "reference_description": "",
        }
        for j, text in enumerate(SENTENCES[:3])
        for k, name in enumerate(names)
    ]
    write_json(root / "test_data.json", entries)
    for name in names:
        film(root / "videos" / f"{name.rpartition('.')[0]}.mp4")
    return {"samples": 4, "captions": 4}


def lsmdc(root: Path) -> Counts:
    """Tabs, no header, single quotation marks; the clips lie in folders by film."""
    clips = [f"1014_2012_00.0{k}.01.414-00.0{k}.04.418" for k in range(3)] + [
        "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"
    ]
    sentences = ['He reads a note, "Run.', "SOMEONE looks up.", "They drive off.", "She's in the café."]
    rows = [(clip, *["00.00.01.000"] * 4, text) for clip, text in zip(clips, sentences, strict=True)]
    path = root / "LSMDC16_challenge_1000_publictect.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    for clip in clips:
        film(root / "videos" / clip.rpartition("_")[0] / f"{clip}.avi")
    return {"samples": 4, "captions": 4}


def vatex(root: Path) -> Counts:
    """Ten English and ten Chinese captions a video; the split is a part of the validation set."""
    names = [
        f"{name}_0000{k}0_0000{k}9"
        for k, name in enumerate(["Ptf_2VRj-V0", "2-fGIQdT3vY", "zCwPB9J2Lyg", "x_EAGuYSWb0", "val"])
    ]
    entries = [
        {
            "videoID": name,
            "enCap": [f"{text} {name} {k}" for k in range(2) for text in SENTENCES],
            "chCap": ["一个人"] * 10,
        }
        for name in names
    ]
    write_json(root / "vatex_validation_v1.0.json", entries)
    (root / "test_list.txt").write_text("\n".join(names[:4]))
    for name in names[:4]:
        film(root / "videos" / f"{name}.mp4")
    return {"samples": 4, "captions": 40}


# --------------------------------------------------------------------------------------------------- pictures


def imagenet(root: Path) -> Counts:
    rows = [("ImageId", "PredictionString")]
    for k, label in enumerate(["n01440764", "n01443537", "n15075141", "n01440764"]):
        name = f"ILSVRC2012_val_0000000{k + 1}"
        rows.append((name, f"{label} 85 1 499 272 {label} 1 2 3 4 "))
        picture(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name}.JPEG")
    table(root / "LOC_val_solution.csv", rows)
    return {"samples": 4, "classes": 3}


def llvip(root: Path) -> Counts:
    releases.llvip(root, {"190001": releases.voc([(10, 20, 22, 50), (40, 5, 52, 30)]), "190002": releases.voc([])})
    return {"samples": 4, "classes": 2}


def flir_v1(root: Path) -> Counts:
    releases.flir(root, *releases.V1)
    return {"samples": 2, "classes": 1}


def flir_v2(root: Path) -> Counts:
    names = ["person", "bike", "car", "motor", "bus", "truck", "light", "hydrant", "sign", "skateboard", "stroller"]
    categories = [{"id": number, "name": name} for number, name in [*enumerate(names, 1), (79, "other vehicle")]]
    releases.flir(root, *releases.V2, categories=categories)
    return {"samples": 3, "classes": 2}


def nyu_v2(root: Path) -> Counts:
    root.mkdir()
    releases.nyu_release(root, ["kitchen", "office_kitchen", "home_office", "study"], [2, 3, 4])
    return {"samples": 3, "classes": 2}


def nyu_masks(root: Path) -> Counts:
    return {"samples": nyu_v2(root)["samples"]}


def mfnet(root: Path) -> Counts:
    """Pictures of four channels, the fourth thermal, by day (D) and night (N); `test.txt` ends with a blank line."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for name in ("00001D", "00002N", "00003D"):
        Image.fromarray(rng.integers(0, 256, (24, 32, 4), np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 9, (24, 32), np.uint8)).save(root / "labels" / f"{name}.png")
    (root / "test.txt").write_text("00001D\n00002N\n\n")
    return {"samples": 2}


def sun_rgbd(root: Path) -> Counts:
    releases.sun_release(root)
    return {"samples": 2, "classes": 2}


def class_folders(*folders: str, depth: bool = False, suffix: str = "png") -> Callable[[Path], Counts]:
    """A dataset that is read as it is: its class folders below the data root, two files each."""

    def write(root: Path) -> Counts:
        for folder in folders:
            for k in range(2):
                picture(root / folder / f"{k:06d}.{suffix}", depth)
        return {"samples": 2 * len(folders), "classes": len(folders)}

    return write


# Downloads to prepare, with the modality that they are of.
LOOKALIKES: dict[str, tuple[str, Callable[[Path], Counts]]] = {
    "esc50": ("audio", esc50),
    "vggsound": ("audio", vggsound),
    "audioset": ("audio", audioset),
    "clotho": ("audio", clotho),
    "audiocaps": ("audio", audiocaps),
    "kinetics400": ("video", kinetics),
    "kinetics600": ("video", kinetics),
    "msrvtt": ("video", msrvtt),
    "msvd": ("video", msvd),
    "activitynet": ("video", activitynet),
    "didemo": ("video", didemo),
    "lsmdc": ("video", lsmdc),
    "vatex": ("video", vatex),
    "imagenet": ("image", imagenet),
    "nyu_v2": ("depth", nyu_v2),
    "nyu_v2_rgb": ("image", nyu_v2),
    "nyu_v2_13": ("depth", nyu_masks),
    "nyu_v2_40": ("depth", nyu_masks),
    "mfnet": ("infrared", mfnet),
    "sun_rgbd": ("depth", sun_rgbd),
    "llvip": ("infrared", llvip),
    "llvip_rgb": ("image", llvip),
    "flir_v1": ("infrared", flir_v1),
    "flir_v2": ("infrared", flir_v2),
}
# Class folders as evaluation reads them.
FOLDERS: dict[str, tuple[str, Callable[[Path], Counts]]] = {
    "imagenet_v2": (
        "image",
        class_folders(*(f"imagenetv2-matched-frequency-format-val/{k}" for k in (0, 1, 10, 999)), suffix="jpeg"),
    ),
    "nyu_v2": (
        "depth",
        class_folders(*(f"Depth/nyuv2/data/val/{name}" for name in ("bathroom", "home_office", "others")), depth=True),
    ),
    "sun_rgbd": (
        "depth",
        class_folders(
            *(f"Depth/sunrgbd/data/test/{name}" for name in ("lab", "lecture_theatre", "study_space")), depth=True
        ),
    ),
    "llvip": ("infrared", class_folders("Thermal/llvip/val/background", "Thermal/llvip/val/person", suffix="jpg")),
    "flir_v1": ("infrared", class_folders("Thermal/flirv1/val/bicycle", "Thermal/flirv1/val/dog", suffix="jpg")),
    "flir_v2": (
        "infrared",
        class_folders("Thermal/flirv2/val/light", "Thermal/flirv2/val/other vehicle", suffix="jpg"),
    ),
}

# What the comparisons of configs/eval/pairs are of: the datasets to prepare, each with how its download is written.
PAIRS: dict[str, dict[str, Callable[[Path], Counts]]] = {
    "nyu_v2_depth_rgb": {"nyu_v2": nyu_v2, "nyu_v2_rgb": nyu_v2},
    "nyu_v2_rgb_to_depth": {"nyu_v2": nyu_v2, "nyu_v2_rgb": nyu_v2},
    "llvip_infrared_rgb": {"llvip": llvip, "llvip_rgb": llvip},
    "llvip_rgb_to_infrared": {},  # read as it unpacks
    "msrvtt_audio_video": {"msrvtt": msrvtt},
    "vggsound_video_to_audio": {"vggsound": lambda root: vggsound(root, ".mp4")},
}
