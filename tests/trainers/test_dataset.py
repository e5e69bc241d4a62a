"""Nothing in a folder is passed over in silence; the order can be taken up anywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.errors import ConfigError
from trainers.config_data import DataSettings
from trainers.dataset import layers, pixels, read
from trainers.folders import picture_files
from trainers.images import open_image
from trainers.sampler import Sampler
from trainers.scan import scan
from trainers.scan_report import ScanReport

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth"  # google/dreambooth
with_photos = pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="the DreamBooth photographs are not beside the checkout"
)


def settings(folder: Path, **changes: object) -> DataSettings:
    return DataSettings.model_validate({"images": folder, "prompt": "a photo of sks dog", **changes})


def picture(path: Path, size: tuple[int, int] = (96, 64), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def refusal(given: DataSettings, resolution: int = 64) -> tuple[str, list[ScanReport]]:
    heard: list[ScanReport] = []
    with pytest.raises(ConfigError) as problem:
        scan(given, resolution, report=heard.append)
    return str(problem.value), heard


@with_photos
def test_real_photographs_with_captions_class_pictures_and_a_broken_one(tmp_path: Path) -> None:
    folder, classes = tmp_path / "dog", tmp_path / "class"
    shutil.copytree(PHOTOS / "dog", folder)
    shutil.copytree(PHOTOS / "dog6", classes)
    (folder / "00.txt").write_text("a corgi on grass\n", encoding="utf-8")
    (folder / "broken.jpg").write_bytes((folder / "01.jpg").read_bytes()[:20_000])
    heard: list[ScanReport] = []
    given = settings(folder, class_images=classes, class_prompt="a photo of a dog")
    dataset = scan(given, 256, report=heard.append)
    assert [e.path.name for e in dataset.instances] == [f"0{i}.jpg" for i in range(5)]
    assert [e.caption for e in dataset.instances] == ["a corgi on grass"] + ["a photo of sks dog"] * 4
    assert {(e.kind, e.caption) for e in dataset.classes} == {("class", "a photo of a dog")}
    assert len(dataset.classes) == 5
    assert heard == list(dataset.reports)
    assert list(heard[0].bad) == ["broken.jpg"]
    assert "damaged" in heard[0].bad["broken.jpg"]
    for example in dataset.examples:
        assert example.original_size == open_image(example.path).size
        (view,) = example.views()
        tensor = pixels(layers(example, read(example))[0], view)
        assert tensor.shape == (3, 256, 256)  # the photographs are square
        assert -1 <= tensor.min() < -0.5 < 0.5 < tensor.max() <= 1
        assert tensor.std() > 0.1
    said, _ = refusal(settings(folder, bad_images="refuse"), 256)
    assert "1 of 6 pictures" in said
    assert "broken.jpg: it is damaged" in said


def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "B.JPEG", "c.png", "d.webp", "e.bmp", "f.tiff", "small.gif"):
        picture(folder / name, (20, 20) if name == "small.gif" else (96, 64))
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    texts = {
        "a.txt": "words",
        "c.txt": "",
        "d.txt": "one\ntwo",
        "orphan.txt": "alone",
        "readme.md": "x",
        ".hidden": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "bad.jpg").write_bytes(b"nonsense")
    (folder / "bad.txt").write_text("words of a bad picture", encoding="utf-8")
    picture(folder / "inside" / "g.jpg")
    picture(folder / "folder.jpg" / "h.jpg")
    dataset = scan(settings(folder), 64)
    (report,) = dataset.reports
    assert report.used == ["B.JPEG", "a.jpg", "c.png", "d.webp", "e.bmp", "f.tiff", "moving.gif", "small.gif"]
    assert list(report.bad) == ["bad.jpg"]
    assert report.other == [".hidden", "folder.jpg/", "inside/", "orphan.txt", "readme.md"]
    assert report.orphans == ["orphan.txt"]
    assert report.uncaptioned == ["B.JPEG", "c.png", "e.bmp", "f.tiff", "moving.gif", "small.gif"]
    assert report.captions.keys() == {"c.txt", "d.txt"}
    assert report.animated == ["moving.gif"]
    assert report.enlarged == ["small.gif"]
    captions = {e.path.name: e.caption for e in dataset.examples}
    assert (captions["a.jpg"], captions["c.png"], captions["d.webp"]) == (
        "words",
        "a photo of sks dog",
        "one",
    )
    said = str(report)
    for entry in folder.iterdir():
        assert entry.name in said or entry.name in report.used or entry.name in ("a.txt", "bad.txt")


def test_odd_names_are_accounted_for_too(tmp_path: Path) -> None:
    """Capital endings, what cameras and systems leave behind, pictures of another kind, links that lead nowhere."""
    folder = tmp_path / "photos"
    for name in ("a.JPG", "c d [1] 20%#.png", "new\nline.png", "photo.v2.png", "ü 名前.webp"):
        picture(folder / name)
    picture(folder / "e.jpg")
    (folder / "e.jpg").rename(folder / "e.jfif")
    for name in ("a.TXT", "c d [1] 20%#.txt", "photo.v2.CAPTION"):
        (folder / name).write_text(f"words of {name}", encoding="utf-8")
    mask = Image.new("L", (96, 64), 255)
    mask.save(folder / "a.mask.PNG")
    for name in ("._a.JPG", ".DS_Store", "f.HEIC", "g.jxl", "k.npz"):
        (folder / name).write_bytes(b"x")
    (folder / "zero.png").write_bytes(b"")
    (folder / "lost.png").symlink_to("nowhere.png")
    (folder / "ring.png").symlink_to("ring.png")
    os.mkfifo(folder / "pipe.png")
    dataset = scan(settings(folder, masked_loss=True), 64)
    (report,) = dataset.reports
    words = {"a.JPG": "a.TXT", "c d [1] 20%#.png": "c d [1] 20%#.txt", "photo.v2.png": "photo.v2.CAPTION"}
    assert {e.path.name: e.caption for e in dataset.examples} == {
        **dict.fromkeys(("e.jfif", "new\nline.png", "ü 名前.webp"), "a photo of sks dog"),
        **{name: f"words of {file}" for name, file in words.items()},
    }
    assert [e.path.name for e in dataset.examples if e.masked] == ["a.JPG"]
    assert report.bad.keys() == {"lost.png", "pipe.png", "ring.png", "zero.png"}
    assert report.other == sorted([".DS_Store", "._a.JPG", "f.HEIC", "g.jxl", "k.npz"])
    said = str(report)
    assert "Pictures of a kind that is not read, to be saved as PNG or JPEG: f.HEIC, g.jxl." in said
    assert "Not read: .DS_Store, ._a.JPG, k.npz." in said


def test_with_captions_off_text_files_are_reported_not_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg").with_suffix(".txt").write_text("words", encoding="utf-8")
    dataset = scan(settings(tmp_path, captions=False), 64)
    assert [e.caption for e in dataset.examples] == ["a photo of sks dog"]
    assert dataset.reports[0].other == ["a.txt"]


def test_folders_without_pictures(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    said, _ = refusal(settings(empty))
    assert "holds no pictures. Read are .avif, .bmp, .gif, .jfif, .jpeg" in said
    assert "The folder is empty." in said
    (empty / "photo.heic").write_bytes(b"x")
    (empty / "notes.docx").write_bytes(b"x")
    said, heard = refusal(settings(empty))
    assert "Found there: notes.docx, photo.heic." in said
    assert heard[0].other == ["notes.docx", "photo.heic"]
    assert "does not exist" in refusal(settings(tmp_path / "nowhere"))[0]
    assert "is a file" in refusal(settings(empty / "photo.heic"))[0]
    picture(tmp_path / "good" / "a.jpg")
    given = settings(tmp_path / "good", class_images=empty, class_prompt="a dog")
    assert "data.class_images" in refusal(given)[0]


def test_more_than_half_bad_is_refused_half_is_not(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / name).write_bytes(b"nonsense")
    assert len(scan(settings(tmp_path), 64).examples) == 2
    (tmp_path / "z.jpg").write_bytes(b"")
    said, heard = refusal(settings(tmp_path))
    assert "3 of 5 pictures" in said
    assert "z.jpg: the file is empty" in said
    assert list(heard[0].bad) == ["x.jpg", "y.jpg", "z.jpg"]


def test_pictures_without_any_words_are_refused_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg").with_suffix(".txt").write_text("words", encoding="utf-8")
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "c.jpg").with_suffix(".txt").write_text("", encoding="utf-8")
    said, _ = refusal(settings(tmp_path, prompt=None))
    assert "b.jpg, c.jpg." in said
    assert "Set data.prompt" in said


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "photos", picture(tmp_path / "secret.jpg")
    outside.with_suffix(".txt").write_text("secret words", encoding="utf-8")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(folder / name)
    try:
        (folder / "link.jpg").symlink_to(outside)
    except OSError:
        pytest.skip("no symbolic links here")
    (folder / "inner.jpg").symlink_to(folder / "a.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "a.txt").symlink_to(outside.with_suffix(".txt"))
    dataset = scan(settings(folder), 64)
    (report,) = dataset.reports
    assert report.used == ["a.jpg", "b.jpg", "c.jpg", "inner.jpg"]
    assert "outside the folder" in report.bad["link.jpg"]
    assert "loop.jpg" in report.bad
    assert "outside the folder" in report.captions["a.txt"]
    assert {e.caption for e in dataset.examples} == {"a photo of sks dog"}
    whole = tmp_path / "by_link"
    whole.symlink_to(folder)  # the folder itself may be one: its owner chose it
    assert len(scan(settings(whole), 64).examples) == 4


def test_flips_and_random_crops_follow_the_draw(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (96, 64))
    dataset = scan(settings(tmp_path, crop="random", flip=True, buckets=False), 64)
    (example,) = dataset.examples
    draws = Sampler(1, seed=3).take(300)
    views = [example.view(draw) for draw in draws]
    assert views == [example.view(draw) for draw in draws]
    assert {view.plan.box[0] for view in views} == set(range(33))
    assert 100 < sum(view.flip for view in views) < 200
    with pytest.raises(ConfigError, match=r"train\.cache_latents = false"):
        example.views()
    still = scan(settings(tmp_path), 64)
    (example,) = still.examples
    assert {example.view(draw) for draw in Sampler(1, seed=0).take(9)} == set(example.views())


def test_pixels_of_a_flip_are_mirrored(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png")
    dataset = scan(settings(tmp_path, flip=True), 64)
    (example,) = dataset.examples
    plain, flipped = (pixels(layers(example, read(example))[0], view) for view in example.views())
    assert torch.equal(plain, pixels(image, example.views()[0]))
    assert torch.equal(flipped, plain.flip(2))
    assert (plain[0, 0, 0], plain[0, 0, 1], flipped[0, 0, 63]) == (1, -1, 1)


def test_picture_files_of_no_folder(tmp_path: Path) -> None:
    assert picture_files(tmp_path / "class") == []
    picture(tmp_path / "class" / "b.png")
    picture(tmp_path / "class" / "a.JPG")
    (tmp_path / "class" / "c.txt").touch()
    assert [p.name for p in picture_files(tmp_path / "class")] == ["a.JPG", "b.png"]


def test_every_epoch_has_every_example_once_in_a_new_order() -> None:
    draws = Sampler(10, seed=1).take(40)
    epochs = [tuple(draw.index for draw in draws[i : i + 10]) for i in range(0, 40, 10)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert [draw.index for draw in Sampler(10, seed=2).take(10)] != list(epochs[0])


@pytest.mark.parametrize("stop", [0, 1, 9, 10, 17, 30])
def test_resumed_anywhere_the_order_is_that_of_the_straight_run(stop: int) -> None:
    straight = Sampler(10, seed=5).take(60)
    first = Sampler(10, seed=5)
    before = [draw for _ in range(stop) for draw in first.take(1)]
    state = json.loads(json.dumps(first.state()))
    resumed = Sampler.from_state(state, count=10)
    assert resumed.epoch == stop // 10
    after = resumed.take(60 - stop)
    assert before + after == straight
    assert [draw.rng().random() for draw in after] == [draw.rng().random() for draw in straight[stop:]]


def test_a_changed_folder_cannot_be_resumed() -> None:
    with pytest.raises(ConfigError, match="saved with 10 pictures and now there are 9"):
        Sampler.from_state(Sampler(10, seed=0).state(), count=9)
    with pytest.raises(ValueError, match="at least one example"):
        Sampler(0, seed=0)
