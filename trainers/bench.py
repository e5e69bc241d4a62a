"""The bench a run works at: the base opened and frozen, the LoRA attached, pictures and words ready."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from lora_core.dtypes import DTYPES
from lora_core.errors import ConfigError
from lora_core.formats import read_adapter
from lora_core.init_names import is_from_base
from lora_core.models import OpenedBase, open_base
from lora_core.pipeline import LivePipeline
from lora_core.train_form import LoraForm, attach, detach
from lora_core.trainable.words import learn_words
from trainers import class_images, events, optim
from trainers.activations import checkpoint_activations
from trainers.average import Average
from trainers.batches import Feeder
from trainers.caches import LatentCache
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dataset import Dataset, Example
from trainers.diffusion import NoiseSchedule
from trainers.finish import try_spelling
from trainers.held_out import Probe, drift_prompts, look_for
from trainers.kept_tensors import FillReport
from trainers.resting import give_back, narrow_tables, rest
from trainers.run_folder import RunFolder
from trainers.scan import scan
from trainers.scan_report import ScanReport, listed
from trainers.training_facts import Ran
from trainers.unchanged import shown
from trainers.words import Words, prompts

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

Find = Callable[[TrainConfig, LivePipeline, StopRequest, events.Emit], Dataset]
Narrow = Callable[[Dataset, tuple[Example, ...]], tuple[Dataset, tuple[Example, ...]]]


@dataclass
class Bench:
    """What the steps work with."""

    config: TrainConfig
    folder: RunFolder
    opened: OpenedBase
    live: LivePipeline
    accelerator: Accelerator
    device: torch.device
    form: LoraForm
    optimizer: torch.optim.AdamW
    schedule: NoiseSchedule
    feeder: Feeder
    words: Words
    generator: torch.Generator
    emit: events.Emit
    checkpointed: bool  # gradients', of activations
    average: Average | None
    base_words: Words  # of the base model: called with the LoRA off
    prompts: list[str] | None  # all there can be; None: there is no end of them
    held_out: tuple[Example, ...]
    shown: dict[str, str]  # what a state to resume from knows of the pictures and the base
    probe: Probe | None = None  # made when all else is ready
    measured: events.Measured | None = None  # the last time
    pieces: int = 1  # of each batch, one after the other: more where memory is short

    def averaged(self, wanted: bool) -> AbstractContextManager[None]:
        """Inside, the LoRA is its average, if that is wanted and there is one."""
        return self.average.worn() if wanted and self.average is not None else nullcontext()

    def ran(self, step: int) -> Ran:
        return Ran(step, self.folder.began, MIXED[precision(self.config)])


def prepare(
    config: TrainConfig,
    folder: RunFolder,
    stop: StopRequest,
    emit: events.Emit,
    *,
    find: Find | None = None,
    narrow: Narrow = lambda dataset, held_out: (dataset, held_out),
) -> Bench:
    """`find`: the pictures, in place of `find_pictures`; `narrow`: which of them, and of those that are held out, the
    bench is made ready for."""
    torch.manual_seed(config.seed)
    name = precision(config)
    accelerator = Accelerator(mixed_precision=MIXED[name])
    quantize = None if config.train.quantize == "none" else config.train.quantize
    prediction = None if config.prediction == "auto" else config.prediction
    opened = open_base(
        config.base, device=accelerator.device, dtype=DTYPES[name], quantize=quantize, prediction=prediction
    )
    for note in opened.notes:
        emit(events.Note(text=note))
    if opened.quantised is not None:
        emit(events.Note(text=str(opened.quantised)))
    pipeline = opened.pipeline
    live = LivePipeline(pipeline, opened=opened)
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler).to(accelerator.device)
    stop.check()
    whole, held_out = look_for(config, (find or find_pictures)(config, live, stop, emit))
    check_words_are_used(config, whole)
    dataset, held_out = narrow(whole, held_out)
    stop.check()
    if config.train.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    form = attach_lora(config, live, opened)
    try_spelling(config, form, opened, emit)
    if config.train.gradient_checkpointing:
        checkpoint_activations(live)
    cache = None
    if config.train.cache_latents:
        cache = LatentCache(folder.cache, pipeline.vae)
        pictures = replace(dataset, instances=(*dataset.instances, *held_out))
        filled = cache.fill(pictures, lambda done, total: stop.check())
        say_filled("Latents", filled, emit)
    said, complete = prompts((*whole.examples, *held_out))
    of_class = {d.class_prompt or "" for d in config.datasets if d.class_from == "model"}
    met = said if dataset is whole else prompts((*dataset.examples, *held_out))[0]
    known = sorted(of_class.union(met))
    kept = folder.cache if config.train.cache_text else None
    words = Words(live.pipeline, accelerator.device, form=form, folder=kept)
    for cut in words.cut(sorted(of_class.union(said))):
        emit(events.Note(text=str(cut)))
    base_words = Words(live.pipeline, accelerator.device, folder=folder.cache)
    if as_base := sorted({*drift_prompts(config), *of_class}):
        with form.disabled():
            for component in words.components:
                base_words.freeze(component, as_base, stop.check)
    rates = {c: config.train.rate_of(c) for c in trained_components(config, live)} | config.train.rates
    groups = form.parameter_groups(rates, ratio=config.train.lora_plus_ratio)
    if form.words is not None:
        groups.append(form.words.group(config.train.new_token_learning_rate))
    optimizer = optim.adamw(groups, weight_decay=config.train.weight_decay)
    feeder = Feeder(
        dataset,
        pipeline.vae,
        cache,
        batch_size=config.train.batch_size,
        prior_weight=config.data.prior_weight,
        seed=config.seed,
        noise={"offset": config.train.noise_offset, "pyramid": config.train.pyramid_noise},
        mask_floor=config.data.mask_floor,
    )
    generator = torch.Generator("cpu").manual_seed(config.seed)
    bench = Bench(
        config,
        folder,
        opened,
        live,
        accelerator,
        accelerator.device,
        form,
        optimizer,
        schedule,
        feeder,
        words,
        generator,
        emit,
        config.train.gradient_checkpointing,
        Average(form, config.train.ema_decay) if config.train.ema_decay else None,
        base_words,
        known if complete else None,
        held_out,
        shown(feeder, live.models),
    )
    for component in words.components:
        if component not in trained_components(config, live) and not config.lora.new_tokens:
            keep_words(bench, component, stop.check)
    if cache is not None:
        rest(bench, "vae")
    narrow_tables(bench)
    give_back()
    return bench


def precision(config: TrainConfig) -> str:
    """The base's precision; "auto" is bf16 where the card has it, fp16 on older cards, fp32 on a CPU."""
    wanted = config.train.base_dtype
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        return ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if cuda else "fp32"
    if wanted == "fp16" and not cuda:
        raise ConfigError(
            'train.base_dtype = "fp16" needs a GPU, and none was found. Set it to "bf16", "fp32" or "auto".'
        )
    return wanted


def find_pictures(config: TrainConfig, live: LivePipeline, stop: StopRequest, emit: events.Emit) -> Dataset:
    """The dataset, with the class pictures made first; every file of the folders is accounted for in Notes."""
    resolution = config.data.resolution or live.resolution
    if any(
        d.class_count for d in config.datasets
    ):  # folders are looked at before the base spends time on pictures
        no_class = {"class_images": None, "class_count": 0, "class_prompt": None}
        scan(config.data, resolution, datasets=[d.model_copy(update=no_class) for d in config.datasets])
    datasets = []
    for settings in config.datasets:
        sized = settings.model_copy(update={"resolution": settings.resolution or resolution})
        folder = class_images.class_folder(sized, config.output, class_images.base_path(live))
        if folder is not None:
            class_images.fill(folder, sized, config.preview, live, stop, emit)
        datasets.append(sized.model_copy(update={"class_images": folder}))

    def say(report: ScanReport) -> None:
        emit(events.Note(text=f"{report.folder.name}: {report}"))

    return scan(config.data, resolution, datasets=datasets, report=say)


def keep_words(bench: Bench, component: str, check: Callable[[], None] = lambda: None) -> None:
    """The encoder is as it will stay: its prompts are encoded, and it leaves the device if these are all."""
    filled = bench.words.freeze(component, bench.prompts, check)
    say_filled(f"Prompts ({component})", filled, bench.emit)
    if bench.prompts is not None and bench.config.train.cache_text:
        rest(bench, component)


def say_filled(what: str, filled: FillReport, emit: events.Emit) -> None:
    if filled.built or filled.found:
        emit(events.Note(text=f"{what}: {filled}."))
    for name in filled.rebuilt:
        emit(
            events.Note(text=f"{what}: what was kept of {name} was damaged or not finite, and was made anew.")
        )
    for name, reason in filled.unsaved.items():
        emit(events.Note(text=f"{what}: {name} is kept in memory only: {reason}"))


def trained_components(config: TrainConfig, live: LivePipeline) -> list[str]:
    return [c for c in live.models if config.train.rate_of(c) != 0]


def attach_lora(config: TrainConfig, live: LivePipeline, opened: OpenedBase) -> LoraForm:
    names = trained_components(config, live)
    check_settings_have_their_component(config, names)
    start = read_adapter(config.lora.start_from) if config.lora.start_from else None
    # what is taken from the base must come out the same when a run is resumed: the state builds upon it
    generator = torch.Generator(opened.pipeline.device).manual_seed(config.seed)
    form = attach(
        {c: live.models[c] for c in names},
        {c: config.lora.lora_config(c) for c in names},
        start=start,
        generator=generator if is_from_base(config.lora.init) else None,
        originals=opened.original if opened.quantised else None,
    )
    if config.lora.new_tokens or (start is not None and start.embeddings):
        try:
            learn_words(form, live.pipeline, config.lora.new_tokens, start=start)
        except BaseException:
            detach(form)
            raise
    return form


def check_settings_have_their_component(config: TrainConfig, trained: list[str]) -> None:
    """Raise ConfigError for a rank, alpha or rate of a part that this base has not, or that is not trained."""
    named = {
        "lora.ranks": [*config.lora.ranks],
        "lora.alphas": [*config.lora.alphas],
        "train.rates": [*config.train.rates],
    }
    wanted = {f"{name}.{key}": key.partition(".")[0] for name, keys in named.items() for key in keys}
    if config.train.text_encoder_2_learning_rate:
        wanted["train.text_encoder_2_learning_rate"] = "text_encoder_2"
    for setting, component in wanted.items():
        if component not in trained:
            raise ConfigError(
                f"{setting} is about {component}, and this training has {', '.join(trained)} alone: take it out."
            )


def check_words_are_used(config: TrainConfig, dataset: Dataset) -> None:
    """Raise ConfigError for a new word that no caption has: it would stay what it began as."""
    texts = [
        *(line for e in dataset.instances for line in e.lines),
        *(d.trigger or "" for d in config.datasets),
    ]
    for word in config.lora.new_tokens:
        if not any(word in text for text in texts):
            folders = listed([d.images.name for d in config.datasets])
            raise ConfigError(
                f'lora.new_tokens: "{word}" is in no caption of {folders}, so nothing would teach it. '
                f'Write it there, or in data.prompt, such as "a photo of {word}".'
            )
