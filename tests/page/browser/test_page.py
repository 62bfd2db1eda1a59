"""What the page shows of documents that a fake server plays, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.page.browser.chromium import Chromium, Tab
from tests.page.browser.fake_server import FakePage, fake_page
from tests.page.browser.scenes import HOSTILE_NAMES, SCENES, scene

pytestmark = pytest.mark.long

_HAS_NEWS = "!document.querySelector('#timeline').ariaBusy && document.querySelector('#facts').children.length > 0"
_PHONE = 360


@pytest.fixture
def page() -> Iterator[FakePage]:
    with fake_page(scene("training")) as found:
        yield found


def _opened(tab: Tab, page: FakePage) -> None:
    tab.open(page.url)
    tab.wait(_HAS_NEWS)


def _facts(tab: Tab) -> dict[str, str]:
    script = (
        "[...document.querySelectorAll('dl > div')].map(one => [...one.children].slice(0, 2).map(e => e.innerText))"
    )
    return {title: value.replace("\xa0", " ") for title, value in tab.value(script)}


def _colour_of_text(tab: Tab, selector: str) -> str:
    found: str = tab.value(f"getComputedStyle(document.querySelector({json.dumps(selector)})).color")
    return found


def test_the_page_tells_step_pace_loss_bytes_and_what_is_in_force(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    facts = _facts(tab)
    assert tab.text("#phase") == "Training"
    assert facts["Global step"] == "250"
    assert facts["Rounds a minute"] == "142.9"
    assert facts["Workers"] == "4"
    assert 0.5 < float(facts["Mean loss"]) < 1.2
    assert facts["Bytes a round"] == "4.7 MiB"
    assert "18.3 MiB before coding, 3.9 to 1" in tab.text("#facts")
    assert facts["Outer optimizer"] == "sgd:lr=0.7,momentum=0.9,nesterov"
    assert facts["Compression"] == "int8"
    assert facts["Checkpoint"] == "step 250, 12 s ago"
    assert facts["Shard"] == "the whole model"
    assert tab.value("document.title") == "step 250 · modelaverage"


def test_each_worker_has_a_lane_and_each_mark_a_line_in_the_legend(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    assert tab.text("#timeline .names").split() == ["worker-0", "worker-1", "worker-2", "worker-3"]
    legend = tab.text("#timeline .legend")
    for text in ("trains", "pushes", "waits for the others", "a new process of the worker", "stale push"):
        assert text in legend
    for kind in ("restarted", "stale"):
        assert tab.value(f"document.querySelectorAll('#timeline .stage .mark-{kind}').length") == 1


def test_a_worker_is_waited_for_in_red_only_after_five_seconds(tab: Tab, page: FakePage) -> None:
    killed = scene("killed")
    _opened(tab, page)
    calm = _colour_of_text(tab, "#phase")
    early = scene("killed")
    early.status["status"]["round_age_s"] = early.status["waiting"][0]["for_s"] = 3.0
    early.status["waiting"][0]["is_late"] = False
    page.show(early)
    tab.wait("document.querySelector('#phase-detail').innerText.includes('waits for worker-1')")
    assert tab.text("#phase") == "Training"
    assert tab.text("#phase-detail") == "The round waits for worker-1 for 3.0 s."
    assert _colour_of_text(tab, "#phase") == calm
    page.show(killed)
    tab.wait("document.querySelector('#phase').innerText.startsWith('Round waits')")
    assert tab.text("#phase") == "Round waits for worker-1 for 16 s"
    assert _colour_of_text(tab, "#phase") != calm
    assert tab.text("#timeline .names .late") == "worker-1"
    assert tab.text("#workers-table tr.bad th") == "worker-1"
    assert "last heard from 16 s ago" in tab.text("#workers-table tr.bad")


def test_a_round_that_went_on_without_a_worker_says_so(tab: Tab, page: FakePage) -> None:
    page.show(scene("quorum"))
    _opened(tab, page)
    assert tab.text("#phase-detail") == "The round waits for worker-3 for 1.2 s. The last one went on without worker-3."
    assert "13 rounds gave up waiting for a worker" in tab.text("#timeline .summary")
    assert tab.value("document.querySelectorAll('#timeline .stage .mark-without').length") == 13


def test_shards_stand_side_by_side_with_the_one_that_waits_and_the_one_that_is_away_in_red(
    tab: Tab, page: FakePage
) -> None:
    page.show(scene("shards"))
    tab.open(page.url)
    tab.wait("document.querySelectorAll('#shards tbody tr').length === 4")
    rows = tab.value(
        "[...document.querySelectorAll('#shards tbody tr')].map(row => [row.className, row.cells[0].textContent,"
        " row.cells[2].textContent, row.cells[3].textContent])"
    )
    assert rows == [
        ["", "0", "Training", "131"],
        ["bad", "1", "Round waits for worker-1 and worker-3 for 7.0\xa0s", "130"],
        ["", "2", "Training", "130"],
        ["bad", "3", "⚠ no answer for 21\xa0s", "130"],
    ]
    page.show(scene("training"))
    tab.wait("document.querySelector('#shards').hidden")


def test_a_sentence_above_the_shards_compares_them_only_if_all_are_known(tab: Tab, page: FakePage) -> None:
    seen = scene("shards")
    page.show(seen)
    tab.open(page.url)
    _, first, *_, away = seen.status["shards"]
    for fields, sentence in (
        ({}, "1 server of 4 does not answer: the parameter server at 10.0.0.4:2222 did not answer within 2 s"),
        ({"problem": ""}, "Their steps differ: a round commits on one server after the other."),
        ({"status": None}, "Not all are known to have a center yet."),
        ({"status": first["status"] | {"shard": None}}, "⚠ They do not belong to one job."),
        ({"status": first["status"]}, "Their steps differ: a round commits on one server after the other."),
    ):
        away.update(fields)
        page.show(seen)
        tab.wait(f"document.querySelector('#shards-summary').innerText === {sentence!r}")
    for shard in seen.status["shards"]:
        shard["status"] = shard["status"] | {"global_step": 130}
    page.show(seen)
    tab.wait("document.querySelector('#shards-summary').innerText.startsWith('All are at the same step.')")


def test_the_end_of_a_job_is_told_and_stays_readable(tab: Tab, page: FakePage) -> None:
    page.show(scene("over"))
    _opened(tab, page)
    assert tab.text("#phase") == "Job over"
    page.hang_up()
    tab.wait("!document.querySelector('#lost').hidden")
    assert "The job was over" in tab.text("#lost")
    assert _facts(tab)["Global step"] == "300"


def test_a_page_without_rounds_says_what_it_waits_for(tab: Tab, page: FakePage) -> None:
    page.show(scene("chief"))
    _opened(tab, page)
    assert tab.text("#phase") == "Waiting for the chief"
    assert "The first one appears here when all workers have pushed" in tab.text("#timeline")
    assert tab.value("[...document.querySelectorAll('.stage')].every(one => one.offsetParent === null)")


def test_a_server_that_began_later_says_that_it_does_not_know_the_rounds_before(tab: Tab, page: FakePage) -> None:
    page.show(scene("restored"))
    _opened(tab, page)
    assert not tab.value("document.querySelector('#history').hidden")
    assert tab.text("#history").startswith("This server began at step 600")
    assert tab.text("#history").endswith("earlier rounds are not known here.")
    assert "FAILED: No space left on device" in _facts(tab)["Checkpoint"]
    assert "values not finite" in tab.text("#curves .legend")


def test_what_the_page_saw_before_a_restart_of_the_server_stays(tab: Tab, page: FakePage) -> None:
    old = scene("training")
    for round_ in old.rounds["rounds"]:
        round_["step"] += 350
    old.rounds["next_step"] = 600
    page.show(old)
    _opened(tab, page)
    page.show(scene("restored"))
    tab.wait("document.querySelector('#facts').innerText.includes('640')")
    assert tab.value("document.querySelector('#history').hidden")
    assert tab.value("Number(document.querySelector('#curves .stage').getAttribute('aria-valuemax'))") == 289


def test_a_lost_connection_is_told_with_the_time_of_the_last_news_and_comes_back(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    page.hang_up()
    tab.wait("!document.querySelector('#lost').hidden")
    assert tab.text("#lost").startswith("No news since ")
    assert "the server does not answer" in tab.text("#lost")
    assert tab.text("#connection") == "no connection"
    assert tab.value("document.querySelector('#said').textContent") == "No connection to the server"
    page.let_in(scene("quorum"))
    tab.wait("document.querySelector('#connection').innerText === 'live'")
    tab.wait("document.querySelector('#facts').innerText.includes('183')")
    assert tab.value("document.querySelector('#lost').hidden")
    assert tab.value("document.querySelector('#said').textContent") == "Training"


def test_a_refused_page_says_why_and_tries_again(browser: Chromium, page: FakePage) -> None:
    tab = browser.tab()
    _opened(tab, page)
    page.hang_up(is_refused=True)
    tab.wait("document.querySelector('#lost').innerText.includes('this token is not known')")
    assert "open the page with ?token=..." in tab.text("#lost")
    page.let_in(scene("training"))
    tab.wait("document.querySelector('#connection').innerText === 'live'")
    tab.close()


def test_names_are_text_whatever_they_are(tab: Tab, page: FakePage) -> None:
    page.show(scene("hostile"))
    _opened(tab, page)
    assert tab.value("document.querySelectorAll('img, main script, b').length") == 0
    assert "owned" not in tab.value("document.title")
    assert HOSTILE_NAMES[0] in tab.text("#phase")
    text = tab.value("document.body.textContent + document.title")
    assert not {"\u202e", "\u202c", "\u0000", "\u2028", "\x1b"} & set(text)
    assert "\\u202e" in text
    titles = tab.value("[...document.querySelectorAll('[title]')].map(one => one.title).join('')")
    assert not {"\u202e", "\u0000"} & set(titles)
    assert HOSTILE_NAMES[1] in titles


@pytest.mark.parametrize("name", SCENES)
def test_nothing_is_wider_than_a_phone(tab: Tab, page: FakePage, name: str) -> None:
    tab.look(_PHONE, 740)
    page.show(scene(name))
    _opened(tab, page)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.value("document.documentElement.scrollWidth") == _PHONE
    # What is wider scrolls in a box of its own.
    script = """[...document.querySelectorAll('body *')].filter(one => !one.closest('.box, .scroll, .unseen, .skip'))
        .filter(one => one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.outerHTML.slice(0, 100))"""
    assert tab.value(script) == []


def test_points_are_reached_with_the_mouse(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    left, top, width, height = tab.value(
        "(() => { const at = document.querySelector('#timeline .stage svg').getBoundingClientRect();"
        " return [at.left, at.top, at.width, at.height]; })()"
    )
    tab.move(left + width / 2, top + height - 10)
    tab.wait("!document.querySelector('#timeline .tip').hidden")
    tip = tab.text("#timeline .tip")
    assert tip.startswith("step ")
    for text in ("worker-3", "trains", "pushes", "waits for the others", "loss", "local step"):
        assert text in tip
    tab.move(2, 2)
    tab.wait("document.querySelector('#timeline .tip').hidden")


def test_points_are_reached_with_keys_and_said(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    tab.value("document.querySelector('#timeline input').focus()")
    tab.press("Tab")
    assert tab.value("document.activeElement.getAttribute('role')") == "slider"
    for key, step, worker in (
        ("Home", "step 50", "worker-0"),
        ("ArrowRight", "step 51", "worker-0"),
        ("ArrowDown", "step 51", "worker-1"),
        ("End", "round in progress", "worker-1"),
    ):
        tab.press(key)
        said = tab.value("document.activeElement.getAttribute('aria-valuetext')")
        assert said.startswith(step)
        assert worker in said
    tab.press("Escape")
    assert tab.value("document.querySelector('#timeline .tip').hidden")


def test_every_picture_is_also_a_table(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    assert tab.value("document.querySelectorAll('.picture').length") == 5
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    tab.wait("[...document.querySelectorAll('.picture table')].every(one => one.tBodies[0].rows.length >= 200)")
    assert tab.value("[...document.querySelectorAll('thead th')].every(one => one.scope === 'col')")
    assert tab.value("[...document.querySelectorAll('tbody tr')].every(one => one.cells[0].scope === 'row')")
    first = tab.value(
        "[...document.querySelector('#curves table').tBodies[0].rows[0].cells].map(one => one.textContent)"
    )
    last: dict[str, Any] = scene("training").rounds["rounds"][-1]
    assert first[0] == str(last["step"])
    assert float(first[2]) == pytest.approx(last["loss"], rel=1e-3)


def test_losses_are_drawn_over_steps_time_and_bytes(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    seen = set()
    for by in ("time", "bytes", "step"):
        tab.value(f"document.querySelector('[name=loss-by][value={by}]').click()")
        seen.add(tab.value("document.querySelector('#curves .axes').textContent"))
    assert len(seen) == 3


def test_a_screen_reader_hears_changes_of_the_phase_only(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    assert tab.value("document.querySelectorAll('[aria-live], [role=status], [role=alert]').length") == 1
    tab.value(
        "heard = []; new MutationObserver(() => heard.push(document.querySelector('#said').textContent))"
        ".observe(document.querySelector('#said'), { childList: true, characterData: true, subtree: true })"
    )
    longer = scene("killed")
    longer.status["waiting"][0]["for_s"] = 17.3
    for now, text in ((scene("killed"), "for 16 s"), (longer, "for 17 s"), (scene("training"), "Training")):
        page.show(now)
        tab.wait(f"document.querySelector('#phase').textContent.replace(/\\s/g, ' ').endsWith({json.dumps(text)})")
    assert tab.value("heard") == ["Round waits for worker-1", "Training"]


def test_a_paused_page_does_not_change(tab: Tab, page: FakePage) -> None:
    _opened(tab, page)
    tab.value("document.querySelector('#pause').click()")
    assert tab.text("#connection") == "paused"
    page.show(scene("over"))
    page.hang_up()  # which the page notices after the scene
    tab.wait("!document.querySelector('#lost').hidden")
    assert tab.text("#phase") == "Training"
    tab.value("document.querySelector('#pause').click()")
    tab.wait("document.querySelector('#phase').innerText === 'Job over'")


def test_of_many_workers_a_few_have_lanes_until_all_are_asked_for(tab: Tab, page: FakePage) -> None:
    page.show(scene("many"))
    _opened(tab, page)
    assert tab.value("document.querySelectorAll('#timeline .names li').length") == 16
    tab.value(
        "[...document.querySelectorAll('#timeline button')].find(one => one.innerText === 'all 64 workers').click()"
    )
    assert tab.value("document.querySelectorAll('#timeline .names li').length") == 64


def test_both_schemes_have_colours_of_their_own(tab: Tab, page: FakePage) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        tab.look(1280, scheme=scheme)
        _opened(tab, page)
        grounds.add(tab.value("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
