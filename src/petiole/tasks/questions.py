"""Questions on images with their answers, for language models that see.

open_questions("shapes.jsonl.gz", images="shapes.npz")   a row per question, images of a pack or a folder
open_questions("scienceqa/")                             ScienceQA: problems.json, pid_splits.json
open_questions("vqa/")                                   VQAv2: *questions*.json, *annotations*.json
open_questions("coco/")                                  COCO captions: annotations/captions_*.json, dataset_coco.json
"""

from pathlib import Path

from ..errors import TaskError
from .question import QuestionTask

_LOOKED_FOR = (
    "looked for a file .jsonl or .jsonl.gz and for a folder with problems.json (ScienceQA), *questions*.json (VQAv2), "
    "dataset_coco.json or annotations/captions_*.json (COCO captions)"
)


def open_questions(
    source: str | Path, *, images: str | Path | None = None, captions: bool = False, seed: int = 0
) -> QuestionTask:
    """Returns the questions in a file or a folder. No image is decoded.

    A `.jsonl` or `.jsonl.gz` file has a row `{"image", "question", "answer"}` per question. `image` is a path, the
    number of an image in a pack or its id there, a list of these, or null for none; `answer` is a string, a list of
    strings, or null. `split` (train, val or test), `options` (strings) and `id` may be there.

    A folder is ScienceQA where it has `problems.json`, VQAv2 where it has `*questions*.json`, and COCO captions where
    it has `dataset_coco.json` (Karpathy's splits) or `annotations/captions_*.json`, looked for in this order.

    Where a source has no val part, a fifth of the training images, with their questions, becomes val; where it has no
    parts at all, a fifth of all becomes test first. Images that share a question are never torn apart.

    Args:
        source: The file or the folder.
        images: Where the images are: a `.npz` pack with `data`, `offsets` and maybe `ids`, for rows alone, or a
            folder. None for the folder that `source` is, or is in.
        captions: Whether ScienceQA's `captions.json`, what a model said on each image, joins the context.
        seed: Which images are cut off.

    Raises:
        TaskError: Nothing of this kind is there, it is damaged or contradicts itself, or images are missing.
    """
    path = Path(source).expanduser()
    place = None if images is None else Path(images).expanduser()
    if place is not None and not place.exists():
        raise TaskError(f"there is no file or folder {place} to take the images from")
    is_science = (path / "problems.json").is_file()
    if captions and not is_science:
        raise TaskError(f"captions join the context of ScienceQA only, and {path} has no problems.json")
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        from .question_rows import read_rows

        return read_rows(path, place, seed)
    if not path.is_dir():
        raise TaskError(f"there are no questions in {path}: {_LOOKED_FOR}")
    if place is not None and not place.is_dir():
        raise TaskError(f"the images of {path} lie in a folder, got {place}: a pack goes with .jsonl rows")
    if is_science:
        from .science_qa import read_science_qa

        return read_science_qa(path, place, captions, seed)
    return _open_coco(path, place, seed)


def _open_coco(path: Path, images: Path | None, seed: int) -> QuestionTask:
    from .coco import read_captions, read_karpathy, read_vqa

    if any(path.glob("*questions*.json")):
        return read_vqa(path, images, seed)
    if (path / "dataset_coco.json").is_file():
        return read_karpathy(path, images, seed)
    if any(path.glob("annotations/captions_*.json")):
        return read_captions(path, images, seed)
    raise TaskError(f"there are no questions in {path}: {_LOOKED_FOR}")
