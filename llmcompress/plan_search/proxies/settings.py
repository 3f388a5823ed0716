"""What a search file says about judging candidates as they would be after some healing, and the judge that follows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmcompress.calibration.whole import WholeModel
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.proxies.base import Candidates, Change, ChangedJudge, StreamedJudge, Text, TextJudge
from llmcompress.plan_search.proxies.flash import with_short_trainings
from llmcompress.plan_search.proxies.healing import Healing, HealingSettings


class ProxySettings(BaseModel):
    """What is done to candidates before they are judged; by default nothing.

    A bench must be made of `space_of(space)`, then `judge` judges on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    heal: HealingSettings | None = None
    """Block-local healing; null: none."""
    flash: float | None = Field(default=None, gt=0, lt=1, examples=[0.05])
    """Share of the steps that trainings of `after` take while plans are compared (flash distillation); null: all."""

    def space_of(self, space: PlanSpace) -> PlanSpace:
        """The space in whose candidates plans are judged; plans mean the same.

        Raises: CompressError where `flash` is set and nothing trains.
        """
        return space if self.flash is None else with_short_trainings(space, self.flash)

    def judge(
        self, candidates: Candidates[Text], windows_NT: Tensor, whole: WholeModel, space: PlanSpace
    ) -> TextJudge[Text]:
        """On the first of these windows; candidates learn from the calibration windows of `whole`."""
        changes: list[Change] = [] if self.heal is None else [Healing(whole, space, self.heal)]
        return ChangedJudge(candidates, windows_NT, changes) if changes else StreamedJudge(candidates, windows_NT)
