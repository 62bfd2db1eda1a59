"""study.json, the page's numbers as JSON: written with the page, and read for arms that are not trained again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study.arm import arm_from
from study.links import LinkTimes, TimeToLoss
from study.plan import PlannedArm
from study.results import ArmResult, CurvePoint

__all__ = ["StudyNumbers"]


@dataclass(frozen=True)
class StudyNumbers:
    """What a page shows.

    Args:
        sources: of the data, by task.
        arms: the finished ones.
        unfinished: names of the others.
        links: times of steps; None: they were not measured.
        to_loss: what follows from them.
    """

    sources: Mapping[str, str]
    arms: Sequence[ArmResult]
    unfinished: Sequence[str] = ()
    links: LinkTimes | None = None
    to_loss: Sequence[TimeToLoss] = ()

    @classmethod
    def load(cls, path: Path) -> StudyNumbers | None:
        """What `save` wrote; None: there is no such file. Raises OSError, and ValueError if it is another file."""
        try:
            read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            links = read["links"]
            return cls(
                read["sources"],
                [_result_from(row) for row in read["arms"]],
                read["unfinished"],
                None if links is None else LinkTimes.of(links),
                () if links is None else [TimeToLoss(**each) for each in links["to_loss"]],
            )
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has no numbers of a study ({error!r}); delete it, and train all arms") from None

    def save(self, path: Path) -> None:
        """Raises OSError."""
        rows = [{**asdict(each), "held_out_loss": each.held_out_loss} for each in self.arms]
        times = [asdict(each) for each in self.to_loss]
        links = None if self.links is None else {**asdict(self.links), "to_loss": times}
        told = {"sources": dict(self.sources), "unfinished": list(self.unfinished), "arms": rows, "links": links}
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def of_plan(self, planned: PlannedArm, sources: Mapping[str, str]) -> ArmResult | None:
        """The result of just this arm on just these data; None: it is not there."""
        task = planned.template.task
        if self.sources.get(task) != sources[task]:
            return None
        found = (each for each in self.arms if each.name == planned.name)
        return next((each for each in found if each.planned.template == planned.template), None)


def _result_from(row: Mapping[str, Any]) -> ArmResult:
    told: dict[str, Any] = dict(row)
    del told["held_out_loss"]
    told["planned"] = PlannedArm(**{**told["planned"], "template": arm_from(told["planned"]["template"])})
    told["curve"] = tuple(CurvePoint(**point) for point in told["curve"])
    told["tuning"] = tuple((rate, loss) for rate, loss in told["tuning"])
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return ArmResult(**values)
