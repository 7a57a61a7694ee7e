"""`petiole vqa fit`: give eyes to a language model, and train them on questions."""

import re
from pathlib import Path
from typing import Annotated

import typer

from . import _language as lm
from . import _recipe as how
from ._options import AsJson, leave_processes
from ._run import goes_on, is_main


def fit(
    source: lm.Questions,
    language_model: lm.LanguageModel,
    images: lm.ImagesOfQuestions = None,
    eyes: Annotated[
        str, typer.Option("--eyes", "-e", help="Image encoder: `micro` (bundled) or a timm name with its tag")
    ] = "micro",
    block: Annotated[int, typer.Option(help="Block of the encoder whose patches are taken; -1 is the last")] = -2,
    scales: Annotated[
        str, typer.Option(help="Sides of the squares of patches that are averaged, e.g. 1,2: 256 + 64 of 16 x 16")
    ] = "1",
    class_token: Annotated[
        bool, typer.Option("--class-token", help="Put each image's class token in front of a decoder's text as well")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="key=value for MemVP, e.g. slots=320, hidden=128, scale=0.1; repeatable"),
    ] = None,
    eyes_method: Annotated[
        str | None, typer.Option("--eyes-method", help="Method that adapts the encoder as well, e.g. adaptformer")
    ] = None,
    eyes_settings: Annotated[
        list[str] | None, typer.Option("--eyes-set", help="key=value for that method; repeatable")
    ] = None,
    captions: lm.Captions = False,
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt, with {question} where the question goes and \\n for a new line "
            "[default: Question: {question}\\nAnswer:, for ScienceQA {question}]"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The language model's: auto (that of its weights), float32, bfloat16 or float16")
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder [default: runs/DATA-memvp]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training questions")] = 20,
    batch_size: Annotated[int, typer.Option(help="Questions per step, over all processes", min=1)] = 32,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate [default: 9e-3 * batch size / 256]")] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay, not of biases and gains")] = 0.02,
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of warm-up, at most a tenth of the run")] = 2,
    label_smoothing: how.LabelSmoothing = None,
    precision: how.Precision = None,
    select: how.Select = None,
    eval_every: how.EvalEvery = None,
    seed: how.Seed = None,
    normalize: how.Normalize = None,
    resize: how.Resize = None,
    train_on: how.TrainOn = None,
    checkpoint: how.Checkpoint = None,
    save_every: Annotated[float, typer.Option(help="Seconds between two writes of the state")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Train a frozen language model's eyes.

    They learn from questions on images, and are kept as a file. The same command continues a run that was stopped.
    Under `accelerate launch -m petiole vqa fit ...` or `torchrun -m petiole vqa fit ...` it uses every process.
    """
    given = how.read_fields(locals())
    from dataclasses import replace

    from ..backbones.bundled import backbone as build
    from ..joining import adapt
    from ..plugins.memvp import MemVP
    from ..tasks.questions import open_questions
    from ..train.evaluate import num_trained
    from ..train.run import PLUGIN
    from ..vision_language.learning import answer_recipe, fit_answers
    from ..vision_language.sighted import give_eyes
    from . import _show
    from ._options import build_plugin, defaults_of, read_words

    recipe, sides = replace(answer_recipe(batch_size), **given), lm.read_scales(scales)
    plugin = MemVP(**read_words("memvp", settings or [], defaults_of(MemVP)))
    adapters = [build_plugin(eyes_method, eyes_settings or [])] if eyes_method else []
    task = open_questions(source, images=images, captions=captions, seed=recipe.seed)
    encoder = adapt(build(eyes), *adapters, seed=recipe.seed)
    model_itself, tokenizer = lm.load_language_model(language_model, dtype)
    model = give_eyes(
        model_itself, encoder, plugin, block=block, scales=sides, class_token=class_token, seed=recipe.seed
    )
    folder = out or Path("runs") / re.sub(r"[^\w.-]+", "-", f"{task.name}-memvp")
    if is_main():
        about = f"{len(task.train or ())} questions, {num_trained(model):,} trained parameters"
        _show.say(f"{model} on {task.name}: {about}, into {folder}")
    prompt = template.replace("\\n", "\n") if template is not None else lm.template_of(source)
    with goes_on(folder):
        result = fit_answers(model, tokenizer, task, recipe, template=prompt, out=folder, save_every=save_every)
    if is_main():
        file, metrics = folder / PLUGIN, result.metrics
        if as_json:
            _show.as_json({**metrics, "num_bytes": file.stat().st_size, "file": str(file)})
        else:
            scores = {key: value for key, value in metrics.items() if key.startswith(("val_", "test_"))}
            columns = ("memory", *(key.replace("_", " ") for key in scores), "best epoch", "parameters", "file")
            cells = [f"{value:.3f}" if key.endswith("cider") else f"{value:.2%}" for key, value in scores.items()]
            counts = (f"{metrics['best_epoch']:.0f}", f"{metrics['trained_parameters']:,.0f}")
            _show.table(columns, [("MemVP", *cells, *counts, _show.size(file.stat().st_size))])
        _show.say(f"plugin: {file}")
    leave_processes()
