"""A smaller vocabulary: which tokens stay, and the tokenizer rewritten to match.

    from hf_ws import AutoSubclone, choose_vocabulary, trim_tokenizer

    vocabulary = choose_vocabulary(tokenizer, texts, 8000)
    model = AutoSubclone.from_pretrained("gpt2", vocab=vocabulary)
    tokenizer = trim_tokenizer(tokenizer, vocabulary)

Kept tokens keep their order, so that new ids are dense and ascending. Every text that the source's tokenizer spells,
the new one spells too, if with more tokens: what single letters or bytes it takes always stays. A text whose tokens
are all kept has the same tokens as before.

An algorithm is a row of `ALGORITHMS`, one file each.
"""

from hf_ws.vocabulary.choose import BY_COUNT, Vocabulary, choose_vocabulary, kept_tokens, warn_of_first_ids
from hf_ws.vocabulary.ids import renumbered, token_ids
from hf_ws.vocabulary.rewrite import ALGORITHMS, trim_tokenizer, write_tokenizer

__all__ = [
    "ALGORITHMS",
    "BY_COUNT",
    "Vocabulary",
    "choose_vocabulary",
    "kept_tokens",
    "renumbered",
    "token_ids",
    "trim_tokenizer",
    "warn_of_first_ids",
    "write_tokenizer",
]
