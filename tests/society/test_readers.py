"""The four event formats, the one that is written, and what is refused."""

import json
import os
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfllm_ref.errors import InputError
from mfllm_ref.society.events import DIMENSIONS, LANGUAGES, Action, Agent, Event, PublicPost
from mfllm_ref.society.readers import BEIJING, load_events, write_events

FIXTURES = Path(__file__).parent / "fixtures"


def refused(path: Path) -> str:
    """The one line of the InputError that loading `path` must raise; it names the path."""
    with pytest.raises(InputError) as caught:
        load_events(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    message.encode("utf-8")
    return message


# Reading


def test_json_lines_sorts_by_time_and_moves_parents_and_posts_along():
    bridge, teahouse = load_events(FIXTURES / "events.jsonl")
    assert [action.agent.id for action in bridge.actions] == ["ada", "cleo", "ben"]
    assert bridge.actions[2] == Action(Agent("ben", "", 2.0), "That is fake. Source?", 30.5, 7.0, 0,
                                       {"stance": "oppose", "intent": "question"})
    assert bridge.actions[0].agent.reach is None and bridge.actions[0].popularity == 3.0  # a post's is not its author's
    assert bridge.posts == (PublicPost(1, "Town hall: the bridge stays open."),)  # seen from what was the third action on
    assert (bridge.topic, bridge.domain, bridge.language) == ("The old bridge is said to close.", "news", "en")
    assert [action.agent.id for action in teahouse.actions] == ["甲", "乙"]  # tied times keep their order
    assert teahouse.language == "zh" and teahouse.actions[1].parent is None and teahouse.posts == ()


def test_rumdect_first_post_is_the_topic():
    park, turtle = sorted(load_events(FIXTURES / "rumdect"), key=lambda event: event.id, reverse=True)
    assert (turtle.id, turtle.topic, turtle.language) == ("7001", "听说湖边发现了会说话的乌龟", "zh")
    assert [action.agent.id for action in turtle.actions] == ["u7002", "u7003", "u7004"]
    assert [action.parent for action in turtle.actions] == [None, 0, None]
    assert [action.time for action in turtle.actions] == [1100.0, 1200.0, 1200.0]
    assert turtle.actions[2].text == "[哈哈]"  # cleaning left nothing of it
    first, second, third = (action.agent.profile for action in turtle.actions)
    assert first == "男，江苏 南京，认证用户，粉丝百万以上"
    assert second == "女，江苏 南京，粉丝数百人，爱拍照\n爱旅行"
    assert third == "女，粉丝不足百人"
    assert turtle.actions[0].popularity == turtle.actions[0].agent.reach == 2500000  # never the crawl's counts
    assert load_events(FIXTURES / "rumdect" / "7005.json") == [park]


def test_ced_reverses_then_sorts_stably():
    rain, library = load_events(FIXTURES / "ced")
    assert rain.topic == "【提醒】喝雨水能长高，转给朋友！"
    assert [action.text for action in rain.actions] == ["[怒]", "假的吧", "", "求证//@乙:假的吧", "考古"]
    assert [action.parent for action in rain.actions] == [None, None, None, 1, None]
    assert rain.actions[0].time == 1356998405.0  # 2013-01-01 00:00:05 UTC is 08:00:05 in Beijing
    assert rain.actions[4].time == 1456704000.0  # no year: the next 29 February, of 2016
    assert {action.agent for action in rain.actions} == {Agent("u"), Agent("v"), Agent("w")}
    assert rain.domain == library.domain and library.id == "2_bb" and library.actions[1].parent == 0


@pytest.mark.parametrize("named", ["train", "", "train/harbour-fire"])
def test_rumoureval_is_one_event_a_story(named):
    (story,) = load_events(FIXTURES / "rumoureval" / named)
    assert story.id == "harbour-fire" and story.domain == "news" and story.language == "en"
    assert "harbour" in story.topic and "BREAKING: smoke over the harbour" in story.topic
    assert [action.agent.id for action in story.actions] == ["a100", "a101", "a102", "a103", "a104"]
    assert [action.time - story.actions[0].time for action in story.actions] == [0, 2, 3, 8, 10]
    assert [action.parent for action in story.actions] == [None, 0, None, 0, 2]
    assert [dict(action.labels) for action in story.actions] == [
        {"stance": "support"}, {"stance": "oppose"}, {"stance": "support"}, {"stance": "neutral", "intent": "question"},
        {"stance": "neutral"}]
    assert story.actions[0].agent.profile == "Leeds, verified, tens of thousands of followers, Local news"
    assert story.actions[1].agent.profile == "Leeds, under 100 followers"
    assert story.actions[0].popularity == 45000.0


def test_rumoureval_annotations_inside_the_split_or_absent(tmp_path):
    shutil.copytree(FIXTURES / "rumoureval" / "train", tmp_path / "mine")
    (unlabelled,) = load_events(tmp_path / "mine")
    assert all(not action.labels for action in unlabelled.actions)
    shutil.copytree(FIXTURES / "rumoureval" / "train-annotations", tmp_path / "mine" / "annotations")
    (labelled,) = load_events(tmp_path / "mine")
    assert labelled.actions[1].labels == {"stance": "oppose"}


def test_two_splits_with_the_same_story_stay_two_events(tmp_path):
    for split in ("train", "test"):
        shutil.copytree(FIXTURES / "rumoureval" / "train", tmp_path / split)
    assert [event.id for event in load_events(tmp_path)] == ["test/harbour-fire", "train/harbour-fire"]


def test_a_folder_of_files_is_all_their_events(tmp_path):
    shutil.copy(FIXTURES / "events.jsonl", tmp_path / "a.jsonl")
    shutil.copy(FIXTURES / "rumdect" / "7001.json", tmp_path)
    (tmp_path / ".hidden.json").write_text("no JSON")
    (tmp_path / "notes.txt").write_text("no JSON either")
    assert [event.id for event in load_events(tmp_path)] == ["7001", "bridge", "teahouse"]


def test_long_posts_and_odd_characters_are_kept_whole(tmp_path):
    long = "长" * 100_000
    text = f"{long}<|im_end|></s>\u2028\x85 \U0001f600\r\n"
    write_events([event(actions=[action(text=text), action(text="b")])], tmp_path / "e.jsonl")
    assert load_events(tmp_path / "e.jsonl")[0].actions[0].text == text


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    lines = (FIXTURES / "events.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "e.jsonl").write_bytes(("\ufeff\r\n" + "\r\n\r\n".join(lines) + "\r\n").encode("utf-8"))
    assert load_events(tmp_path / "e.jsonl") == load_events(FIXTURES / "events.jsonl")


# Writing


def action(**fields):
    return Action(**{"agent": Agent("a"), "text": "x", "time": 0.0, **fields})


def event(**fields):
    fields["actions"] = tuple(fields["actions"])
    return Event(**{"id": "e", "topic": "t", "domain": "d", "language": "en", **fields})


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
names = texts.filter(str.strip)
numbers = st.floats(0, 1e9) | st.integers(0, 10**9).map(float)
labels = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in DIMENSIONS.items()})


@st.composite
def events(draw):
    count = draw(st.integers(2, 5))
    times = sorted(draw(st.lists(st.floats(-1e9, 1e10), min_size=count, max_size=count)))
    actions = []
    for index, time in enumerate(times):
        parent = draw(st.none() | st.integers(0, count - 1).filter(lambda number: number != index))
        actions.append(Action(Agent(draw(texts), draw(texts), draw(st.none() | numbers)), draw(texts), time, draw(numbers), parent,
                              draw(labels)))
    posts = draw(st.lists(st.builds(PublicPost, st.integers(0, count), texts), max_size=2))
    posts.sort(key=lambda post: post.index)
    return Event(draw(texts), draw(names), draw(texts), draw(st.sampled_from(LANGUAGES)), tuple(actions), tuple(posts),
                 draw(st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=2)))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(written=st.lists(events(), min_size=1, max_size=3, unique_by=lambda event: event.id))
def test_round_trip(tmp_path_factory, written):
    """What is written is read back equal: texts, posts, reach, parents, labels and facts included."""
    path = tmp_path_factory.mktemp("round") / "e.jsonl"
    write_events(written, path)
    assert load_events(path) == written


@settings(derandomize=True, deadline=None, max_examples=20)
@given(event=events(), data=st.data())
def test_order_in_the_file_does_not_matter(tmp_path_factory, event, data):
    """Shuffling an event's actions in the file (parents renumbered) changes nothing if no two times are equal."""
    folder = tmp_path_factory.mktemp("order")
    write_events([event], folder / "e.jsonl")
    record = json.loads((folder / "e.jsonl").read_text(encoding="utf-8"))
    for index, item in enumerate(record["actions"]):
        item["time"] = float(index)
    expected = [item["text"] for item in record["actions"]]
    parents = [item.get("parent") for item in record["actions"]]
    order = data.draw(st.permutations(range(len(expected))))
    record["actions"] = [dict(record["actions"][index]) for index in order]
    for item in record["actions"]:
        if item.get("parent") is not None:
            item["parent"] = order.index(item["parent"])
    (folder / "e.jsonl").write_text(json.dumps(record), encoding="utf-8")
    (read,) = load_events(folder / "e.jsonl")
    assert [action.text for action in read.actions] == expected
    assert [action.parent for action in read.actions] == parents


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "e.jsonl"
    write_events([event(actions=[action(), action()])], path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_events([event(actions=[action(time=float("nan")), action()])], path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["e.jsonl"]


# Refusing

GOOD = {"id": "e1", "topic": "t", "domain": "d", "language": "en", "actions": [
    {"agent": "a", "profile": "", "text": "x", "time": 1, "popularity": 0},
    {"agent": "b", "profile": "", "text": "y", "time": 2, "popularity": 0}]}


def changed(path, value):
    """GOOD as JSON with the field at `path` set to raw JSON text `value`, or removed where it is None."""
    record = json.loads(json.dumps(GOOD))
    *parents, last = path
    target = record
    for key in parents:
        target = target[key]
    if value is None:
        del target[last]
        return json.dumps(record)
    target[last] = "@@"
    return json.dumps(record).replace('"@@"', value)


BAD_FIELDS = [
    (("actions", 1, "time"), None, "time"), (("actions", 1, "time"), "NaN", "NaN"),
    (("actions", 1, "time"), "Infinity", "Infinity"), (("actions", 1, "time"), "true", "time"),
    (("actions", 1, "time"), '"2"', "time"), (("actions", 1, "time"), "1e999", "time"),
    (("actions", 1, "time"), "1" + "0" * 400, "time"), (("actions", 1, "time"), "1" + "0" * 6000, "malformed"),
    (("actions", 1, "time"), "null", "time"), (("actions", 0, "popularity"), '"many"', "popularity"),
    (("actions", 0, "text"), "7", "text"), (("actions", 0, "text"), None, "text"),
    (("actions", 0, "text"), "null", "text"),
    (("actions", 0, "text"), '"\\ud800"', "surrogate"), (("actions", 0, "profile"), '"\\udfff x"', "surrogate"),
    (("topic",), '"a\\ud83d"', "surrogate"), (("id",), '"\\ud83d"', "surrogate"), (("topic",), '""', "topic"),
    (("topic",), '" \\n"', "topic"), (("topic",), None, "topic"), (("topic",), "[]", "topic"), (("id",), None, "id"),
    (("language",), '"fr"', "fr"), (("language",), None, "language"), (("language",), "[]", "language"),
    (("actions",), "[]", "0 actions"), (("actions",), json.dumps(GOOD["actions"][:1]), "1 action"),
    (("actions",), "{}", "actions"), (("actions",), None, "actions"), (("actions", 0), "3", "action 0"),
    (("actions", 0, "labels"), '{"mood": "angry"}', "mood"), (("actions", 0, "labels"), '{"stance": "angry"}', "angry"),
    (("actions", 0, "labels"), '{"stance": ["support"]}', "stance"), (("actions", 0, "labels"), "[]", "labels"),
    (("actions", 0, "parent"), "2", "parent"), (("actions", 0, "parent"), "0", "parent"),
    (("actions", 0, "parent"), "-1", "parent"), (("actions", 0, "parent"), "true", "parent"),
    (("actions", 0, "agent"), "{}", "agent"), (("posts",), '[{"index": 9, "text": "p"}]', "index"),
    (("posts",), '[{"index": 0}]', "text"), (("posts",), "[1]", "post 0"), (("posts",), "3", "posts"),
    (("facts",), '{"j": "high"}', "j"), (("facts",), "0", "facts"), (("posts",), "false", "posts"), (("domain",), "5", "domain"),
    (("topic",), '"t", "topic": "u"', "twice"), (("topic",), "[" * 100_000, "deep"),
]


def test_optional_fields_may_be_null(tmp_path):
    optional = {"posts": None, "facts": None, "domain": None}
    more = {"reach": None, "parent": None, "labels": None, "popularity": None, "profile": None}
    record = GOOD | optional | {"actions": [action | more for action in GOOD["actions"]]}
    (tmp_path / "null.jsonl").write_text(json.dumps(record))
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD | {"domain": "unknown"}))
    assert load_events(tmp_path / "null.jsonl") == load_events(tmp_path / "good.jsonl")


@pytest.mark.parametrize("path, value, cause", BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_a_bad_field_is_named_with_file_and_line(tmp_path, path, value, cause):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({**GOOD, "id": "fine"}) + "\n" + changed(path, value) + "\n", encoding="utf-8")
    message = refused(file)
    assert f"{file}:2" in message and cause in message


@pytest.mark.parametrize("content, cause", [
    (b"", "no event"), (b"\n \n", "no event"), (b"{", "malformed"), (b'{"id": "\xff"}', "UTF-8"), (b"7", "object"),
    (b"[]", "empty"), (b"[1]", "post"), (b"[{}, {}, {}]", "uid"), (b"[" * 200_000, "deep"),
    (json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode(), "twice"),
    (json.dumps(GOOD).encode()[:-9], "malformed"),
])
def test_a_bad_file_is_named(tmp_path, content, cause):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    message = refused(file)
    assert str(file) in message and cause in message


def test_a_thread_is_not_an_event():
    thread = next(FIXTURES.glob("rumoureval/**/source-tweet")).parent
    assert f"{thread}: one thread of a RumourEval story" in refused(thread)
    assert load_events(thread.parent)


def test_missing_paths_loops_and_unknown_formats(tmp_path):
    assert "no such file" in refused(tmp_path / "absent")
    assert "no such file" in refused(tmp_path / "absent" / "deeper.jsonl")
    assert "unrecognised" in refused(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert str(tmp_path / "loop") in refused(tmp_path / "loop")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "up").symlink_to(tmp_path)  # a folder that holds itself
    assert "unrecognised" in refused(tmp_path / "inner")
    (tmp_path / "inner" / "b.jsonl").symlink_to(tmp_path / "loop")
    assert "b.jsonl" in refused(tmp_path / "inner")
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refused(tmp_path / "pipe")


def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    folder = os.fsencode(tmp_path)
    shutil.copy(FIXTURES / "rumdect" / "7001.json", folder + b"/\xff.json")
    with pytest.raises(InputError, match="surrogate"):
        load_events(tmp_path)


def edit(path, change):
    data = json.loads(path.read_text(encoding="utf-8"))
    data = change(data) or data
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("change, cause", [
    (lambda posts: posts[1].pop("t"), "'t'"), (lambda posts: posts[1].update(t=True), "'t'"),
    (lambda posts: posts[0].update(text=" ", original_text=""), "topic"),
    (lambda posts: posts[1].update(text=3), "'text'"),
    (lambda posts: posts[2].update(followers_count="x"), "followers_count"), (lambda posts: posts[:2], "1 action"),
    (lambda posts: posts[3].update(user_description="\ud800"), "surrogate"), (lambda posts: posts[2].update(mid=[]), "post 2: 'mid'"),
    (lambda posts: posts[2].update(parent={}), "post 2: 'parent'"),
])
def test_bad_rumdect(tmp_path, change, cause):
    file = Path(shutil.copy(FIXTURES / "rumdect" / "7001.json", tmp_path))
    edit(file, lambda posts: result if isinstance(result := change(posts), list) else None)
    message = refused(file)
    assert str(file) in message and cause in message


@pytest.mark.parametrize("name, change, cause", [
    ("rumor-repost/1_aa.json", lambda posts: posts[3].update(date="yesterday"), "date"),
    ("rumor-repost/1_aa.json", lambda posts: posts[3].update(date="2013-02-30 10:00:00"), "date"),
    ("rumor-repost/1_aa.json", lambda posts: posts[0].update(date="02月30日 10:00"), "date"),
    ("rumor-repost/1_aa.json", lambda posts: posts[2].pop("text"), "'text'"),
    ("rumor-repost/1_aa.json", lambda posts: {"posts": posts}, "list"),
    ("non-rumor-repost/2_bb.json", lambda posts: posts[:1], "1 action"),
    ("original-microblog/2_bb.json", lambda topic: topic.update(text=""), "topic"),
    ("original-microblog/2_bb.json", lambda topic: [topic], "object"),
])
def test_bad_ced(tmp_path, name, change, cause):
    shutil.copytree(FIXTURES / "ced", tmp_path / "ced")
    edit(tmp_path / "ced" / name, lambda data: result if isinstance(result := change(data), (list, dict)) else None)
    message = refused(tmp_path / "ced")
    assert Path(name).stem in message and cause in message


def test_a_repost_older_than_the_site_does_not_date_the_next(tmp_path):
    """The posts of the crawl's own year have none; no year can be told from one that a broken clock has put before the site's."""
    shutil.copytree(FIXTURES / "ced", tmp_path / "ced")
    edit(tmp_path / "ced/rumor-repost/1_aa.json", lambda posts: posts[-1].update(date="0001-01-01 00:00:00"))
    edit(tmp_path / "ced/rumor-repost/1_aa.json", lambda posts: posts[-2].update(date="01月02日 03:04"))
    times = [action.time for action in load_events(tmp_path / "ced")[0].actions[:2]]
    assert [datetime.fromtimestamp(time, BEIJING).year for time in times[1:]] == [2009]


def test_ced_reposts_must_exist_once(tmp_path):
    shutil.copytree(FIXTURES / "ced", tmp_path / "ced")
    shutil.copy(tmp_path / "ced/rumor-repost/1_aa.json", tmp_path / "ced/non-rumor-repost")
    assert "found 2" in refused(tmp_path / "ced")
    shutil.copy(tmp_path / "ced/rumor-repost/1_aa.json", tmp_path / "ced/rumor-repost/3_cc.json")
    assert "3_cc.json: needs its topic in original-microblog/" in refused(tmp_path / "ced")
    (tmp_path / "ced/rumor-repost/3_cc.json").unlink()
    shutil.rmtree(tmp_path / "ced/rumor-repost")
    (tmp_path / "ced/non-rumor-repost/1_aa.json").unlink()
    assert "found 0" in refused(tmp_path / "ced")


@pytest.mark.parametrize("name, change, cause", [
    ("train/harbour-fire/100/replies/101.json", lambda tweet: tweet.update(created_at="2015-02-01"), "created_at"),
    ("train/harbour-fire/100/replies/101.json", lambda tweet: tweet.pop("user"), "user"),
    ("train/harbour-fire/100/replies/101.json", lambda tweet: tweet.update(text=None), "'text'"),
    ("train-annotations/subtaskA.json", lambda labels: labels.update({"101": "agree"}), "agree"),
])
def test_bad_rumoureval(tmp_path, name, change, cause):
    shutil.copytree(FIXTURES / "rumoureval", tmp_path / "r")
    edit(tmp_path / "r" / name, lambda data: change(data) and None)
    message = refused(tmp_path / "r" / "train")
    assert str(tmp_path / "r" / name) in message and cause in message


@settings(derandomize=True, deadline=None, max_examples=80)
@given(start=st.integers(0, 1200), length=st.integers(0, 40), junk=st.binary(max_size=6))
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, start, length, junk):
    """Whatever bytes of a good file are overwritten, loading gives events or an InputError of one line."""
    data = (FIXTURES / "events.jsonl").read_bytes()
    file = tmp_path_factory.mktemp("damaged") / "e.jsonl"
    file.write_bytes(data[:start] + junk + data[start + length:])
    try:
        assert all(len(event.actions) >= 2 for event in load_events(file))
    except InputError as error:
        assert "\n" not in str(error) and str(file) in str(error)
