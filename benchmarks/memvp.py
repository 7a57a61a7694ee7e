"""What it costs a language model to see: images in memory, against images in the input and no images at all.

    python benchmarks/memvp.py                      # 8 layers of width 1,024, one CPU thread
    python benchmarks/memvp.py --shape 7b           # a GPU with bf16
    python benchmarks/memvp.py --known --out benchmarks/results/memvp.jsonl

A LLaMA with random weights, which cost what trained ones cost, and 256 given image features, as CLIP ViT-L/14 has. The
contestants of a text length take turns in one process, in an order drawn anew for each round; a turn is set against the
one of text alone in the same round, and the median of the rounds counts. Time is processor time of this process on one
CPU thread, wall-clock time otherwise.

`step` is a training step: forward, backward, optimizer. For text alone, where nothing is trained, it is forward, and
backward through every layer. `prefill` is the pass over the prompt of one text that fills the cache, `decode` the one
for a further token; `x` is over text alone. LoRA is only there in training, for it can be merged. `MACs` is the
promise, the ratio of the multiply-accumulate operations of layers and projector. `[MiB]` is what a pass needs at most
beside what was there before: memory allocated on a GPU, resident memory of a fresh process on a CPU (Linux). Bold is
what misses its aim. Every row is a line of a journal: a stopped run goes on where it was, and `--known` prints what
there is.
"""

import argparse
import inspect
import itertools
import multiprocessing
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import petiole as pt
from input_space import InputSpace, num_trained, rank_for
from petiole.core.twin import twin
from protocol import Journal
from tokens import DTYPES, Clock, setting, table

# the published sizes of LLaMA-7B and TinyLlama-1.1B; the vocabularies of the others keep the output layer's share small
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "wide": (4096, 11008, 2, 32, 32, 4096),
    "small": (1024, 2752, 8, 16, 16, 4096),
    "tiny": (32, 64, 2, 4, 4, 64),
}
TEXT, MEMORY, INPUT = NAMES = ("text", "MemVP", "input")
NUM_FEATURES, D_IMAGE, HIDDEN, SLOTS = 256, 1024, 128, 320
# aims: a prefill over text alone, and how much faster a step is than in the input with 64 tokens of text
PREFILL_BAR, STEP_BAR, BAR_LENGTH = 1.03, 1.7, 64
Row = Mapping[str, Any]
# versions of transformers call it by two names
CACHE = next(n for n in ("cache", "past_key_values") if n in inspect.signature(LlamaForCausalLM.forward).parameters)


def config_of(shape: str) -> LlamaConfig:
    """Returns the sizes of a language model."""
    return LlamaConfig(**dict(zip((*SIZES, "vocab_size"), SHAPES[shape], strict=True)))


class TextOnly(nn.Module):
    """A frozen language model that sees nothing; in training its backward pass runs through every layer."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model: Any = twin(language_model)

    def forward(self, *, features: Tensor, input_ids: Tensor, **texts: Any) -> Any:
        if not self.training:
            return self.language_model(input_ids=input_ids, **texts)
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=embeddings.detach().requires_grad_(), **texts)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())


@dataclass
class Cell:
    """A contestant with texts of a length, and what is done with it.

    Args:
        model: Takes features and texts.
        features: `[B, 256, 1024]`.
        ids: `[B, L]`.
    """

    model: Any
    features: Tensor
    ids: Tensor

    def step(self) -> Callable[[], object]:
        """Returns a training step."""
        self.model.train()
        trained = [p for _, p in self.model.trained()]
        optimizer = torch.optim.AdamW(trained) if trained else None

        def run() -> None:
            with torch.enable_grad():
                self.model(features=self.features, input_ids=self.ids, labels=self.ids).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return run

    def prefill(self) -> Callable[[], Any]:
        """Returns a pass over one prompt, with what generation needs of it."""
        self.model.eval()
        features, ids = self.features[:1], self.ids[:1]
        return partial(self.model, features=features, input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(self) -> Callable[[], object]:
        """Returns a pass over the first token behind one prompt, again and again."""
        cache = getattr(self.prefill()(), CACHE)
        token = self.ids[:1, :1]
        bound: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(self.model, pt.Sighted):
            # once for a whole generation
            bound = partial(self.model.binding.bind, self.model.memory(features=self.features[:1]))

        def run() -> None:
            with bound():
                self.model.language_model(input_ids=token, **{CACHE: cache}, use_cache=True)
            cache.crop(-1)

        return run

    def cache_bytes(self) -> int:
        """Returns the size of one prompt's cache."""
        layers = getattr(self.prefill()(), CACHE).layers
        return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def contestants(args: argparse.Namespace) -> tuple[LlamaConfig, dict[str, dict[str, nn.Module]]]:
    """Returns the language model's sizes, and each contestant as it is trained and as it answers."""
    torch.manual_seed(0)
    config = config_of(args.shape)
    with torch.device(args.device):
        llama = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype]).requires_grad_(False)
    text = TextOnly(llama)
    memory = pt.give_eyes(llama, None, pt.MemVP(slots=SLOTS, hidden=HIDDEN), d_image=D_IMAGE, prove=False)
    rank = rank_for(num_trained(memory), llama, d_image=D_IMAGE, hidden=HIDDEN)
    prompts = InputSpace(llama, None, d_image=D_IMAGE, hidden=HIDDEN, rank=rank)
    print(f"trained: MemVP {num_trained(memory):,}, input with LoRA of rank {rank} {num_trained(prompts):,}")
    merged = InputSpace(llama, None, d_image=D_IMAGE, hidden=HIDDEN, rank=0)
    training, answering = {TEXT: text, MEMORY: memory, INPUT: prompts}, {TEXT: text, MEMORY: memory, INPUT: merged}
    return config, {"step": training, "prefill": answering, "decode": answering}


def macs(config: LlamaConfig, phase: str, name: str, length: int) -> int:
    """Returns the multiply-accumulate operations of layers and projector, for a text or for one token behind it."""
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    seen = length + NUM_FEATURES * (name == INPUT)
    each = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size + 2 * d * seen + 2 * d * SLOTS * (name == MEMORY)
    if phase == "decode":
        return config.num_hidden_layers * each
    return config.num_hidden_layers * seen * each + (name != TEXT) * NUM_FEATURES * HIDDEN * (D_IMAGE + d)


def rounds(runs: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the time of each contestant in each round [s]."""
    clock, times, counts = Clock(args.device, args.threads), {name: [] for name in runs}, {}
    for name, run in runs.items():
        clock.turn(run, 1)  # the first call fetches memory and chooses kernels
        counts[name] = max(1, round(args.seconds / max(clock.turn(run, 1), 1e-6)))
    for i in range(args.rounds):
        for name in random.Random(i).sample(list(runs), len(runs)):
            times[name].append(clock.turn(runs[name], counts[name]))
    return times


def timed(runs: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns time [s] of each contestant, and its ratio to text alone and to memory in the same round."""
    times, found = rounds(runs, args), {}
    for name, own in times.items():
        over = {other: sorted(a / b for a, b in zip(own, times[other], strict=True)) for other in (TEXT, MEMORY)}
        ratios = {f"over_{other}": statistics.median(values) for other, values in over.items()}
        spread = {"lowest": over[TEXT][0], "highest": over[TEXT][-1], "rounds": args.rounds}
        found[name] = {"seconds": statistics.median(own), **ratios, **spread}
    return found


def peak(make: Callable[[], Callable[[], object]], device: str) -> float:
    """Returns what a pass needs at most beside what was there before it [bytes]; not a number where unknown."""
    if device == "cuda":
        run = make()
        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    process = context.Process(target=_peak_of_this_process, args=(make, found))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the process that measures memory failed, exit code {process.exitcode}")
    return found.get()


def _peak_of_this_process(make: Callable[[], Callable[[], object]], found: Any) -> None:
    run = make()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    run()
    found.put(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def tables(rows: Iterable[tuple[Row, Row]]) -> Iterator[str]:
    """Yields a table in Markdown for each setting and text length."""
    groups: dict[tuple[tuple[str, Any], ...], dict[tuple[str, str], Row]] = {}
    for run, found in rows:
        shared = {key: value for key, value in run.items() if key not in ("phase", "contestant")}
        groups.setdefault(tuple(shared.items()), {})[run["phase"], run["contestant"]] = found
    for shared, group in groups.items():
        about = dict(shared)
        config, length = config_of(about["shape"]), about["length"]
        head = ["", "step [ms]", "x", "MACs", "[MiB]", "prefill [ms]", "x", "MACs", "[MiB]"]
        head += ["decode [ms]", "x", "MACs", "cache [MiB]"]
        cells = [line(config, name, length, group) for name in NAMES]
        faster = group["step", INPUT][f"over_{MEMORY}"]
        mark = "**" * (length == BAR_LENGTH and faster < STEP_BAR)
        verdict = f"A step of MemVP is {mark}{faster:.2f}{mark} times as fast as one in the input."
        yield ", ".join(f"{key} {value}" for key, value in shared) + f"\n\n{table(head, cells)}\n\n{verdict}"


def line(config: LlamaConfig, name: str, length: int, group: Mapping[tuple[str, str], Row]) -> Sequence[str]:
    """Returns one contestant's line: time, ratio, promise and memory of each phase."""
    cells = [name]
    for phase in ("step", "prefill", "decode"):
        found = group[phase, name]
        promised = macs(config, phase, name, length) / macs(config, phase, TEXT, length)
        mark = "**" * (phase == "prefill" and name == MEMORY and found[f"over_{TEXT}"] > PREFILL_BAR)
        cells += [f"{1e3 * found['seconds']:.1f}", f"{mark}{found[f'over_{TEXT}']:.3f}{mark}", f"{promised:.3f}"]
        if phase != "decode":
            cells.append(f"{group[f'{phase} memory', name]['bytes'] / 2**20:.0f}")
    cache, plain = (group["cache", other]["bytes"] for other in (name, TEXT))
    mark = "**" * (name == MEMORY and cache > plain)
    return [*cells, f"{mark}{cache / 2**20:.2f}{mark}"]


def measure(args: argparse.Namespace, journal: Journal) -> None:
    """Adds to the journal what is not in it: memory first, for a process that has trained cannot be forked."""
    about = {**setting(args), "shape": args.shape, "batch": args.batch}
    config, models = contestants(args)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(args.batch, NUM_FEATURES, D_IMAGE, generator=generator).to(args.device)

    def cell(phase: str, name: str, length: int) -> Cell:
        ids = torch.randint(config.vocab_size, (args.batch, length), generator=torch.Generator().manual_seed(length))
        return Cell(models[phase][name], features, ids.to(args.device))

    def key(phase: str, name: str, length: int) -> dict[str, Any]:
        return {**about, "length": length, "phase": phase, "contestant": name}

    for length, name, phase in itertools.product(args.lengths, NAMES, ("step", "prefill")):
        if key(f"{phase} memory", name, length) not in journal:
            with torch.inference_mode(phase != "step"):
                found = peak(getattr(cell(phase, name, length), phase), args.device)
            journal.add(key(f"{phase} memory", name, length), {"bytes": found})
    for length, name in itertools.product(args.lengths, NAMES):
        if key("cache", name, length) not in journal:
            with torch.inference_mode():
                journal.add(key("cache", name, length), {"bytes": cell("prefill", name, length).cache_bytes()})
    for length, phase in itertools.product(args.lengths, models):
        if all(key(phase, name, length) in journal for name in NAMES):
            continue
        with torch.inference_mode(phase != "step"):
            times = timed({name: getattr(cell(phase, name, length), phase)() for name in NAMES}, args)
        for name, found in times.items():
            journal.add(key(phase, name, length), found)
        print(f"{phase}, {length} tokens of text: done", flush=True)


def options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default="64,128,256")
    parser.add_argument("--batch", type=int, help="texts of a training step; 8 on a GPU, 1 on a CPU by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU for 7b and 1b by default")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on a CPU, bf16 on a GPU by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of a turn [s]")
    parser.add_argument("--out", type=Path, default=Path("runs/memvp.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    parser.set_defaults(compile="off")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.shape in ("7b", "1b") else "cpu")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    args.batch = args.batch or (1 if args.device == "cpu" else 8)
    return args


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    journal = Journal(args.out)
    if not args.known:
        measure(args, journal)
    print("\n\n".join(tables(journal.runs())))


if __name__ == "__main__":
    main()
