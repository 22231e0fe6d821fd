"""Small copies of data sets as their authors release them."""

import json

import h5py
import numpy as np
from PIL import Image

LLVIP = {
    "format": "voc",
    "images": "LLVIP/infrared/test",
    "annotations": "LLVIP/Annotations",
    "classes": {"person": "person"},
    "background": "background",
}
FLIR_V1 = {
    "format": "coco",
    "annotations": "val/thermal_annotations.json",
    "classes": {"1": "person", "2": "bicycle", "3": "car", "18": "dog"},
}
FLIR_V2 = {
    "format": "coco",
    "annotations": "images_thermal_val/coco.json",
    "classes": {"person": "person", "other vehicle": "other vehicle"},
}


def picture(path, width, height, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(height).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)
    return np.asarray(Image.open(path))  # what JPEG made of them


def stored(root, row):
    return np.asarray(Image.open(root / "out" / row["path"]))


def voc(boxes, size=(96, 64), name="person"):
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{l}</xmin><ymin>{t}</ymin>"
        f"<xmax>{r}</xmax><ymax>{b}</ymax></bndbox></object>"
        for l, t, r, b in boxes  # noqa: E741
    )
    width, height = size
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotation><folder>test</folder><filename>190001.jpg</filename>'
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"
    )


def llvip(root, files):
    """The release with pictures of 96 x 64, three channels as there; returns the pixels of the first."""
    (root / "LLVIP/Annotations").mkdir(parents=True)
    for name in files:
        picture(root / f"LLVIP/visible/test/{name}.jpg", 96, 64, "RGB")
    pixels = [picture(root / f"LLVIP/infrared/test/{name}.jpg", 96, 64, "RGB") for name in files]
    for name, text in files.items():
        (root / f"LLVIP/Annotations/{name}.xml").write_text(text)
    return pixels[0]


def flir(root, folder, file, names, size=(64, 48), **changes):
    """Two pictures, three boxes; `changes` replace parts of the JSON. Returns the pictures' pixels."""
    content = {
        "info": {},
        "categories": [{"supercategory": "unknown", "id": 1, "name": "person"},
                       {"id": 2, "name": "bicycle"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"},
                       {"id": 79, "name": "other vehicle"}],
        "images": [{"id": i, "width": size[0], "height": size[1], "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": 4, "image_id": 1, "category_id": 79, "bbox": [10, 12, 20, 9], "iscrowd": 0, "area": 180},
            {"id": 5, "image_id": 0, "category_id": 1, "bbox": [0.4, 0.5, 3.2, 9.1], "iscrowd": 1},
            {"id": 6, "image_id": 1, "category_id": 1, "bbox": [60, 40, 10, 10]},
        ],
    }  # fmt: skip
    pixels = [picture(root / folder / name, *size) for name in names]
    (root / folder / file).write_text(json.dumps(content | changes))
    return pixels


V1 = ("val", "thermal_annotations.json", ["thermal_8_bit/FLIR_08863.jpeg", "thermal_8_bit/FLIR_08864.jpeg"])
V2 = ("images_thermal_val", "coco.json", ["data/video-a-frame-000001-b.jpg", "data/video-a-frame-000002-c.jpg"])


def nyu_release(root, types, tests, depths=None):
    """`nyu_depth_v2_labeled.mat` as MATLAB 7.3 writes it, 8 x 6 pixels; returns the depths (N, width, height)."""
    from scipy.io import savemat

    if depths is None:
        depths = np.random.default_rng(0).uniform(0.7, 9.99, (len(types), 8, 6)).astype(np.float32)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["depths"] = depths
        file["images"] = np.random.default_rng(1).integers(0, 256, (len(types), 3, 8, 6), np.uint8)
        file["labels"] = np.random.default_rng(2).integers(0, 895, (len(types), 8, 6), np.uint16)
        cells = file.create_dataset("sceneTypes", (1, len(types)), h5py.ref_dtype)
        for i, text in enumerate(types):
            file[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in text], np.uint16)
            cells[0, i] = file[f"#refs#/{i}"].ref
    rng = np.random.default_rng(3)
    savemat(root / "classMapping40.mat", {"mapClass": rng.integers(1, 41, (1, 894), np.uint8), "className": ["wall"]})
    to13 = {"labels13": rng.integers(0, 14, (1, 40), np.uint8), "className": np.array(["Bed"], object)}
    savemat(root / "class13Mapping.mat", {"classMapping13": to13})
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1]]), "testNdxs": np.array(tests).reshape(-1, 1)})
    return depths


SCENES = {
    "kv2/kinect2data/000002_2014-05-26_14-23-37": "bedroom",
    "xtion/sun3ddata/mit_32_d463/floor/0001": "idk",
    "realsense/lg/2014_10_21-18": "\ufeffrest_space\n",
}
MILLIMETRES = np.arange(500, 8000, 625, dtype=np.uint16).reshape(3, 4)


def sun_release(root):
    from scipy.io import savemat

    for key, scene in SCENES.items():
        folder = root / "SUNRGBD" / key
        (folder / "depth_bfx").mkdir(parents=True)
        (folder / "scene.txt").write_text(scene)
        Image.fromarray((MILLIMETRES << 3) | (MILLIMETRES >> 13)).save(folder / "depth_bfx" / "0000103.png")
    split = root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    split.parent.mkdir(parents=True)
    paths = np.empty((1, len(SCENES)), object)
    paths[0] = [f"/n/fs/sun3d/data/SUNRGBD/{key}{'/' * (i % 2)}" for i, key in enumerate(SCENES)]
    savemat(split, {"alltest": paths, "alltrain": paths[:, :1], "trainvalsplit": {"train": paths}})
    return split
