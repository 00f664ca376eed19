"""TF-IDF features of texts and of pairs, for the baselines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]"
"""A word, a character of a script without spaces, or a sign: so that no text is without words."""


INVERSE_PENALTY = 4.0
"""C of the regression: the inverse of its L2 penalty."""


class Texts(Protocol):
    """An example with a text, and a second one where it is a pair."""

    @property
    def text(self) -> str: ...

    @property
    def pair(self) -> str | None: ...


def features(train: Sequence[Texts], test: Sequence[Texts]) -> tuple[Any, Any]:
    """Sparse (N, F) features of both: words of the text; of a pair, those of each text and those that both share."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    pairs = train[0].pair is not None
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD)
    words.fit([row.text for row in train] + ([row.pair for row in train] if pairs else []))

    def of(rows: Sequence[Texts]) -> Any:
        first = words.transform([row.text for row in rows])
        if not pairs:
            return first
        second = words.transform([row.pair for row in rows])
        return hstack([first, second, first.multiply(second)]).tocsr()

    return of(train), of(test)


def regression(seed: int) -> "LogisticRegression":
    """A logistic regression, not yet fitted."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=INVERSE_PENALTY, max_iter=1000, random_state=seed)
