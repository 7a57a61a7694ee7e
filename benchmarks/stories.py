"""A real language model of 260,032 parameters and its tokenizer, as an ordinary transformers folder.

    python benchmarks/stories.py --data ../shared/data --out runs/stories260K

It is small enough to measure, on two CPU cores, what eyes do for a model that has learnt a language: short stories in
simple English. Its file holds the weights as they were trained: linear maps of all blocks stacked, the embedding that
the output shares, and rotary pairs of neighbours, (0, 1), (2, 3), ..., where transformers pairs the halves of a head.
The pieces of its tokenizer come in the order of their ids, which is the order in which byte-pair encoding merges them.
A text ends with the token that begins one: in training the stories followed each other, and </s> never occurred.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNKNOWN, BEGIN, _ = SPECIAL = ("<unk>", "<s>", "</s>")
# transformers' name of each matrix of a block
NAMES = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def data_folder() -> Path:
    """Returns the folder of data and weights that `PETIOLE_DATA` names."""
    return Path(os.environ.get("PETIOLE_DATA", "../shared/data"))


def language_model(data: Path) -> LlamaForCausalLM:
    """Returns the model in eval mode, float32."""
    arrays = dict(np.load(data / "weights" / "stories260K.npz", allow_pickle=False))
    sizes = dict(zip(arrays.pop("config_names").tolist(), arrays.pop("config").tolist(), strict=True))
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    embedding = tensors["tok_embeddings"]
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": tensors["norm"]}
    for name, theirs in NAMES.items():
        for i, weight in enumerate(tensors[name]):
            rows = halved(weight, config.head_dim) if name in ("wq", "wk") else weight
            state[f"model.layers.{i}.{theirs}.weight"] = rows
    model.load_state_dict(state)
    return model.eval()


def halved(weight: Tensor, head_dim: int) -> Tensor:
    """Returns the rows of each head in the order 0, 2, 4, ..., 1, 3, 5, ...: partners half a head apart."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer: byte-pair encoding, a begin token first; what no piece covers becomes bytes."""
    pieces = json.loads((data / "weights" / "tok512.json").read_text(encoding="utf8"))
    pieces = [*SPECIAL, *(piece.replace(" ", "▁") for piece in pieces[len(SPECIAL) :])]
    ids = {piece: i for i, piece in enumerate(pieces)}
    # by their ids: a pair is merged the sooner, the earlier the piece that it makes
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[len(SPECIAL) + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    fast = Tokenizer(models.BPE(ids, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])])
    names: dict[str, Any] = {"unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": BEGIN, "pad_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", model_max_length=512, **names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder with weights/ [$PETIOLE_DATA]")
    parser.add_argument("--out", type=Path, default=Path("runs/stories260K"))
    args = parser.parse_args()
    model, words = language_model(args.data), tokenizer(args.data)
    model.save_pretrained(args.out)
    words.save_pretrained(args.out)
    story = model.generate(**words("", return_tensors="pt"), max_new_tokens=100, do_sample=False)
    print(f"{model.num_parameters():,} parameters in {args.out}; its story:\n{words.decode(story[0, 1:])}")


if __name__ == "__main__":
    main()
