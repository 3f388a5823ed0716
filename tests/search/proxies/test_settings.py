"""What a search file says decides in which way candidates are judged."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmcompress.errors import CompressError
from llmcompress.plan_search.proxies.base import ChangedJudge, StreamedJudge
from llmcompress.plan_search.proxies.settings import ProxySettings
from tests.search.proxies.candidates import SPACE, candidates, judged_windows


def test_without_settings_candidates_are_judged_as_they_are():
    bench = candidates()
    judge = ProxySettings().judge(bench, judged_windows(), bench.whole, bench.space)
    assert isinstance(judge, StreamedJudge) and ProxySettings().space_of(bench.space) is bench.space


def test_healing_and_short_trainings_are_asked_for_by_two_keys():
    after = {"none": [], "trained": [{"recover": {"training": {"steps": 20, "batch": 2}}}]}
    bench = candidates({**SPACE, "after": after})
    settings = ProxySettings.model_validate({"heal": {"steps": 2}, "flash": 0.1})
    judge = settings.judge(bench, judged_windows(), bench.whole, bench.space)
    assert isinstance(judge, ChangedJudge) and "healed" in judge.fingerprint
    assert settings.space_of(bench.space).space.after["trained"][0].training.steps == 2
    assert judge.loss(bench.space.uniform("int2"), 16) > 0


def test_mistakes_are_told():
    with pytest.raises(ValidationError):
        ProxySettings.model_validate({"flash": 1.5})
    with pytest.raises(CompressError, match="no choice of this space trains"):
        ProxySettings(flash=0.05).space_of(candidates().space)
