"""The transform, the cache and single images, against timm's own transform and Pillow."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from timm.data import create_transform, resolve_data_config

from petiole.errors import TaskError
from petiole.tasks import Pixels, Split, Transform, load_images, open_image
from petiole.tasks.images import Arrays, Files, to_rgb

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(40, 57), (20, 9), (32, 32)])
def test_geometry_then_values_equal_timms_eval_transform(mode, interpolation, size):
    config = {**CONFIG, "crop_mode": mode, "interpolation": interpolation}
    image, transform = noise(*size), Transform(config)
    found = transform.normalize(transform.pixels(image)[None])[0]
    torch.testing.assert_close(found, create_transform(**config, is_training=False)(image), rtol=0, atol=1e-6)


def test_inputs_need_not_be_square():
    config = {**CONFIG, "input_size": (3, 24, 48)}
    image, transform = noise(50, 50), Transform(config)
    found = transform.normalize(transform.pixels(image)[None])[0]
    torch.testing.assert_close(found, create_transform(**config, is_training=False)(image), rtol=0, atol=1e-6)


def test_timms_resolved_configuration_is_taken_as_it_is():
    config = resolve_data_config(pretrained_cfg={"input_size": (3, 48, 48), "crop_pct": 1.0, "crop_mode": "squash"})
    assert Transform(config).config == {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def test_pixels_are_bytes_and_normalize_leaves_them_alone():
    pixels = Transform(CONFIG).pixels(noise(40, 40))[None]
    before = pixels.clone()
    assert pixels.dtype == torch.uint8
    assert Transform(CONFIG).normalize(pixels).dtype == torch.float32
    assert torch.equal(pixels, before)


def test_config_survives_json():
    transform = Transform(CONFIG)
    again = Transform(json.loads(json.dumps(transform.config)))
    assert again == transform
    assert again.config == transform.config


def test_missing_settings_are_timms_defaults():
    image, transform = noise(40, 40), Transform({"input_size": (3, 32, 32)})
    expected = create_transform((3, 32, 32), interpolation="bicubic")(image)
    torch.testing.assert_close(transform.normalize(transform.pixels(image)[None])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (1, 32, 32)}, r"input_size must be \(3, height, width\) in pixels, got \(1, 32, 32\)"),
        ({"input_size": 224}, r"input_size must be \(3, height, width\) in pixels, got 224"),
        ({"interpolation": "random"}, "interpolation must be one of nearest, bilinear, .*, got 'random'"),
        ({"crop_mode": "corner"}, "crop_mode must be one of center, squash, border, got 'corner'"),
        ({"std": (1, 0, 1)}, r"std must be three numbers above 0, got \(1, 0, 1\)"),
        ({"mean": (0.5,)}, r"mean must be three numbers, got \(0.5,\)"),
        ({"crop_pct": 0}, "crop_pct must be above 0, got 0"),
        ({"croppct": 1}, "a transform has no setting 'croppct': it has input_size, interpolation"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(change, message):
    with pytest.raises(TaskError, match=message):
        Transform({**CONFIG, **change})


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    image = noise(16, 16).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form, tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    path = write(tmp_path / "deep", encoded(Image.fromarray(values), form))
    expected = np.repeat(np.round(values / 65535 * 255)[..., None], 3, axis=-1)
    assert np.array_equal(np.asarray(to_rgb(open_image(path))), expected)


def test_32_bit_grey_with_bytes_in_it_stays_as_it_is():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 0], values)


def test_a_float_image_is_refused_because_white_is_unknown():
    with pytest.raises(TaskError, match=r"mode F with values from 0 to 0\.5, .*save it with 8 or 16 bits"):
        to_rgb(Image.fromarray(np.array([[0, 0.5]], np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparent_is_white(mode):
    image = Image.new(mode, (4, 4), 0)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_transparent_entries_is_white_there(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    found = to_rgb(open_image(tmp_path / "palette.png"))
    assert [found.getpixel((0, 0)), found.getpixel((1, 0))] == [(255, 255, 255), (40, 50, 60)]


def test_a_photograph_lying_on_its_side_is_set_upright(tmp_path):
    image, exif = noise(8, 20), Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    image.save(tmp_path / "side.png", exif=exif)
    expected = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(to_rgb(open_image(tmp_path / "side.png"))), np.asarray(expected))


def arrays_split(count: int = 7) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    return Split(Arrays(pixels, "noise"), np.arange(count) % 3)


@pytest.mark.parametrize("limit_mib", [2048, 0])
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_batch_is_the_images_asked_for(limit_mib, kind):
    split, transform = arrays_split(), Transform(CONFIG)
    cache = Pixels(split, transform, limit_mib)
    pixels, labels = cache.batch(kind([5, 0, 5]))
    assert cache.is_cached == (limit_mib > 0)
    assert torch.equal(pixels, torch.stack([transform.pixels(split.images[i]) for i in (5, 0, 5)]))
    assert labels.tolist() == [2, 0, 2]
    assert labels.dtype == torch.int64


def test_the_limit_is_compared_with_the_bytes_of_all_pixels():
    size = 7 * 3 * 32 * 32 / 2**20
    split, transform = arrays_split(7), Transform(CONFIG)
    assert Pixels(split, transform, limit_mib=size).is_cached
    assert not Pixels(split, transform, limit_mib=size * 0.999).is_cached


def test_progress_counts_every_image_to_the_end():
    seen: list[tuple[int, int]] = []
    Pixels(arrays_split(4), Transform(CONFIG), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("limit_mib", [2048, 0])
def test_a_cache_survives_pickle(limit_mib):
    cache = Pixels(arrays_split(), Transform(CONFIG), limit_mib)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.batch([1, 2])[0], cache.batch([1, 2])[0])


JPEG, PNG, WEBP = (encoded(noise(64, 64), form) for form in ("JPEG", "PNG", "WEBP"))
DAMAGED = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "image file is truncated"),
    "cut.png": (PNG[: len(PNG) // 2], "image file is truncated"),
    "cut.webp": (WEBP[: len(WEBP) // 2], "could not create decoder object"),
    "empty.jpg": (b"", "it is empty or no image of a known format"),
    "text.png": (b"<html>404</html>", "it is empty or no image of a known format"),
    "bits.png": (PNG[:60] + b"\xff" * 40 + PNG[100:], ".+"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("limit_mib", [2048, 0])
def test_a_damaged_image_is_named_with_the_decoders_reason(name, limit_mib, tmp_path):
    data, why = DAMAGED[name]
    paths = [write(tmp_path / "good.png", PNG), write(tmp_path / name, data)]
    split = Split(Files(paths), np.array([0, 1]))
    with pytest.raises(TaskError, match=rf"{name} cannot be read as an image: {why}"):
        Pixels(split, Transform(CONFIG), limit_mib).batch([0, 1])


def test_a_truncated_image_is_never_grey_though_pillow_was_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = write(tmp_path / "cut.jpg", DAMAGED["cut.jpg"][0])
    with pytest.raises(TaskError, match=r"cut\.jpg .*LOAD_TRUNCATED_IMAGES is on .* set it to False"):
        Pixels(Split(Files([path]), np.array([0])), Transform(CONFIG))


def test_a_float_image_is_named_in_a_batch(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(TaskError, match=r"depth\.tiff cannot be read as an image: the image is of mode F"):
        Pixels(Split(Files([tmp_path / "depth.tiff"]), np.array([0])), Transform(CONFIG))


def test_no_image_is_decoded_after_a_damaged_one_was_met():
    class Counting(Arrays):
        asked = 0

        def __getitem__(self, index, /):
            type(self).asked += 1
            raise OSError("damaged")

    images = Counting(np.zeros((5000, 2, 2), np.uint8), "noise")
    with pytest.raises(TaskError, match="image 0 of noise cannot be read as an image: damaged"):
        Pixels(Split(images, np.zeros(5000, int)), Transform(CONFIG))
    assert Counting.asked < 5000


def test_files_and_folders_become_image_files_in_order_and_once(tmp_path):
    paths = [write(tmp_path / name, PNG) for name in ("x/b.png", "x/a c.PNG", "x/deep/ü.jpg", "first.tiff")]
    (tmp_path / "x" / "notes.txt").write_text("")
    (tmp_path / "x" / ".hidden.png").write_text("")
    odd = write(tmp_path / "no_suffix", PNG)
    found = load_images([paths[3], str(tmp_path / "x"), odd, paths[0]])
    assert found == [paths[3], paths[1], paths[0], paths[2], odd]
    assert load_images(tmp_path / "x") == [paths[1], paths[0], paths[2]]


def test_prediction_paths_that_mean_nothing_are_named(tmp_path):
    with pytest.raises(TaskError, match=r"there is no file or folder .*missing"):
        load_images([tmp_path / "missing"])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(TaskError, match=r"holds 1 files, none of them an image; image files end in \.avif"):
        load_images(tmp_path)
    with pytest.raises(TaskError, match="no image was given"):
        load_images([])


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "it is empty or no image of a known format"), (None, "there is no such file")]
)
def test_an_image_that_cannot_be_opened_is_named(data, why, tmp_path):
    if data is not None:
        (tmp_path / "x y.png").write_bytes(data)
    with pytest.raises(TaskError, match=rf"x y\.png cannot be read as an image: {why}"):
        open_image(tmp_path / "x y.png")
