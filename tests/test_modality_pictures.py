"""Image, depth and infrared: what each file form means, and which files are refused."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as Pil

from languagebind.modalities import DecodeError
from languagebind.modalities._images import MEAN, STD
from languagebind.modalities.depth import Depth
from languagebind.modalities.image import Image
from languagebind.modalities.infrared import Infrared
from languagebind.modalities.video import Video

PICTURES = [Image(), Depth(), Infrared()]


def encode(picture: Pil.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Pil.Image) else Pil.fromarray(picture)
    picture.save(file, form, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    """Smooth colours, in which an orientation shows: (H, W, 3) bytes."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(np.uint8)


def unnormalised(x: torch.Tensor) -> torch.Tensor:
    """Back to 0..1: (3, H, W)."""
    return x[:, 0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_resizing_is_torchvision_s_without_antialiasing():
    from torchvision.transforms import InterpolationMode, v2

    steps = [v2.Resize(224, InterpolationMode.BICUBIC, antialias=False), v2.CenterCrop(224), v2.Normalize(MEAN, STD)]
    for shape in [(300, 451), (97, 64), (224, 225), (1000, 227), (224, 224), (3, 2)]:
        picture = photo(*shape)
        expected = v2.Compose(steps)(torch.from_numpy(picture).permute(2, 0, 1) / 255)
        torch.testing.assert_close(Image().preprocess(encode(picture))[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(360, 640), (97, 64), (1000, 227)])
def test_resized_bytes_differ_by_rounding_from_resized_floats(shape):
    noise = np.random.default_rng(0).integers(256, size=(4, *shape, 3), dtype=np.uint8)
    # (modality, input, largest and mean difference in grey levels); cubic weights overshoot, and noise is all edges
    cases = [
        (Image, photo(*shape), 1.5, 0.5),
        (Image, noise[0], 60, 0.8),
        (Infrared, photo(*shape)[..., 0], 1.5, 0.5),
        (Video, noise, 1.1, 0.4),
    ]
    for kind, value, largest, mean in cases:
        floats, as_bytes = kind(random_crop=True), kind(random_crop=True, fast_resize=True)
        x, y = (modality.preprocess(value, torch.Generator().manual_seed(1)) for modality in (floats, as_bytes))
        difference = ((x - y) * torch.tensor(STD).view(3, 1, 1, 1) * 255).abs()
        assert 0 < difference.mean() < mean
        assert difference.max() < largest
        assert torch.equal(as_bytes.preprocess(value), floats.preprocess(value))  # evaluation is as ever


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    picture = Pil.fromarray(photo()).convert(mode)
    file = encode(picture, "TIFF" if mode == "CMYK" else "PNG")
    x = Image().preprocess(file)
    assert torch.equal(x, Image().preprocess(encode(picture.convert("RGB"))))
    assert torch.equal(x, Image().preprocess(picture))


def test_sixteen_bit_grey_keeps_its_brightness():
    grey = photo()[..., 0]
    wide = Image().preprocess(encode(grey.astype(np.uint16) * 257))
    torch.testing.assert_close(wide, Image().preprocess(encode(grey)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # How the upright picture has to be stored so that this orientation turns it upright again
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = Pil.fromarray(photo())
    stored = upright if orientation == 1 else upright.transpose(Pil.Transpose(undo[orientation]))
    exif = Pil.Exif()
    exif[0x0112] = orientation
    assert torch.equal(Image().preprocess(encode(stored, exif=exif)), Image().preprocess(upright))

    x = Image().preprocess(Pil.open(io.BytesIO(encode(stored, "JPEG", quality=95, exif=exif))))
    assert torch.equal(x, Image().preprocess(encode(stored, "JPEG", quality=95, exif=exif)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])  # PIL itself turns TIFF
def test_exif_orientation_can_be_left(form):
    exif = Pil.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = encode(photo(), form, exif=exif)
    as_stored = np.asarray(Pil.open(io.BytesIO(file)).convert("RGB"))
    for value in (file, Pil.open(io.BytesIO(file))):
        assert torch.equal(Image(exif=False).preprocess(value), Image().preprocess(as_stored))
        assert torch.equal(Image().preprocess(value), Image().preprocess(np.rot90(as_stored, -1)))
    clip = [Pil.open(io.BytesIO(file))] * 2
    assert torch.equal(Video(num_frames=2).preprocess(clip), Video(num_frames=2).preprocess([np.rot90(as_stored, -1)]))
    damaged = Pil.open(io.BytesIO(file))
    damaged.info["exif"] = b"Exif\x00\x00MM\x00*\xff\xff"
    Image().preprocess(damaged)


def test_what_follows_a_picture_does_not_matter():
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08 a scan? \xff\xc4" * 9  # as behind a motion photo
    for form, behind in (("JPEG", film), ("JPEG", bytes(999)), ("WEBP", bytes(999)), ("PNG", b"\n"), ("GIF", film)):
        picture = encode(photo(), form)
        assert torch.equal(Image().preprocess(picture + behind), Image().preprocess(picture))
    progressive = encode(photo(), "JPEG", progressive=True)
    assert torch.equal(Image().preprocess(progressive + film), Image().preprocess(progressive))
    for end in (-1, -2, -100):
        with pytest.raises(DecodeError, match="truncated"):
            Image().preprocess(progressive[:end])


@pytest.mark.parametrize("form", [".png", ".tiff", "uncompressed.tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_keep_their_lower_byte(form, channels):
    import cv2

    counts = np.random.default_rng(0).integers(7000, 7200, (8, 8, channels), np.uint16)
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 1] if form.startswith("un") else []
    file = cv2.imencode(form[-5:] if options else form, counts, options)[1].tobytes()  # (blue, green, red[, alpha])
    rgb = torch.from_numpy(counts[..., 2::-1].astype(np.float32)).permute(2, 0, 1)
    x = unnormalised(Infrared(image_size=8, infrared_range=(7000, 7200)).preprocess(file))
    torch.testing.assert_close(x, (rgb - 7000) / 200, atol=1e-5, rtol=0)
    torch.testing.assert_close(unnormalised(Image(image_size=8).preprocess(file)), rgb / 65535, atol=1e-6, rtol=0)
    if form == ".png":
        exif = Pil.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        turned = file[:33] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + file[33:]
        x = unnormalised(Infrared(image_size=8, infrared_range=(7000, 7200)).preprocess(turned))
        torch.testing.assert_close(x, (rgb.rot90(-1, (1, 2)) - 7000) / 200, atol=1e-5, rtol=0)


def test_picture_forms_agree():
    array = photo()
    expected = Image().preprocess(encode(array))
    tensor = torch.from_numpy(array)
    forms = [array, Pil.fromarray(array), tensor, tensor.permute(2, 0, 1), array[::-1][::-1]]
    for value in forms:
        assert torch.equal(Image().preprocess(value), expected)
    torch.testing.assert_close(Image().preprocess(tensor.permute(2, 0, 1) / 255), expected, atol=1e-5, rtol=0)
    array.flags.writeable = False
    assert torch.equal(Image().preprocess(array), expected)


@pytest.mark.parametrize(
    "value", [np.full((9, 9, 3), 2.0), np.full((9, 9), np.nan), np.full((9, 9), -1), np.ones((9, 9, 2))]
)
def test_arrays_that_are_no_pictures_are_refused(value):
    with pytest.raises(DecodeError):
        Image().preprocess(value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("damage", ["cut", "zeros"])
@pytest.mark.parametrize("modality", [Image(), Infrared()], ids=["image", "infrared"])
def test_a_lost_end_is_an_error_not_grey_rows(form, damage, modality):
    noise = np.random.default_rng(0).integers(256, size=(120, 160), dtype=np.uint8)
    file = encode(noise, form)
    modality.preprocess(file)
    for share in (0.3, 0.6, 0.9):
        kept = file[: int(len(file) * share)]
        with pytest.raises(DecodeError):
            modality.preprocess(kept + bytes(len(file) - len(kept)) * (damage == "zeros"))


def test_the_last_bytes_of_a_real_photo_matter(golden):
    file = (golden / "media/image/0.jpg").read_bytes()
    for lost in (2, 3, 10, 1000):
        with pytest.raises(DecodeError):
            Image().preprocess(file[:-lost])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def npy_bomb(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def jpeg_bomb() -> bytes:
    file = bytearray(encode(photo(), "JPEG"))
    frame = file.find(b"\xff\xc0")  # then: length 2, bits 1, height 2, width 2
    file[frame + 5 : frame + 9] = b"\xff\xf0\xff\xf0"
    return bytes(file)


BOMBS = {
    "png": png_bomb(60_000, 60_000),
    "strip": png_bomb(20_000_000, 1),  # few pixels, until its short side is 224
    "jpeg": jpeg_bomb(),
    "bmp": encode(photo(), "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + encode(photo(), "BMP")[26:],
    "npy": npy_bomb((100_000, 100_000)),
    "npy overflow": npy_bomb((2**33, 2**33)),
    "npy negative": npy_bomb((-1, -4), bytes(16)),
}


@pytest.mark.parametrize("modality", PICTURES, ids=["image", "depth", "infrared"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_from_their_header(modality, bomb):
    modality.preprocess(np.full((9, 9), 999, np.uint16))  # imports what it needs
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError):
        modality.preprocess(BOMBS[bomb])
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_the_pixel_limit_is_an_option():
    file = encode(photo(100, 100))
    Image(image_size=32, max_pixels=10_000).preprocess(file)
    with pytest.raises(DecodeError, match=r"100x100 pixels .* --max-pixels 9999"):
        Image(image_size=32, max_pixels=9_999).preprocess(file)


# Depth


def metres(value, **options) -> np.ndarray:
    depth = Depth(**options)
    return (depth.decode(value) if isinstance(value, bytes) else depth.from_memory(value)).numpy()


def test_integers_are_millimetres_and_floats_metres():
    mm = np.array([[0, 1, 500, 1000, 1001], [4321, 9999, 10000, 32768, 65535]], np.uint16)
    expected = mm.astype(np.float32) / 1000
    integers = [
        encode(mm),
        encode(mm, "TIFF"),
        npy(mm),
        npy(mm.astype(np.int64)),
        npy(mm.astype(">u2")),
        mm,
        mm[..., None],
    ]
    floats = [npy(expected), npy(expected.astype(np.float64)), encode(expected, "TIFF"), expected, expected[None]]
    for value in [*integers, Pil.fromarray(mm), torch.from_numpy(mm), *floats, torch.from_numpy(expected)]:
        np.testing.assert_allclose(metres(value), expected, rtol=1e-6)


def test_pictures_of_which_pil_changes_the_16_bits_are_refused():
    counts = np.arange(4800, dtype=">u2").reshape(60, 80)
    pgm, ppm = b"P5\n80 60\n%d\n", b"P6\n80 20\n%d\n"
    for modality, unit in ((Depth(), 1000), (Infrared(), 1)):
        np.testing.assert_allclose(modality.decode(pgm % 65535 + counts.tobytes()).squeeze(), counts / unit, rtol=1e-6)
    size, pairs = struct.pack(">IIBBBBB", 40, 60, 16, 4, 0, 0, 0), counts.reshape(60, 40, 2)  # grey with alpha
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pairs))
    chunks = [(b"IHDR", size), (b"IDAT", rows), (b"IEND", b"")]
    png = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks]
    scaled = [head % maximum + counts.tobytes() for head, maximum in ((pgm, 4799), (ppm, 4799), (ppm, 65535))]
    for file in (*scaled, b"\x89PNG\r\n\x1a\n" + b"".join(png)):
        for modality in (Infrared(), Image()):
            with pytest.raises(DecodeError, match="convert it to PNG without alpha"):
                modality.decode(file)


def test_depth_is_clipped_and_scaled_to_one():
    far = np.full((8, 8), 20_000, np.uint16)
    far[:, :4] = 0  # holes
    x = unnormalised(Depth(image_size=8).preprocess(far))
    torch.testing.assert_close(x[:, :, -1], torch.ones(3, 8))
    torch.testing.assert_close(x[:, :, 0], torch.full((3, 8), 0.001))
    own = unnormalised(Depth(image_size=8, max_depth=0.0).preprocess(far))
    torch.testing.assert_close(own[:, :, -1], torch.ones(3, 8))
    torch.testing.assert_close(own[:, :, 0], torch.full((3, 8), 0.0005))


def test_sun_rgbd_bits_are_turned_back():
    mm = np.array([[1, 7, 1000], [4321, 8191, 65535]], np.uint16)
    stored = (mm << 3) | (mm >> 13)
    np.testing.assert_allclose(metres(encode(stored), sun_rgbd=True), mm.astype(np.float32) / 1000)


def test_nan_and_minus_infinity_are_holes_and_infinity_is_far():
    depth = np.array([[np.nan, 1.0], [np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(metres(npy(depth)), [[0, 1], [10, 0]])
    np.testing.assert_array_equal(metres(depth, max_depth=0.0), [[0, 1], [1, 0]])
    sky = np.full((8, 8), np.inf)
    sky[4:, :4], sky[4:, 4:] = 5, 25
    x = unnormalised(Depth(image_size=8).preprocess(sky))[0]
    torch.testing.assert_close(x[:, 0], torch.tensor([1.0] * 4 + [0.5] * 4))
    torch.testing.assert_close(x[:, 7], torch.ones(8))
    own = unnormalised(Depth(image_size=8, max_depth=0.0).preprocess(npy(sky)))[0]  # scaled by 25 m
    torch.testing.assert_close(own[:, 0], torch.tensor([1.0] * 4 + [0.2] * 4))
    with pytest.raises(DecodeError, match="no pixel is finite"):
        metres(npy(np.full((4, 4), np.nan)))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (encode(photo()), "one channel"),
        (encode(photo()[..., 0]), "8-bit"),
        (encode(photo(), "JPEG"), "one channel"),
        (npy(np.ones((2, 3, 4, 5))), "expected"),
        (npy(np.zeros((0, 3))), "expected"),
        (npy(np.array([["a"]])), "expected"),
        (npy(np.ones((4, 4)))[:-8], "expected 128 bytes"),
        (b"\x93NUMPY\x01", "not a usable .npy file"),
        (b"\x93NUMPY\x09\x00" + bytes(50), "not a usable .npy file"),
    ],
)
def test_what_is_no_depth_is_refused(file, reason):
    with pytest.raises(DecodeError, match=reason):
        Depth().preprocess(file)


def test_npy_files_are_not_unpickled():
    file = io.BytesIO()
    np.save(file, np.array([[print]], dtype=object))
    with pytest.raises(DecodeError):
        Depth().preprocess(file.getvalue())


# Infrared


def test_eight_bits_are_scaled_by_255_and_one_channel_becomes_three():
    grey = photo()[..., 0]
    x = Infrared().preprocess(encode(grey))
    assert torch.equal(x, Image().preprocess(encode(grey)))
    assert torch.equal(x, Infrared().preprocess(encode(np.stack([grey] * 3, -1))))
    assert torch.equal(x, Infrared().preprocess(grey))


def test_raw_counts_fill_the_range_or_keep_sixteen_bits():
    counts = np.linspace(7000, 9000, 64).astype(np.uint16).reshape(8, 8)  # what a 14-bit sensor gives
    x = unnormalised(Infrared(image_size=8).preprocess(encode(counts)))
    torch.testing.assert_close(torch.stack([x.min(), x.max()]), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    full = unnormalised(Infrared(image_size=8, infrared_range="full").preprocess(encode(counts)))
    torch.testing.assert_close(full[0], torch.from_numpy(counts / 65535).float(), atol=1e-5, rtol=0)
    celsius = (counts / 100 - 50).astype(np.float32)
    for value in (celsius, encode(celsius, "TIFF"), torch.from_numpy(celsius)):
        torch.testing.assert_close(unnormalised(Infrared(image_size=8).preprocess(value)), x, atol=1e-4, rtol=0)


def test_a_fixed_range_is_the_same_for_all_pictures():
    celsius = np.linspace(-20, 120, 64, dtype=np.float32).reshape(8, 8)
    fixed = Infrared(image_size=8, infrared_range=(0, 80))
    expected = torch.from_numpy(np.clip(celsius / 80, 0, 1)).expand(3, 8, 8)
    for value in (celsius, encode(celsius, "TIFF"), np.stack([celsius] * 3)):
        torch.testing.assert_close(unnormalised(fixed.preprocess(value)), expected, atol=1e-6, rtol=0)
    kelvin = np.round((celsius + 273.15) * 100).astype(np.uint16)  # hundredths, as FLIR cameras store them
    counts = Infrared(image_size=8, infrared_range=(27315, 35315))
    torch.testing.assert_close(unnormalised(counts.preprocess(encode(kelvin))), expected, atol=1e-4, rtol=0)
    assert fixed.picture(fixed.decode(encode(celsius, "TIFF")))[1] == "0 (black) to 80 (white)"
    with pytest.raises(DecodeError, match="8-bit pictures hold no temperatures"):
        fixed.preprocess(encode(photo(), "JPEG"))


def test_a_constant_picture_has_no_range():
    x = Infrared(image_size=8).preprocess(np.full((8, 8), 7000, np.uint16))
    torch.testing.assert_close(unnormalised(x), torch.zeros(3, 8, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [np.full((8, 8), np.nan, np.float32), np.full((8, 8, 3), np.inf, np.float32)])
def test_infrared_that_is_not_finite_is_refused(value):
    with pytest.raises(DecodeError, match="NaN"):
        Infrared().preprocess(value)
