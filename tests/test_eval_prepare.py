"""Public downloads to crops and depth maps: files of the real formats, to the pixel."""

import hashlib
import json
import re
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from languagebind.config import UserError
from languagebind.eval.prepare import crops, nyu, sunrgbd
from languagebind.modalities.depth import Depth

LLVIP = {
    "kind": "crops",
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


def run(kind, source, options, output=None):
    """The rows, and what was left out."""
    rows, steps = [], kind.prepare(source, output or source / "out", options)
    while True:
        try:
            rows.append(next(steps))
        except StopIteration as end:
            return rows, end.value


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


def test_llvip_persons_and_backgrounds_to_the_pixel(tmp_path):
    boxes = [(10, 20, 22, 50), (-3, 60, 7, 70), (40, 5, 52.5, 30)]
    pixels = llvip(tmp_path, {"190001": voc(boxes), "190002": voc([])})
    rows, counts = run(crops, tmp_path, LLVIP)
    names = [f"{label}/190001_{i}.png" for i in range(3) for label in ("person", "background")]
    assert [row["path"] for row in rows] == names
    assert all(row["label"] == row["path"].split("/")[0] for row in rows)
    assert counts == {"clipped": 1}
    whole = [(10, 20, 22, 50), (0, 60, 7, 64), (40, 5, 53, 30)]  # clipped; 52.5 rounded up
    for row, (left, top, right, bottom) in zip(rows[::2], whole, strict=True):
        np.testing.assert_array_equal(stored(tmp_path, row), pixels[top:bottom, left:right])
    for i, (left, top, right, bottom) in enumerate(whole):
        width, height = right - left, bottom - top
        for attempt in range(100):  # the rule of the docstring
            digest = hashlib.sha256(f"190001/{i}/{attempt}".encode()).hexdigest()
            x, y = int(digest[:16], 16) % (96 - width + 1), int(digest[16:32], 16) % (64 - height + 1)
            free = np.ones((64, 96), bool)
            for a, b, c, d in whole:
                free[b:d, a:c] = False
            if free[y : y + height, x : x + width].all():
                break
        np.testing.assert_array_equal(stored(tmp_path, rows[2 * i + 1]), pixels[y : y + height, x : x + width])
    again, _ = run(crops, tmp_path, LLVIP, tmp_path / "again")
    assert again == rows
    for row in rows:
        assert (tmp_path / "again" / row["path"]).read_bytes() == (tmp_path / "out" / row["path"]).read_bytes()


def test_boxes_that_cannot_be_cropped_are_counted_and_told(tmp_path, caplog):
    caplog.set_level("INFO")
    boxes = [(5, 5, 5, 9), (200, 5, 220, 9), (0, 0, 2, 9), (1, 1, 95, 63)]
    llvip(tmp_path, {"190001": voc(boxes), "190002": voc([(1, 2, 30, 40)], name="dog")})
    rows, counts = run(crops, tmp_path, LLVIP | {"min_size": "3", "background_tries": "20"})
    assert [row["path"] for row in rows] == ["person/190001_3.png"]
    assert counts == {"no area": 1, "outside": 1, "small": 1, "no place for a background": 1, "category dog": 1}
    assert "boxes left out or clipped: 1 category dog, 1 no area, 1 no place" in caplog.text


def test_a_background_fills_the_one_hole_between_boxes_that_are_not_cropped(tmp_path):
    around = [(0, 0, 30, 64), (40, 0, 96, 64), (30, 0, 40, 20), (30, 30, 40, 64)]
    objects = voc(around, name="dog").split("</size>")[1]
    pixels = llvip(tmp_path, {"190001": voc([(2, 3, 12, 13)]).replace("</annotation>", objects)})
    rows, counts = run(crops, tmp_path, LLVIP | {"background_tries": "50000"})
    assert [row["label"] for row in rows] == ["person", "background"]
    np.testing.assert_array_equal(stored(tmp_path, rows[1]), pixels[20:30, 30:40])
    assert counts == {"category dog": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], r"190001\.xml is no usable XML.*release again"),
        (lambda text: text.replace("<annotation>", '<!DOCTYPE a [<!ENTITY b "x">]><annotation>'), "has a DOCTYPE"),
        (lambda text: text.replace("<xmin>1</xmin>", ""), r"190001\.xml: object 0: a box has four numbers"),
        (lambda text: text.replace("<xmin>1<", "<xmin>nan<"), "a box has four numbers"),
        (lambda text: text.replace("person", ""), r"object 0 has no <name>"),
        (lambda text: text.replace("<width>96", "<width>1280"), r"96x64 pixels, 1280x64 in .*190001\.xml"),
    ],
)
def test_mistakes_in_an_xml_are_named(tmp_path, change, message):
    llvip(tmp_path, {"190001": change(voc([(1, 2, 30, 40)]))})
    with pytest.raises(UserError, match=message):
        run(crops, tmp_path, LLVIP)


def test_a_missing_picture_of_llvip_lacks_its_backgrounds_too(tmp_path):
    llvip(tmp_path, {"190001": voc([(1, 2, 30, 40)]), "190002": voc([])})
    (tmp_path / "LLVIP/infrared/test/190001.jpg").rename(tmp_path / "LLVIP/infrared/test/190003.jpg")
    (tmp_path / "LLVIP/infrared/test/190001.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "LLVIP/Annotations/190003.xml").write_text(voc([]))
    rows, _ = run(crops, tmp_path, LLVIP)
    assert [row["path"] for row in rows] == ["person/190001_0.png", "background/190001_0.png"]
    assert all(row["where"].endswith("190001.jpg is missing") for row in rows)


def test_an_entity_bomb_in_utf16_is_refused(tmp_path):
    llvip(tmp_path, {"190001": voc([])})
    bomb = voc([]).replace("<annotation>", '<!DOCTYPE a [<!ENTITY b "xx">]><annotation>').replace("utf-8", "utf-16")
    (tmp_path / "LLVIP/Annotations/190001.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(UserError, match="has a DOCTYPE"):
        run(crops, tmp_path, LLVIP)


def test_missing_and_broken_files_of_llvip(tmp_path):
    llvip(tmp_path, {"190001": voc([(1, 2, 30, 40)])})
    run(crops, tmp_path, LLVIP | {"pictures": "1"})
    with pytest.raises(UserError, match=r"infrared/test: 1 pictures, expected 2: unpack the release again"):
        run(crops, tmp_path, LLVIP | {"pictures": "2"})
    image = tmp_path / "LLVIP/infrared/test/190001.jpg"
    image.write_bytes(image.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"190001\.jpg cannot be read"):
        run(crops, tmp_path, LLVIP)
    (tmp_path / "LLVIP/Annotations/190001.xml").unlink()
    with pytest.raises(UserError, match=r"cannot read .*190001\.xml: No such file.*--source"):
        run(crops, tmp_path, LLVIP)
    picture(image.with_suffix(".png"), 96, 64)
    with pytest.raises(UserError, match="two pictures named 190001"):
        run(crops, tmp_path, LLVIP)
    for file in image.parent.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="test holds no pictures"):
        run(crops, tmp_path, LLVIP)
    with pytest.raises(UserError, match="infrared/test is no folder"):
        run(crops, tmp_path / "elsewhere", LLVIP)


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


def test_flir_v2_crops_by_the_names_of_categories(tmp_path):
    first, second = flir(tmp_path, *V2)
    rows, counts = run(crops, tmp_path, FLIR_V2)
    assert rows == [  # in the order of the pictures, then of the annotations
        {"path": "person/video-a-frame-000001-b_5.png", "label": "person"},
        {"path": "other vehicle/video-a-frame-000002-c_4.png", "label": "other vehicle"},
        {"path": "person/video-a-frame-000002-c_6.png", "label": "person"},
    ]
    assert counts == {"clipped": 1}
    expected = first[1:10, 0:4], second[12:21, 10:30], second[40:48, 60:64]
    for row, pixels in zip(rows, expected, strict=True):
        assert stored(tmp_path, row).dtype == np.uint8
        np.testing.assert_array_equal(stored(tmp_path, row), pixels)


def test_flir_v1_crops_by_the_numbers_of_categories(tmp_path):
    flir(tmp_path, *V1)
    rows, counts = run(crops, tmp_path, FLIR_V1)
    assert [row["path"] for row in rows] == ["person/FLIR_08863_5.png", "person/FLIR_08864_6.png"]
    assert counts == {"category other vehicle": 1, "clipped": 1}


def test_rows_of_a_missing_picture_have_no_file_and_say_so(tmp_path):
    flir(tmp_path, *V1)
    (tmp_path / "val/thermal_8_bit/FLIR_08863.jpeg").unlink()
    rows, _ = run(crops, tmp_path, FLIR_V1)
    assert [row["path"] for row in rows] == ["person/FLIR_08863_5.png", "person/FLIR_08864_6.png"]
    assert "thermal_annotations.json: the picture" in rows[0]["where"]
    assert rows[0]["where"].endswith("val/thermal_8_bit/FLIR_08863.jpeg is missing")
    assert [(tmp_path / "out" / row["path"]).exists() for row in rows] == [False, True]


BOX = {"id": 5, "image_id": 0, "category_id": 1, "bbox": [0, 0, 3, 9]}
IMAGE = {"id": 0, "width": 64, "height": 48, "file_name": "thermal_8_bit/FLIR_08863.jpeg"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [BOX, BOX]}, r"annotations\.json: annotation 5 of image 0 is there twice"),
        ({"annotations": [BOX | {"category_id": 7}]}, "annotation 5: category_id 7 is not among .*1, 2, 3, 18, 79"),
        ({"annotations": [BOX | {"image_id": 9}]}, "annotation 5: expected an id and the image_id"),
        ({"annotations": [BOX | {"bbox": [1, 2, 3]}]}, r"bbox should be \[left, top, width, height\], found \[1, 2, 3"),
        ({"annotations": [BOX | {"bbox": [1, 2, float("inf"), 4]}]}, "annotation 5: a box has four numbers"),
        ({"annotations": None}, "'annotations' should be a list"),
        ({"images": [IMAGE, IMAGE]}, r"FLIR_08863\.jpeg \(id 0\) is there twice"),
        ({"images": [IMAGE, IMAGE | {"id": 1}]}, r"FLIR_08863\.jpeg \(id 1\) is there twice"),
        ({"images": [IMAGE | {"file_name": "../../a.jpg"}]}, "is outside of"),
        ({"images": [{"id": 0}]}, "no file_name"),
        ({"categories": [{"id": 1, "name": "person"}]}, "no category '2': name one of 1, person"),
        ({"images": [IMAGE | {"width": 640}], "annotations": [BOX]}, "64x48 pixels, 640x48"),
    ],
)
def test_mistakes_in_a_coco_file_are_named(tmp_path, changes, message):
    flir(tmp_path, *V1, **changes)
    with pytest.raises(UserError, match=message):
        run(crops, tmp_path, FLIR_V1)


@pytest.mark.parametrize("content", [b'{"images": [', b"[1]", b"\xff\xfe\x00", b"[" * 100000])
def test_an_unreadable_json_is_named(tmp_path, content):
    flir(tmp_path, *V1)
    (tmp_path / "val/thermal_annotations.json").write_bytes(content)
    with pytest.raises(UserError, match=r"thermal_annotations\.json (is no usable JSON|should hold one JSON object)"):
        run(crops, tmp_path, FLIR_V1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "yolo"}, "voc or coco, not 'yolo'"),
        ({"min_sizes": "3"}, "unknown option 'min_sizes', did you mean 'min_size'"),
        ({"min_size": "0"}, "min_size should be a whole number, at least 1"),
        ({"classes": {}}, "classes should map"),
        ({"classes": {"person": "../up"}}, "cannot be a folder's name"),
        ({"background": "person"}, "background 'person' is a label"),
        ({"annotations": None}, "annotations is missing"),
    ],
)
def test_wrong_options_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(crops, tmp_path, LLVIP | change)


def nyu_release(root, types, tests, depths=None):
    """`nyu_depth_v2_labeled.mat` as MATLAB 7.3 writes it, 8 x 6 pixels; returns the depths (N, width, height)."""
    from scipy.io import savemat

    if depths is None:
        depths = np.random.default_rng(0).uniform(0.7, 9.99, (len(types), 8, 6)).astype(np.float32)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["depths"] = depths
        file["images"] = np.random.default_rng(1).integers(0, 256, (len(types), 3, 8, 6), np.uint8)
        cells = file.create_dataset("sceneTypes", (1, len(types)), h5py.ref_dtype)
        for i, text in enumerate(types):
            file[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in text], np.uint16)
            cells[0, i] = file[f"#refs#/{i}"].ref
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1]]), "testNdxs": np.array(tests).reshape(-1, 1)})
    return depths


def test_nyu_depth_in_millimetres_by_class(tmp_path):
    depths = nyu_release(tmp_path, ["kitchen", "office_kitchen", "home_office", "study"], [2, 3, 4])
    rows, counts = run(nyu, tmp_path, {})
    assert rows == [
        {"path": "others/0002.png", "label": "others"},
        {"path": "home_office/0003.png", "label": "home_office"},
        {"path": "others/0004.png", "label": "others"},
    ]
    assert counts == {"office_kitchen": 1, "study": 1}
    for row, depth in zip(rows, depths[1:], strict=True):
        assert stored(tmp_path, row).dtype == np.uint16
        np.testing.assert_array_equal(stored(tmp_path, row), np.rint(depth.T.astype(float) * 1000))
        metres = Depth().decode(tmp_path / "out" / row["path"]).numpy()
        np.testing.assert_allclose(metres, depth.T, atol=0.00051)


def test_nyu_colours_of_the_same_scenes(tmp_path):
    nyu_release(tmp_path, ["kitchen", "office_kitchen", "home_office"], [1, 3])
    rows, _ = run(nyu, tmp_path, {"take": "images"})
    assert rows == run(nyu, tmp_path, {"take": "depths"}, tmp_path / "depths")[0]
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat") as file:
        for row, number in zip(rows, (1, 3), strict=True):
            np.testing.assert_array_equal(stored(tmp_path, row), file["images"][number - 1].transpose(2, 1, 0))
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "a") as file:
        del file["images"]
        file["images"] = np.zeros((3, 4, 8, 6), np.uint8)
    with pytest.raises(UserError, match=r"images 1: \(4, 8, 6\) of uint8 should be \(3, width, height\)"):
        run(nyu, tmp_path, {"take": "images"})
    with pytest.raises(UserError, match="take should be depths or images, not 'rgb'"):
        run(nyu, tmp_path, {"take": "rgb"})


@pytest.mark.parametrize(
    ("types", "tests", "scale", "message"),
    [
        (["kitchen", "office"], [1, 3], 1, r"splits\.mat: testNdxs 1 to 3, but .*labeled\.mat holds images 1 to 2"),
        (["kitchen", "office"], [0], 1, "testNdxs 0 to 0"),
        (["kitchen", "office"], [2, 2], 1, "holds a number twice"),
        (["kitchen", "office"], [1.5], 1, "should hold the numbers"),
        (["kitchen", "office"], [1], 10000, "depths 1: .* should be metres"),
        (["kitchen", "office"], [1], np.nan, "depths 1: .* should be metres"),
    ],
)
def test_mistakes_in_nyu_are_named(tmp_path, types, tests, scale, message):
    nyu_release(tmp_path, types, tests, np.full((2, 8, 6), 9.0 * scale, np.float32))
    with pytest.raises(UserError, match=message):
        run(nyu, tmp_path, {})


def test_broken_files_of_nyu_are_named(tmp_path, monkeypatch):
    nyu_release(tmp_path, ["kitchen"], [1])
    release, splits = tmp_path / "nyu_depth_v2_labeled.mat", tmp_path / "splits.mat"
    data = splits.read_bytes()
    splits.write_bytes(data[:150])
    with pytest.raises(UserError, match=r"splits\.mat cannot be read as a MATLAB file"):
        run(nyu, tmp_path, {})
    splits.write_bytes(data)
    whole = release.read_bytes()
    for broken in (whole[:700], whole.replace(b"SNOD", b"SNOT")):
        release.write_bytes(broken)
        with pytest.raises(UserError, match=r"labeled\.mat cannot be read as HDF5: .*download it again"):
            run(nyu, tmp_path, {})
    release.unlink()
    with pytest.raises(UserError, match=r"labeled\.mat does not exist"):
        run(nyu, tmp_path, {})
    splits.unlink()
    with pytest.raises(UserError, match=r"splits\.mat does not exist"):
        run(nyu, tmp_path, {})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=re.escape("pip install h5py, or languagebind[prepare]")):
        run(nyu, tmp_path, {})


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


def test_sun_rgbd_is_written_in_millimetres(tmp_path):
    sun_release(tmp_path)
    rows, counts = run(sunrgbd, tmp_path, {})
    assert rows == [
        {"path": "bedroom/kv2__kinect2data__000002_2014-05-26_14-23-37.png", "label": "bedroom"},
        {"path": "rest_space/realsense__lg__2014_10_21-18.png", "label": "rest_space"},
    ]
    assert counts == {"idk": 1}
    for row in rows:
        np.testing.assert_array_equal(stored(tmp_path, row), MILLIMETRES)


def test_sun_rgbd_s_own_files_are_read_with_its_option(tmp_path):
    sun_release(tmp_path)
    rows, _ = run(sunrgbd, tmp_path, {"files": "original"})
    first = "SUNRGBD/kv2/kinect2data/000002_2014-05-26_14-23-37/depth_bfx/0000103.png"
    assert rows[0] == {"path": first, "label": "bedroom"}  # from --source
    assert not (tmp_path / "out").exists()
    metres = Depth(sun_rgbd=True).decode(tmp_path / first)
    np.testing.assert_allclose(metres.numpy(), MILLIMETRES / 1000, rtol=1e-6)


def test_mistakes_in_sun_rgbd_are_named(tmp_path):
    split = sun_release(tmp_path)
    folder = tmp_path / "SUNRGBD" / next(iter(SCENES))
    depth = folder / "depth_bfx" / "0000103.png"
    with pytest.raises(UserError, match="depth is depth_bfx or depth, files millimetres or original"):
        run(sunrgbd, tmp_path, {"files": "mm"})
    (folder / "depth_bfx" / "0000104.png").write_bytes(depth.read_bytes())
    with pytest.raises(UserError, match=r"/depth_bfx should hold one depth map, but holds 2 PNGs"):
        run(sunrgbd, tmp_path, {})
    (folder / "depth_bfx" / "0000104.png").unlink()
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(depth)
    with pytest.raises(UserError, match=r"0000103\.png is L, .* 16 bits"):
        run(sunrgbd, tmp_path, {})
    depth.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0000103\.png cannot be read"):
        run(sunrgbd, tmp_path, {})
    depth.unlink()
    rows, _ = run(sunrgbd, tmp_path, {})
    assert rows[0].pop("where") == f"{depth.parent} holds no PNG"
    assert [(tmp_path / "out" / row["path"]).exists() for row in rows] == [False, True]
    (folder / "scene.txt").unlink()
    with pytest.raises(UserError, match=r"allsplit\.mat names .*scene\.txt cannot be read: unpack SUNRGBD\.zip"):
        run(sunrgbd, tmp_path, {})
    split.write_bytes(b"MATLAB 5.0 MAT-file" * 20)
    with pytest.raises(UserError, match=r"allsplit\.mat cannot be read"):
        run(sunrgbd, tmp_path, {})


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["/n/fs/sun3d/data/kv2/a"], "paths with SUNRGBD/ in them, found /n/fs/sun3d/data/kv2/a"),
        (["/n/SUNRGBD/../../a"], "paths with SUNRGBD/ in them"),
        (["/n/SUNRGBD/kv2/a", "/m/SUNRGBD/kv2/a/"], "holds kv2/a twice"),
    ],
)
def test_a_wrong_split_of_sun_rgbd_is_named(tmp_path, paths, message):
    from scipy.io import savemat

    savemat(tmp_path / "allsplit.mat", {"alltest": np.array([paths], object)})
    with pytest.raises(UserError, match=message):
        run(sunrgbd, tmp_path, {"split": "allsplit.mat"})
    with pytest.raises(UserError, match=r"other\.mat does not exist"):
        run(sunrgbd, tmp_path, {"split": "other.mat"})
