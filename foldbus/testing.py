"""For tests of users' own code: sagas against scripted answers, without broker, database or event loop.

Deciders and projections need no kit: call `decide`, `evolve` and the fold.
"""

from sagas.errors import NotDeterministic
from sagas.testing import NO_ANSWER, After, Answer, Answers, Cancelled, Died, NoAnswer, Played, Unknown, drive

__all__ = [
    "NO_ANSWER",
    "After",
    "Answer",
    "Answers",
    "Cancelled",
    "Died",
    "NoAnswer",
    "NotDeterministic",
    "Played",
    "Unknown",
    "drive",
]
