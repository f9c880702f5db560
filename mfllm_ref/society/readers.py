"""Events from files: four formats in, one out.

Notable: the format is detected from what is there, not from an option. A folder with original-microblog/ is CED Weibo,
one with source-tweet/ below it RumourEval-2017; a file that begins with `[` is a "rumdect" Weibo event, any other JSON
Lines, our own format. Whatever is wrong with the data is an InputError naming file,
line or event, and cause. Texts and profiles are kept whole: cutting is the business of whoever fills a prompt.

Popularity holds only what was known when an action was posted: its author's followers, never a crawl-time count.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from mfllm_ref.errors import InputError
from mfllm_ref.fields import a_list, an_object, number_field, parse_json, read_json, read_text, show, text_field
from mfllm_ref.runs import write_bytes
from mfllm_ref.society.events import DIMENSIONS, LANGUAGES, Action, Agent, Event, PublicPost

WEIBO_DOMAIN = "weibo"  # both Weibo sets mix all subjects and name none
BEIJING = timezone(timedelta(hours=8))  # CED's time stamps are local
NO_YEAR = re.compile(r"(\d\d)月(\d\d)日 (\d\d):(\d\d)")  # how the site dates the posts of the crawl's own year
MONTHS = {name: index + 1 for index, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())}
SDQC = {"support": {"stance": "support"}, "deny": {"stance": "oppose"}, "comment": {"stance": "neutral"},
        "query": {"stance": "neutral", "intent": "question"}}
FOLLOWERS = {
    "en": ("under 100 followers", "hundreds of followers", "thousands of followers", "tens of thousands of followers",
           "hundreds of thousands of followers", "millions of followers"),
    "zh": ("粉丝不足百人", "粉丝数百人", "粉丝数千人", "粉丝数万人", "粉丝数十万人", "粉丝百万以上"),
}


def load_events(path: Path | str) -> list[Event]:
    """All events of one file or folder, actions in time order. Raises InputError, and nothing else, for bad data."""
    path = Path(path)
    try:
        events = list(_detect(path if path.name else path.absolute()))  # "." has no name, and no folder beside it
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None
    seen: set[str] = set()
    for event in events:
        if event.id in seen:
            raise InputError(f"{path}: the event id {show(event.id)} occurs twice")
        seen.add(event.id)
    if not events:
        raise InputError(f"{path}: holds no event")
    return events


def _detect(path: Path) -> Iterator[Event]:
    if not path.is_dir():
        return _file(path)
    if (path / "original-microblog").is_dir():
        return _ced(path)
    if (path / "source-tweet").is_dir():
        raise InputError(f"{path}: one thread of a RumourEval story, and an event is a whole story: name the folder above")
    stories = _stories(path)
    if stories:
        return _rumoureval(path, stories)
    files = [child for child in _children(path) if child.suffix in (".json", ".jsonl")]
    if not files:
        raise InputError(f"{path}: unrecognised format: neither .jsonl or .json files of events, nor "
                         "original-microblog/ (CED), nor threads with source-tweet/ (RumourEval)")
    return (event for file in files for event in _file(file))


def _file(path: Path) -> Iterator[Event]:
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        yield _rumdect(path, parse_json(text, str(path)))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _own(parse_json(line, f"{path}:{number}"), f"{path}:{number}")


# Our own JSON Lines


def _own(data: Any, where: str) -> Event:
    data = an_object(data, where, "an event")
    id = text_field(data, "id", where)
    where = f"{where}: event {show(id)}"
    items = a_list(data.get("actions"), where, "'actions'")
    actions = []
    for index, item in enumerate(items):
        here = f"{where}: action {index}"
        item = an_object(item, here, "it")
        parent = item.get("parent")
        if parent is not None and (type(parent) is not int or not 0 <= parent < len(items) or parent == index):
            raise InputError(f"{here}: 'parent' must be another action's index, not {show(parent)}")
        agent = Agent(text_field(item, "agent", here), text_field(item, "profile", here, default=""),
                      None if item.get("reach") is None else number_field(item, "reach", here))
        actions.append(Action(agent, text_field(item, "text", here), number_field(item, "time", here),
                              number_field(item, "popularity", here, default=0.0), parent, _labels(item, here)))
    posts = []
    for number, item in enumerate(a_list([] if data.get("posts") is None else data["posts"], where, "'posts'")):
        here = f"{where}: post {number}"
        before = an_object(item, here, "it").get("index")
        if type(before) is not int or not 0 <= before <= len(actions):
            raise InputError(f"{here}: 'index' must be one of 0 to {len(actions)}, not {show(before)}")
        posts.append(PublicPost(before, text_field(item, "text", here)))
    here = f"{where}: facts"
    facts = an_object({} if data.get("facts") is None else data["facts"], where, "'facts'")
    facts = {text_field({"name": name}, "name", here): number_field(facts, name, here) for name in facts}
    return _event(where, id, text_field(data, "topic", where), text_field(data, "domain", where, default="unknown"),
                  data.get("language"), actions, posts, facts)


def _labels(item: Mapping[str, Any], where: str) -> dict[str, str]:
    labels = an_object(item["labels"], where, "'labels'") if item.get("labels") is not None else {}
    for dimension, label in labels.items():
        if dimension not in DIMENSIONS:
            raise InputError(f"{where}: unknown dimension {show(dimension)} in 'labels'")
        if label not in DIMENSIONS[dimension]:
            raise InputError(f"{where}: {show(label)} is no label of {dimension}: {', '.join(DIMENSIONS[dimension])}")
    return labels


def write_events(events: Iterable[Event], path: Path | str) -> None:
    """Our JSON Lines, one event a line, replaced atomically: `load_events` reads back equal events."""
    lines = (json.dumps(_record(event), ensure_ascii=False, allow_nan=False) + "\n" for event in events)
    write_bytes(Path(path), "".join(lines).encode("utf-8"))


def _record(event: Event) -> dict[str, Any]:
    actions = []
    for action in event.actions:
        optional = {"reach": action.agent.reach, "parent": action.parent, "labels": dict(action.labels) or None}
        actions.append({"agent": action.agent.id, "profile": action.agent.profile, "text": action.text,
                        "time": action.time, "popularity": action.popularity,
                        **{key: value for key, value in optional.items() if value is not None}})
    posts = [{"index": post.index, "text": post.text} for post in event.posts]
    return {"id": event.id, "topic": event.topic, "domain": event.domain, "language": event.language, "posts": posts,
            "facts": dict(event.facts), "actions": actions}


# Weibo


def _rumdect(path: Path, data: Any) -> Event:
    """A list of posts, the first of which is the topic; an answer names the `mid` of the post it answers."""
    where = f"{path}: event {show(path.stem)}"
    posts = [an_object(post, where, "a post") for post in a_list(data, where, "an event")]
    if not posts:
        raise InputError(f"{where}: the list of posts is empty")
    actions = []
    for index, post in enumerate(posts[1:], start=1):
        here = f"{where}: post {index}"
        followers = number_field(post, "followers_count", here, default=0.0)
        location, description, gender = (text_field(post, key, here, default="")
                                         for key in ("user_location", "user_description", "gender"))
        profile = _profile("zh", followers, post.get("verified") is True, location, description, gender)
        agent = Agent(text_field(post, "uid", here), profile, followers)
        actions.append(Action(agent, _weibo_text(post, here), number_field(post, "t", here), followers))
    numbered = [(post, f"{where}: post {index}") for index, post in enumerate(posts)][1:]
    ids = [text_field(post, "mid" if "mid" in post else "id", here, default="") for post, here in numbered]
    answered = [text_field(post, "parent", here, default="") for post, here in numbered]
    return _event(where, path.stem, _weibo_text(posts[0], f"{where}: post 0"), WEIBO_DOMAIN, "zh",
                  _linked(actions, ids, answered))


def _weibo_text(post: Mapping[str, Any], where: str) -> str:
    """`text`, or `original_text` where cleaning left nothing of it (or it is absent)."""
    text = text_field(post, "text", where, default="" if "original_text" in post else None)
    return text if text.strip() else text_field(post, "original_text", where, default=text)


def _ced(path: Path) -> Iterator[Event]:
    """original-microblog/X.json is the topic, {,non-}rumor-repost/X.json its reposts, newest first."""
    originals = [file for file in _children(path / "original-microblog") if file.suffix == ".json"]
    for folder in ("rumor-repost", "non-rumor-repost"):
        for file in _children(path / folder):
            if file.suffix == ".json" and not (path / "original-microblog" / file.name).is_file():
                raise InputError(f"{file}: needs its topic in original-microblog/, which has none of that name")
    for original in originals:
        found = [file for folder in ("rumor-repost", "non-rumor-repost")
                 if (file := path / folder / original.name).is_file()]
        if len(found) != 1:
            raise InputError(f"{original}: needs its reposts in rumor-repost/ or non-rumor-repost/, found {len(found)}")
        topic = an_object(read_json(original), str(original), "a microblog")
        where = f"{found[0]}: event {show(original.stem)}"
        listed = a_list(read_json(found[0]), where, "what holds the reposts")
        posts = [an_object(post, where, "a repost") for post in reversed(listed)]
        actions, ids, answered = [], [], []
        agents: dict[str, Agent] = {}
        latest = -math.inf
        for index, post in enumerate(posts):
            here = f"{where}: repost {len(posts) - 1 - index}"
            latest = time = _ced_time(text_field(post, "date", here), latest, here)
            uid = text_field(post, "uid", here)
            actions.append(Action(agents.setdefault(uid, Agent(uid)), text_field(post, "text", here), time))
            ids.append(text_field(post, "mid", here, default=""))
            answered.append(text_field(post, "parent", here, default=""))
        title = text_field(topic, "text", str(original))
        yield _event(where, original.stem, title, WEIBO_DOMAIN, "zh", _linked(actions, ids, answered))


def _ced_time(date: str, latest: float, where: str) -> float:
    """Seconds since 1970. A date without a year gets the first year that is not before the post listed below it."""
    short = NO_YEAR.fullmatch(date)
    if short is None:
        try:
            return datetime.fromisoformat(date).replace(tzinfo=BEIJING).timestamp()
        except ValueError:
            raise InputError(f"{where}: 'date' must look like 2013-03-27 15:19:10, not {show(date)}") from None
    first = datetime.fromtimestamp(latest, BEIJING).year if latest > 0 else 2009  # the site's first year
    for year in range(first, first + 9):  # 29 February may have to wait for a leap year
        try:
            month, day, hour, minute = map(int, short.groups())
            time = datetime(year, month, day, hour, minute, tzinfo=BEIJING).timestamp()
        except ValueError:
            continue
        if time >= latest:
            return time
    raise InputError(f"{where}: {show(date)} is no date")


def _linked(actions: Sequence[Action], ids: Sequence[str], answered: Sequence[str]) -> list[Action]:
    """The actions with the index of the one each answers: None for the topic's own post or one not in the file."""
    index = {id: number for number, id in reversed(list(enumerate(ids))) if id}
    parents = (None if index.get(id) == number else index.get(id) for number, id in enumerate(answered))
    return [replace(action, parent=parent) for action, parent in zip(actions, parents)]


# RumourEval-2017


def _stories(path: Path) -> list[Path]:
    """Story folders (they hold threads, which hold source-tweet/) at `path`, or one or two levels below it."""
    level = [path]
    for _ in range(3):
        stories = [folder for folder in level
                   if any((thread / "source-tweet").is_dir() for thread in _children(folder))]
        if stories:
            return stories
        level = [child for folder in level for child in _children(folder) if child.is_dir()]
    return []


def _rumoureval(path: Path, stories: Sequence[Path]) -> Iterator[Event]:
    splits = {story.parent for story in stories}
    gold = {split: _annotations(split) for split in splits}
    for story in stories:
        id = story.name if len(splits) == 1 else f"{story.parent.name}/{story.name}"
        where = f"{story}: event {show(id)}"
        tweets: dict[str, tuple[bool, str, Action]] = {}  # by id: is a source, the answered tweet's id, the action
        for thread in _children(story):
            for folder in (thread / "source-tweet", thread / "replies"):
                for file in _children(folder) if folder.is_dir() else ():
                    if file.suffix == ".json":
                        tweet = an_object(read_json(file), str(file), "a tweet")
                        key = text_field(tweet, "id_str" if "id_str" in tweet else "id", str(file))
                        answered = text_field(tweet, "in_reply_to_status_id_str", str(file), default="")
                        source = folder.name == "source-tweet" or tweets.get(key, (False,))[0]
                        tweets[key] = (source, answered,
                                       _tweet(tweet, gold[story.parent].get(key, {}), str(file)))
        ordered = sorted(tweets, key=lambda key: (tweets[key][2].time, len(key), key))  # ids grow with time
        sources = [tweets[key][2].text for key in ordered if tweets[key][0]]
        if not sources:
            raise InputError(f"{where}: no thread has a source tweet")
        # A story's name says little; the tweet that opens it says what it is about.
        answers, actions = zip(*(tweets[key][1:] for key in ordered))
        yield _event(where, id, f"{story.name}: {sources[0]}", "news", "en", _linked(actions, ordered, answers))


def _tweet(tweet: Mapping[str, Any], labels: Mapping[str, str], where: str) -> Action:
    user = an_object(tweet.get("user"), where, "'user'")
    followers = number_field(user, "followers_count", where, default=0.0)
    profile = _profile("en", followers, user.get("verified") is True, text_field(user, "location", where, default=""),
                       text_field(user, "description", where, default=""))
    created = text_field(tweet, "created_at", where)
    try:  # "Wed Jan 07 11:07:51 +0000 2015", read by hand because strptime's month names follow the locale
        _, month, day, clock, zone, year = created.split()
        time = datetime.fromisoformat(f"{year}-{MONTHS[month]:02d}-{day}T{clock}{zone[:3]}:{zone[3:]}").timestamp()
    except (ValueError, KeyError):
        raise InputError(f"{where}: 'created_at' must look like Wed Jan 07 11:07:51 +0000 2015, "
                         f"not {show(created)}") from None
    agent = Agent(text_field(user, "id_str" if "id_str" in user else "id", where), profile, followers)
    return Action(agent, text_field(tweet, "text", where), time, followers, labels=labels)


def _annotations(split: Path) -> dict[str, dict[str, str]]:
    """Gold labels by tweet id, from subtaskA files in <split>-annotations/ beside the split, or inside the split."""
    labels: dict[str, dict[str, str]] = {}
    for folder in (split.with_name(split.name + "-annotations"), split / "annotations", split):
        for file in _children(folder) if folder.is_dir() else ():
            if file.suffix == ".json" and "subtaskA" in file.name:
                for id, label in an_object(read_json(file), str(file), "a table of labels").items():
                    if not isinstance(label, str) or label not in SDQC:
                        raise InputError(f"{file}: tweet {show(id)}: unknown label {show(label)}: {', '.join(SDQC)}")
                    labels[id] = SDQC[label]
    return labels


# Shared


def _event(where: str, id: str, topic: str, domain: str, language: Any, actions: Sequence[Action],
           posts: Sequence[PublicPost] = (), facts: Mapping[str, float] = {}) -> Event:
    """Sorts the actions by time (stably); their parents and the posts' indices, positions before the sort, move along."""
    text_field({"id": id}, "id", where)  # a file's name may hold what no text may
    if not topic.strip():
        raise InputError(f"{where}: the topic is empty")
    if not isinstance(language, str) or language not in LANGUAGES:
        raise InputError(f"{where}: unknown language {show(language)}: {', '.join(LANGUAGES)}")
    if len(actions) < 2:
        raise InputError(f"{where}: has {len(actions)} action{'s' * (len(actions) != 1)}, needs at least two")
    order = sorted(range(len(actions)), key=lambda index: actions[index].time)
    place: dict[int | None, int] = {old: new for new, old in enumerate(order)}
    ordered = [replace(actions[old], parent=place.get(actions[old].parent)) for old in order]
    moved = [replace(post, index=place.get(post.index, post.index)) for post in posts]
    return Event(id, topic, domain, language, tuple(ordered), tuple(sorted(moved, key=lambda post: post.index)), facts)


def _profile(language: str, followers: float, verified: bool, location: str, description: str, gender: str = "") -> str:
    """What the data says of an author as one short text in the event's language, the description last and whole."""
    size = FOLLOWERS[language][min(max(int(math.log10(max(followers, 1.0))) - 1, 0), 5)]
    if language == "zh":
        known = ({"m": "男", "f": "女"}.get(gender, ""), location, "认证用户" * verified, size, description)
        return "，".join(part for part in known if part)
    return ", ".join(part for part in (location, "verified" * verified, size, description) if part)


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith(".")) if folder.is_dir() else []


