"""What a trial finds: facts, faults and what it ran short of, as a table."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Findings:
    """`until`: when the trial is to end (`time.monotonic`)."""

    trial: str
    until: float
    facts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    checks: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    def note(self, name: str, value: object) -> None:
        """A line of the table, said at once, too."""
        self.facts[name] = str(value)
        print(f"  {name}: {value}", flush=True)

    def expect(self, holds: object, otherwise: str) -> bool:
        """Something that has to hold; `otherwise` says what is wrong."""
        self.checks += 1
        if not holds:
            self.faults.append(otherwise)
            print(f"  FAULT: {otherwise}", flush=True)
        return bool(holds)

    def __str__(self) -> str:
        load = " ".join(f"{x:.1f}" for x in os.getloadavg())
        facts = self.facts | {
            "checks": f"{self.checks}, of which {len(self.faults)} failed",
            "time": f"{time.monotonic() - self.began:.0f} s on {os.cpu_count()} cores, load {load}",
        }
        lines = [f"| {self.trial} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
        return "\n".join([*lines, *(f"FAULT: {fault}" for fault in self.faults)])
