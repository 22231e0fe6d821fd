"""Public downloads to crops and depth maps: files of the real formats, to the pixel."""

import hashlib
import json
import sys

import h5py
import numpy as np
import pytest
from lookalikes import mfnet as mfnet_lookalike
from PIL import Image
from releases import (
    FLIR_V1,
    FLIR_V2,
    LLVIP,
    MILLIMETRES,
    SCENES,
    V1,
    V2,
    flir,
    llvip,
    nyu_release,
    picture,
    stored,
    sun_release,
    voc,
)
from scipy.io import loadmat

from languagebind.config import UserError
from languagebind.eval.data.validation import validate
from languagebind.eval.prepare import crops, mfnet, nyu, sunrgbd
from languagebind.eval.prepare.__main__ import PrepareConfig, prepare
from languagebind.eval.prepare.writing import list_rows
from languagebind.modalities.depth import Depth


def steps(kind, source, options, output=None):
    return kind.prepare(source, output or source / "out", validate(kind.Options, options, "prepare"))


def run(kind, source, options, output=None):
    """The rows, and what was left out."""
    listed = steps(kind, source, options, output)
    rows = []
    while True:
        try:
            rows.append(next(listed))
        except StopIteration as end:
            return rows, end.value


def refused(kind, source, options, message):
    """Reading, or listing what was read, says what is wrong with it."""
    with pytest.raises(UserError, match=message):
        list_rows(steps(kind, source, options), source, source / "out", by_class=True)


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


def test_boxes_that_cannot_be_cropped_are_counted(tmp_path):
    boxes = [(5, 5, 5, 9), (200, 5, 220, 9), (0, 0, 2, 9), (1, 1, 95, 63)]
    llvip(tmp_path, {"190001": voc(boxes), "190002": voc([(1, 2, 30, 40)], name="dog")})
    rows, counts = run(crops, tmp_path, LLVIP | {"min_size": "3", "background_tries": "20"})
    assert [row["path"] for row in rows] == ["person/190001_3.png"]
    assert counts == {"no area": 1, "outside": 1, "small": 1, "no place for a background": 1, "category dog": 1}


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
        (
            lambda text: text[:-20],
            r"cannot read .*190001\.xml: ParseError: .*download the file again",
        ),
        (lambda text: text.replace("<xmin>1</xmin>", ""), r"cannot read .*190001\.xml: ValueError"),
        (lambda text: text.replace("<xmin>1<", "<xmin>nan<"), r"cannot read .*190001\.xml: ValueError"),
        (lambda text: text.replace("<width>96", "<width>1280"), r"96x64 pixels, but 1280x64 in .*190001\.xml"),
    ],
)
def test_mistakes_in_an_xml_are_named(tmp_path, change, message):
    llvip(tmp_path, {"190001": change(voc([(1, 2, 30, 40)]))})
    refused(crops, tmp_path, LLVIP, message)


def test_a_missing_picture_of_llvip_lacks_its_backgrounds_too(tmp_path):
    llvip(tmp_path, {"190001": voc([(1, 2, 30, 40)]), "190002": voc([])})
    (tmp_path / "LLVIP/infrared/test/190001.jpg").rename(tmp_path / "LLVIP/infrared/test/190003.jpg")
    (tmp_path / "LLVIP/infrared/test/190001.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "LLVIP/Annotations/190003.xml").write_text(voc([]))
    rows, _ = run(crops, tmp_path, LLVIP)
    assert [row["path"] for row in rows] == ["person/190001_0.png", "background/190001_0.png"]
    assert all(row["where"].endswith("190001.jpg is missing") for row in rows)


def test_missing_and_broken_files_of_llvip(tmp_path):
    llvip(tmp_path, {"190001": voc([(1, 2, 30, 40)])})
    run(crops, tmp_path, LLVIP | {"pictures": "1"})
    refused(crops, tmp_path, LLVIP | {"pictures": "2"}, r"infrared/test: 1 pictures, expected 2: unpack the download")
    image = tmp_path / "LLVIP/infrared/test/190001.jpg"
    twin = image.with_suffix(".png")
    picture(twin, 96, 64)
    refused(crops, tmp_path, LLVIP, r"person/190001_0\.png is listed twice")
    twin.unlink()
    image.write_bytes(image.read_bytes()[:-400])
    refused(crops, tmp_path, LLVIP, r"cannot read .*190001\.jpg: OSError: image file is truncated")
    (tmp_path / "LLVIP/Annotations/190001.xml").unlink()
    refused(crops, tmp_path, LLVIP, r"cannot read .*190001\.xml: No such file or directory; check --source")
    refused(crops, tmp_path / "elsewhere", LLVIP, "cannot read .*elsewhere/LLVIP/infrared/test: No such file")
    image.unlink()
    assert run(crops, tmp_path, LLVIP) == ([], {})


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


@pytest.mark.parametrize("name", ["../outside.jpeg", "/etc/outside.jpeg"])
def test_pictures_outside_of_the_download_are_refused(tmp_path, name):
    flir(tmp_path, *V1)
    file = next(tmp_path.rglob("thermal_annotations.json"))
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    refused(crops, tmp_path, FLIR_V1, "outside.jpeg' is not a path in the folder of the download")


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
        ({"annotations": [BOX, BOX]}, r"person/FLIR_08863_5\.png is listed twice"),
        ({"annotations": [BOX | {"category_id": 7}]}, r"cannot read .*annotations\.json: KeyError: '7'"),
        ({"annotations": [BOX | {"image_id": 9}]}, r"annotations\.json: KeyError: 9"),
        ({"annotations": [BOX | {"bbox": [1, 2, 3]}]}, r"annotations\.json: ValueError: not enough values"),
        ({"annotations": [BOX | {"bbox": [1, 2, float("inf"), 4]}]}, r"annotations\.json: OverflowError"),
        ({"annotations": None}, r"annotations\.json: TypeError"),
        ({"images": [IMAGE, IMAGE], "annotations": [BOX]}, r"annotations\.json: the image id 0 is listed twice"),
        ({"images": [{"id": 0}]}, r"annotations\.json: KeyError: 'file_name'"),
        ({"categories": [{"id": 1, "name": "person"}], "annotations": [BOX]}, "has no category '18', only person"),
        ({"images": [IMAGE | {"width": 640}], "annotations": [BOX]}, "64x48 pixels, but 640x48"),
    ],
)
def test_mistakes_in_a_coco_file_are_named(tmp_path, changes, message):
    flir(tmp_path, *V1, **changes)
    refused(crops, tmp_path, FLIR_V1, message)


@pytest.mark.parametrize("content", [b'{"images": [', b"[1]", b"\xff\xfe\x00", b"[" * 100000])
def test_an_unreadable_json_is_named(tmp_path, content):
    flir(tmp_path, *V1)
    (tmp_path / "val/thermal_annotations.json").write_bytes(content)
    refused(crops, tmp_path, FLIR_V1, r"cannot read .*thermal_annotations\.json: \w+Error")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "yolo"}, r"prepare: format should be 'voc' or 'coco', not 'yolo'"),
        ({"min_sizes": "3"}, "prepare: unknown key 'min_sizes', did you mean 'min_size'"),
        ({"min_size": "0"}, "prepare: min_size should be at least 1, not '0'"),
        ({"min_size": "3.5"}, "prepare: min_size should be a whole number, not '3.5'"),
        ({"classes": {}}, "prepare: classes"),
        ({"classes": {"person": "../up"}}, "prepare: classes.person"),
        ({"background": "person"}, "background 'person' is also a label"),
        ({"annotations": None}, "prepare: annotations should be text"),
    ],
)
def test_wrong_options_are_named(tmp_path, change, message):
    refused(crops, tmp_path, LLVIP | change, message)


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
    refused(nyu, tmp_path, {"take": "rgb"}, "prepare: take should be 'depths' or 'images', not 'rgb'")


@pytest.mark.parametrize("classes", ["40", "13"])
def test_nyu_masks_of_the_classes_in_the_mapping_files(tmp_path, classes):
    nyu_release(tmp_path, ["kitchen", "office_kitchen", "home_office"], [1, 3])
    rows, _ = run(nyu, tmp_path, {"masks": classes})
    assert rows[1] == {"path": "depths/0003.png", "mask": f"masks_{classes}/0003.png"}
    to40 = loadmat(tmp_path / "classMapping40.mat")["mapClass"][0]
    to13 = loadmat(tmp_path / "class13Mapping.mat")["classMapping13"]["labels13"][0, 0][0]
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat") as file:
        labels = file["labels"][2].T
    mask = stored(tmp_path, {"path": rows[1]["mask"]})
    assert mask.shape == labels.shape == (6, 8)
    for label, index in zip(labels.ravel(), mask.ravel(), strict=True):
        found = to40[label - 1] if label else 0  # from 1, as MATLAB counts; 0 is none
        found = to13[found - 1] if classes == "13" and found else found
        assert index == (found - 1 if found else 255)
    (tmp_path / "classMapping40.mat").unlink()
    refused(nyu, tmp_path, {"masks": classes}, r"cannot read .*classMapping40\.mat: No such file")


def test_mfnet_thermal_pictures_and_masks(tmp_path):
    mfnet_lookalike(tmp_path / "release")
    for take, channels in (("thermal", slice(3, 4)), ("colour", slice(0, 3))):
        rows, _ = run(mfnet, tmp_path / "release", {"take": take}, tmp_path / take)
        assert rows[1] == {"path": f"{take}/00002N.png", "mask": "masks/00002N.png"}
        with Image.open(tmp_path / "release" / "images" / "00002N.png") as image:
            expected = np.array(image)[..., channels].squeeze()
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / take / rows[1]["path"])), expected)
        label = np.array(Image.open(tmp_path / "release" / "labels" / "00002N.png"))
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / take / rows[1]["mask"])), label)
    Image.new("RGB", (4, 4)).save(tmp_path / "release" / "images" / "00001D.png")
    refused(mfnet, tmp_path / "release", {}, r"cannot read .*00001D\.png: .*no channel")
    (tmp_path / "release" / "test.txt").write_text("../up")
    refused(mfnet, tmp_path / "release", {}, r"test\.txt: '\.\./up' is not a path in the folder")


@pytest.mark.parametrize(
    ("types", "tests", "scale", "message"),
    [
        (["kitchen", "office"], [1, 3], 1, r"splits\.mat: testNdxs should be image numbers in .*, from 1 to 2"),
        (["kitchen", "office"], [0], 1, "testNdxs should be image numbers"),
        (["kitchen", "office"], [1.5], 1, "testNdxs should be image numbers"),
        (["kitchen", "office"], [2, 2], 1, r"office/0002\.png is listed twice"),
        (["kitchen", "office"], [1], 10000, "depths 1: .* should be metres"),
        (["kitchen", "office"], [1], np.nan, "depths 1: .* should be metres"),
    ],
)
def test_mistakes_in_nyu_are_named(tmp_path, types, tests, scale, message):
    nyu_release(tmp_path, types, tests, np.full((2, 8, 6), 9.0 * scale, np.float32))
    refused(nyu, tmp_path, {}, message)


def test_broken_files_of_nyu_are_named(tmp_path):
    nyu_release(tmp_path, ["kitchen"], [1])
    release, splits = tmp_path / "nyu_depth_v2_labeled.mat", tmp_path / "splits.mat"
    data = splits.read_bytes()
    splits.write_bytes(data[:150])
    refused(nyu, tmp_path, {}, r"cannot read .*splits\.mat: \w+")
    splits.write_bytes(data)
    whole = release.read_bytes()
    for broken in (whole[:700], whole.replace(b"SNOD", b"SNOT")):
        release.write_bytes(broken)
        refused(nyu, tmp_path, {}, r"cannot read .*labeled\.mat: .*download the file again")
    with h5py.File(release, "w") as file:
        file["depths"] = np.ones((1, 8, 6))
    refused(nyu, tmp_path, {}, r"cannot read .*labeled\.mat: KeyError: .*sceneTypes")
    release.unlink()
    refused(nyu, tmp_path, {}, r"cannot read .*labeled\.mat: .*No such file or directory")
    splits.unlink()
    refused(nyu, tmp_path, {}, r"cannot read .*splits\.mat: No such file or directory")


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "languagebind.eval.prepare.nyu")
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "x.yaml").write_text("task: classification\ndata: x/test\nprepare: {kind: nyu}\n")
    with pytest.raises(UserError, match=r"x needs h5py: pip install 'languagebind\[prepare\]'"):
        prepare(PrepareConfig(tmp_path / "x.yaml", tmp_path, tmp_path / "data"))


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
    refused(sunrgbd, tmp_path, {"files": "mm"}, "prepare: files should be 'millimetres' or 'original', not 'mm'")
    twin = folder / "depth_bfx" / "0000104.png"
    twin.write_bytes(depth.read_bytes())
    rows, _ = run(sunrgbd, tmp_path, {})
    assert rows[0].pop("where") == f"{depth.parent} holds 2 PNG files instead of one"
    assert [(tmp_path / "out" / row["path"]).exists() for row in rows] == [False, True]
    twin.unlink()
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(depth)
    refused(sunrgbd, tmp_path, {}, r"0000103\.png is L, .* 16-bit")
    depth.write_bytes(b"no picture")
    refused(sunrgbd, tmp_path, {}, r"cannot read .*0000103\.png: ")
    depth.unlink()
    rows, _ = run(sunrgbd, tmp_path, {}, tmp_path / "without")
    assert rows[0].pop("where") == f"{depth.parent} holds 0 PNG files instead of one"
    assert [(tmp_path / "without" / row["path"]).exists() for row in rows] == [False, True]
    (folder / "scene.txt").unlink()
    refused(sunrgbd, tmp_path, {}, r"cannot read .*scene\.txt: No such file or directory; check --source")
    split.write_bytes(split.read_bytes()[:300])
    refused(sunrgbd, tmp_path, {}, r"cannot read .*allsplit\.mat: ")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["/n/fs/sun3d/data/kv2/a"], r"cannot read .*allsplit\.mat: IndexError"),
        (["/n/SUNRGBD/xtion/a", "/n/SUNRGBD/xtion/a/"], r"lab/xtion__a\.png is listed twice"),
    ],
)
def test_a_wrong_split_of_sun_rgbd_is_named(tmp_path, paths, message):
    from scipy.io import savemat

    (tmp_path / "SUNRGBD/xtion/a").mkdir(parents=True)
    (tmp_path / "SUNRGBD/xtion/a/scene.txt").write_text("lab")
    savemat(tmp_path / "allsplit.mat", {"alltest": np.array([paths], object)})
    refused(sunrgbd, tmp_path, {"split": "allsplit.mat"}, message)
    refused(sunrgbd, tmp_path, {"split": "other.mat"}, r"cannot read .*other\.mat: No such file or directory")
