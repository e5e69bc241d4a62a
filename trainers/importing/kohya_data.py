"""kohya's pictures: train_data_dir with folders like "10_sks dog", or a dataset_config of [[datasets]] and subsets.

A setting counts where it stands nearest: in the subset, else its dataset, else [general], else the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from trainers.folders import kohya_folders
from trainers.importing.carrying import Carrying, is_yes, text, whole
from trainers.importing.kohya_folder import (
    DATASET_ONLY,
    IDLE,
    NAMES,
    Counted,
    batches_of,
    carry_dataset,
    carry_folder,
    carry_resolution,
    count_pictures,
)
from trainers.importing.reading import table_of, text_of


def carry(c: Carrying, folder: Path) -> Counted:
    arguments = {name: c.given.pop(name) for name in NAMES if name in c.given}
    arguments["batch_size"] = c.take("train_batch_size", default=arguments.get("batch_size", 1))
    masked, masks = c.yes("masked_loss"), c.take("conditioning_data_dir")
    config, images, classes = c.take("dataset_config"), c.take("train_data_dir"), c.take("reg_data_dir")
    c.leave_if("in_json", "captions are read from files beside the pictures")
    if config is not None:
        counted = _of_config(c, config, arguments, folder)
    else:
        counted = _of_folders(c, images, classes, arguments, folder)
    if masked:
        c.set("data.masked_loss", True)
        if masks:
            c.set("data.masks", text(masks))
    tables = [c.preset.get("data", {}), *c.preset.get("dataset", [])]
    if any(table.get("masked_loss") for table in tables):
        c.set("data.mask_floor", 0.0)  # what a mask leaves out counts for nothing there
    return counted


def _of_folders(
    c: Carrying, images: Any, classes: Any, arguments: Mapping[str, Any], folder: Path
) -> Counted:
    if images is None:
        c.leave("train_data_dir", None, "no folder of pictures is named: set data.images")
    c.set("data.images", text(images or "images"))
    carry_folder(c, arguments, "data")
    carry_dataset(c, arguments)
    has_class = False
    if classes:
        has_class = _class_pictures(c, text(classes), folder)
    pictures = count_pictures(folder / text(images)) if images else None
    return Counted(pictures, batches_of(pictures, c.preset["train"]["batch_size"]), has_class)


def _class_pictures(c: Carrying, classes: str, folder: Path) -> bool:
    """kohya names their class in the folder's name too: 1_dog."""
    inside = kohya_folders(folder / classes) if (folder / classes).is_dir() else []
    if len(inside) != 1:
        c.leave(
            "reg_data_dir", classes, 'set data.class_images, and data.class_prompt such as "a photo of a dog"'
        )
        return False
    c.set("data.class_images", f"{classes.rstrip('/')}/{inside[0][0].name}")
    c.set("data.class_prompt", inside[0][2])
    return True


def _of_config(c: Carrying, config: Any, arguments: Mapping[str, Any], folder: Path) -> Counted:
    if not isinstance(config, dict):
        named = folder / text(config)
        if not named.is_file():
            c.leave(
                "dataset_config", config, "the file is not there; import it by itself, or set data.images"
            )
            return _of_folders(c, "images", None, arguments, folder)
        config = table_of(named, text_of(named))
    general = {**arguments, **config.get("general", {})}
    datasets = config.get("datasets") or []
    instances: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    owners: list[int] = []  # of each of the instances, the dataset
    for number, dataset in enumerate(datasets):
        common = {**general, **{k: v for k, v in dataset.items() if k != "subsets"}}
        for subset in dataset.get("subsets") or []:
            if is_yes(subset.get("is_reg", False)):
                classes.append(subset)
            else:
                instances.append({**common, **subset})
                owners.append(number)
    if not instances:
        raise ConfigError("The dataset_config has no [[datasets.subsets]] with an image_dir to learn from.")
    carry_dataset(c, instances[0])
    for name in (*DATASET_ONLY[1:], "min_bucket_reso"):
        others = sorted({str(i[name]) for i in instances if name in i and i[name] != instances[0].get(name)})
        if others:
            c.leave(f"{name} of further datasets", others, "one for all folders")
    tables = [_subset(c, subset, several=len(instances) > 1) for subset in instances]
    if len(tables) == 1 and tables[0].get("repeats", 1) == 1:
        tables[0].pop("repeats", None)
        c.preset.setdefault("data", {}).update(tables[0])
    else:
        c.preset.get("data", {}).pop("resolution", None)
        c.set("dataset", tables)
    _classes(c, classes, general)
    return _counted(tables, instances, owners, folder, has_class=len(classes) == 1)


def _classes(c: Carrying, subsets: list[dict[str, Any]], general: Mapping[str, Any]) -> None:
    """One folder of class pictures with its words; what else it says of them has no counterpart."""
    for subset in subsets:
        inner = Carrying(subset)
        where, words = (
            inner.take("image_dir"),
            inner.take("class_tokens", default=general.get("class_tokens")),
        )
        inner.take("is_reg")
        inner.leave_if("num_repeats", "each once", harmless=(1,))
        if len(subsets) == 1 and where and words:
            c.set("data.class_images", text(where))
            c.set("data.class_prompt", text(words))
        else:
            c.leave("is_reg subset", where, "set data.class_images and data.class_prompt")
        inner.finish(IDLE)
        c.left += [f"{where}: {line}" for line in inner.left]


def _counted(
    tables: list[dict[str, Any]],
    subsets: list[dict[str, Any]],
    owners: list[int],
    folder: Path,
    *,
    has_class: bool,
) -> Counted:
    """Each dataset makes batches of its own size."""
    sizes: dict[int, int] = dict.fromkeys(owners, 0)
    batch: dict[int, int] = {}
    for table, subset, owner in zip(tables, subsets, owners, strict=True):
        count = count_pictures(folder / table["images"])
        if count is None:
            return Counted(None, None, has_class)
        sizes[owner] += count * table.get("repeats", 1)
        batch[owner] = max(1, Carrying({}).read("batch_size", subset.get("batch_size") or 1, whole, 1))
    batches = sum(batches_of(size, batch[owner]) or 0 for owner, size in sizes.items())
    return Counted(sum(sizes.values()), batches, has_class)


def _subset(c: Carrying, subset: Mapping[str, Any], *, several: bool) -> dict[str, Any]:
    inner = Carrying({})
    image_dir = text(subset.get("image_dir", ""))
    inner.set("data.images", image_dir)
    carry_folder(inner, subset, "data")
    if several and subset.get("resolution") not in (None, ""):
        carry_resolution(inner, subset["resolution"])
    if "metadata_file" in subset:
        inner.leave(
            "metadata_file", subset["metadata_file"], "captions are read from files beside the pictures"
        )
    if "conditioning_data_dir" in subset:
        inner.set("data.masks", text(subset["conditioning_data_dir"]))
        inner.set("data.masked_loss", True)
    for line in inner.left:
        c.left.append(f"{image_dir}: {line}")
    c.changed += [f"{image_dir}: {line}" for line in inner.changed if line not in c.changed]
    table: dict[str, Any] = inner.preset["data"]
    return table
