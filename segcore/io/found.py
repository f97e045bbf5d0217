"""What the finding of scenes comes to: their URIs, and what was named and led nowhere."""

from __future__ import annotations

from dataclasses import dataclass

from segcore.errors import SceneError


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a list, a pattern, a catalog or a search led to and that is no scene: what, and why not."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """The URIs of scenes, absolute, each once, in the order in which they were named; and the problems on the way."""

    uris: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    def strict(self) -> tuple[str, ...]:
        """The URIs, for a caller who cannot go on without some of them. Raises SceneError where there is a problem."""
        if self.problems:
            first, others = self.problems[0], len(self.problems) - 1
            more = f" ({others} more like it)" if others else ""
            raise SceneError(f"{first.what}: {first.reason}{more}")
        return self.uris
