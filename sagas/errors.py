"""What can go wrong in a saga: failures of a step, which a saga may catch, and mistakes, which park it."""

from __future__ import annotations

from bus.errors import FoldbusError
from bus.messages import Refused


def told(refusal: Refused) -> str:
    """Its code, and its message where that says more."""
    return refusal.code if refusal.message in ("", refusal.code) else f"{refusal.code}: {refusal.message}"


class SagaError(FoldbusError):
    """Root of the sagas' errors."""


class StepFailed(SagaError):
    """A step was not done, or nobody knows whether it was. Leaving the saga, it compensates.

    `reason` says why in words, `path` is the step's place in the saga's history and `command_type` what it asked for
    (both empty when a saga raises one itself, which is the way to give up). `unknown` is True when the step may have
    happened all the same: then it is undone whatever the saga does next.
    """

    unknown = False

    def __init__(self, reason: str, *, path: str = "", command_type: str = "") -> None:
        super().__init__(f"{command_type}: {reason}" if command_type else reason)
        self.reason, self.path, self.command_type = reason, path, command_type


class StepRefused(StepFailed):
    """The service said no: `refusal` has its code, message and attributes."""

    def __init__(self, refusal: Refused, *, path: str = "", command_type: str = "") -> None:
        super().__init__(told(refusal), path=path, command_type=command_type)
        self.reason = refusal.message
        self.refusal = refusal


class StepDied(StepFailed):
    """The service gave up on the command; it is in the dead letters there. Certain: not done."""


class StepUnknown(StepFailed):
    """The service gave up on the command after its handler had begun to call the outside world. Unknown, as with a
    timeout: it is undone."""

    unknown = True


class StepCancelled(StepFailed):
    """The command arrived after its own undo and was dropped. Certain: not done."""


class StepTimedOut(StepFailed):
    """No answer within `timeout_s`. Unknown: it may have happened, or may yet happen; it is undone."""

    unknown = True

    def __init__(self, timeout_s: float | None, *, path: str = "", command_type: str = "") -> None:
        super().__init__(f"no answer within {timeout_s:g} s" if timeout_s else "no answer in time",
                         path=path, command_type=command_type)  # fmt: skip
        self.timeout_s = timeout_s


class StepAbandoned(StepFailed):
    """An operator cancelled the saga while the step was under way. Unknown, as with a timeout."""

    unknown = True


class BadSaga(SagaError):
    """A saga is defined or listed wrongly; found when it is defined, nothing was started."""


class BadStep(SagaError):
    """A saga used `run` in a way that cannot work; a bug, so the saga parks."""


class NotDeterministic(SagaError):
    """Replaying a saga's history led somewhere else than living through it did (raised by the test kit)."""


class CannotRun(SagaError):
    """This process cannot run the saga: its definition's version or a type in its history is not here. It parks."""
