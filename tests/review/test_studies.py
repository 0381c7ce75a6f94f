"""Blinded reader studies: what is drawn, what readers see and cannot see, and what comes out."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from samples import caption, register, texts, write_shard
from sqlalchemy import Engine
from steps import at_once, invoke, refused, said, select, writing

from rococap import db, queue, review
from rococap.errors import RococapError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.review import Answers, Form, Scale, Study
from rococap.scores import concepts, metrics
from rococap.scores.report import report

CT, MRI, US = "C0040405", "C0024485", "C0041618"
CUIS = [CT] * 10 + [MRI] * 4 + [US] * 2
READERS = ("ann", "bob", "cy")
ACCURACY = Scale("accuracy", "How true is it?", ("wrong", "partly", "right"))
FORM = Form(False, (ACCURACY, Scale("style", "Which style?", ("a", "b"), ordered=False)))


@pytest.fixture
def runs(database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two runs on 16 CTs, MRIs and ultrasounds; the second has not captioned the last CT's place, picture 15."""
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    originals = {n: f"Original {n}." for n in range(len(CUIS))} | {3: " "}
    write_shard(tmp_path / "set", "test", range(16), captions=originals, cuis={n: [cui] for n, cui in enumerate(CUIS)})
    made = []
    for name, n in (("plain", 16), ("tuned", 15)):
        register(
            database, tmp_path / "set", ["test"], run=name, recipe=Recipe(model="tests/small", prompt=f"As {name}?")
        )
        with db.transaction(database) as conn:
            made.append(queue.get_run(conn, name))
        caption(database, made[-1], texts(*(f"{name} {at}" for at in range(n))), split="test")
    return made


def draw(database: Engine, runs: list[Run], name: str = "one", form: Form = Form(), **options) -> Study:  # noqa: B008
    given = {"with_original": False, "n_pictures": 6, "n_readers": 3, "seed": 7} | options
    with writing(database) as conn:
        return review.new_study(
            *(conn, name, runs, "test"), form=form, modality=lambda cui: concepts.modality(concepts.parse(cui)), **given
        )


def joined(database: Engine, study: Study, *readers: str) -> list[int]:
    with writing(database) as conn:
        return [review.join(conn, study, reader) for reader in readers]


def pictures(database: Engine, study: Study, reader: str) -> list[review.Shown]:
    with db.transaction(database) as conn:
        return [review.item(conn, study, reader, position) for position in range(1, study.n_pictures + 1)]


def rate(database: Engine, study: Study, reader: str, position: int, answers: Answers, **options) -> None:
    with writing(database) as conn:
        review.rate(conn, study, reader, position, answers, **{"shown_at": study.created_at, **options})


def read_all(database: Engine, study: Study, reader: str, choose, seconds: int = 10) -> None:
    """The reader prefers, of each picture, the text that `choose` picks; None for no preference."""
    for shown in pictures(database, study, reader):
        wanted = choose(shown)
        answers = Answers(0 if wanted is None else 1 + shown.texts.index(wanted))
        at = study.created_at + 1_000
        rate(database, study, reader, shown.position, answers, shown_at=at, now=at + 1_000 * seconds)


def by(name: str, *others: str):
    return lambda shown: next(text for text in shown.texts if text.startswith((name, *others)))


def items(database: Engine) -> list[tuple]:
    """Which text stands where, without ids of this database."""
    return select(
        database,
        "SELECT t.reader_number, t.position, t.place, i.image_id, t.modality, r.name FROM study_items t "
        "JOIN images i ON i.id = t.image_id LEFT JOIN jobs j ON j.id = t.job_id LEFT JOIN runs r ON r.id = j.run_id "
        "ORDER BY 1, 2, 3",
    )


# --- Drawing ---------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_a_sample_is_balanced_by_modality_and_the_same_for_the_same_seed(database, runs, tmp_path):
    study = draw(database, runs, n_pictures=7)
    with db.transaction(database) as conn:
        assert review.run_for_pictures(conn, study).name == "plain"
    drawn = items(database)
    assert len(drawn) == 3 * 7 * 2
    modalities = Counter(modality for reader, _, place, _, modality, _ in drawn if (reader, place) == (1, 1))
    assert sorted(modalities.values()) == [1, 3, 3], (
        "the only ultrasound that both captioned, and as many of the others"
    )
    assert {image_id for *_, image_id, _, _ in drawn}.isdisjoint({"test_00015"}), "not captioned by both"
    other = db.connect(f"sqlite:///{tmp_path}/other.db")
    register(other, tmp_path / "set", ["test"], run="before")
    for name, n in (("tuned", 15), ("plain", 16)):
        register(other, tmp_path / "set", ["test"], run=name)
        with db.transaction(other) as conn:
            run = queue.get_run(conn, name)
        caption(other, run, texts(*(f"{name} {at}" for at in range(n))), split="test")
    with db.transaction(other) as conn:
        theirs = [queue.get_run(conn, run.name) for run in runs]
    draw(other, theirs, n_pictures=7)
    assert items(other) == drawn
    other.dispose()
    draw(database, runs, "two", n_pictures=7, seed=8)
    assert items(database) != sorted([*drawn, *drawn])


def test_each_reader_has_an_order_of_their_own(database, runs):
    draw(database, runs, n_pictures=12)
    orders = {reader: [] for reader in (1, 2, 3)}
    firsts = Counter()
    for reader, _, place, image_id, _, run in items(database):
        if place == 1:
            orders[reader].append((image_id, run))
            firsts[run] += 1
    assert len({tuple(image_id for image_id, _ in order) for order in orders.values()}) == 3
    assert len({frozenset(order) for order in orders.values()}) == 3, "which text is first differs too"
    assert {frozenset(image_id for image_id, _ in order) for order in orders.values()} == {
        frozenset(image_id for image_id, _ in orders[1])
    }
    assert min(firsts.values()) > 8


def test_originals_are_one_more_text_and_pictures_without_one_are_left_out(database, runs):
    draw(database, runs, with_original=True, n_pictures=14)
    drawn = items(database)
    assert Counter(run for *_, run in drawn) == {"plain": 42, "tuned": 42, None: 42}
    assert "test_00003" not in {image_id for _, _, _, image_id, *_ in drawn}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pictures": 16}, "Only 15 pictures of test are captioned by plain and tuned: caption more, or ask for "),
        ({"name": "taken"}, "There is a study 'taken' already, and a study never changes. Choose another name."),
        ({"name": " \n"}, "is not the name of a study"),
        ({"name": "a/b"}, "'a/b' is not the name of a study: it stands in web addresses"),
        ({"name": ".."}, "'..' is not the name of a study"),
    ],
)
def test_a_study_that_cannot_be_drawn_is_refused_whole(database, runs, options, message):
    draw(database, runs, "taken")
    before = items(database)
    with pytest.raises(RococapError) as caught:
        draw(database, runs, **options)
    assert message in str(caught.value)
    assert items(database) == before
    with pytest.raises(RococapError, match=r"^A preference needs at least two texts"):
        draw(database, runs[:1])
    draw(database, runs[:1], form=FORM)


# --- Reading ---------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_a_reader_is_shown_the_texts_in_the_drawn_order_without_a_hint_of_the_runs(database, runs):
    study = draw(database, runs)
    assert joined(database, study, "ann", " bob ", "ann") == [1, 2, 1]
    shown = list(pictures(database, study, "bob"))
    expected: dict[int, list[str]] = {}
    for reader, position, _, image_id, _, run in items(database):
        if reader == 2:
            expected.setdefault(position, [image_id]).append(f"{run} {int(image_id[-5:])}")
    assert {one.position: [one.image_id, *one.texts] for one in shown} == expected
    for one in shown:
        left = {name: value for name, value in asdict(one).items() if name != "texts"}
        assert not {"plain", "tuned"} & set(json.dumps(left).replace('"', " ").split())
        assert set(left) == {
            *("study", "position", "n_pictures", "split", "image", "image_id", "form", "answers", "shown_at"),
        }


@pytest.mark.every_database
def test_two_new_readers_at_once_have_numbers_of_their_own(database, runs):
    study = draw(database, runs, n_readers=2)
    names = iter(["ann", "bob"])
    assert sorted(at_once(2, lambda: joined(database, study, next(names))[0])) == [1, 2]
    with pytest.raises(RococapError, match=r"^Study 'one' has its 2 readers already: \w+, \w+\.$"):
        joined(database, study, "cy")


def test_reading_goes_on_where_it_was_left_and_the_latest_answer_counts(database, runs):
    study = draw(database, runs, n_pictures=2, n_readers=1)
    joined(database, study, "ann")

    def upcoming() -> review.Shown | None:
        with db.transaction(database) as conn:
            return review.next_item(conn, study, "ann")

    first = upcoming()
    assert (first.position, first.answers) == (1, None)
    at = study.created_at
    rate(database, study, "ann", 1, Answers(1), shown_at=at, now=at + 4_000)
    rate(database, study, "ann", 1, Answers(2), shown_at=at + 5_000, now=at + 7_000)
    with db.transaction(database) as conn:
        assert review.item(conn, study, "ann", 1).answers == Answers(2)
        assert review.progress(conn, study).read == (("ann", 1),)
    assert upcoming().position == 2
    rate(database, study, "ann", 2, Answers(0), shown_at=at - 9_000, now=at + 9_000)
    assert upcoming() is None
    with db.transaction(database) as conn:
        found = review.results_of(conn, study)
    assert found["reading_sec"]["by_reader"] == {"ann": {"n": 2, "median": 7.5, "total": 15.0}}, (
        "no time before the study"
    )
    assert found["preference"]["shares"]["(none)"]["n"] == 1
    assert len(select(database, "SELECT id FROM ratings")) == 3


@pytest.mark.parametrize(
    ("form", "answers", "message"),
    [
        (Form(), Answers(3), "Say which text is best, or that none is: nothing was recorded."),
        (Form(), Answers(), "Say which text is best"),
        (Form(), Answers(1, ({}, {})), "Rate each of the 2 texts"),
        (FORM, Answers(1, ({"accuracy": 0, "style": 0},) * 2), "This study asks for no preference"),
        (FORM, Answers(None, ({"accuracy": 0, "style": 0},)), "Rate each of the 2 texts: nothing was recorded."),
        (FORM, Answers(None, ({"accuracy": 3, "style": 0},) * 2), "Answer 'accuracy' for each text"),
        (FORM, Answers(None, ({"accuracy": 0},) * 2), "Answer 'style' for each text: nothing was recorded."),
        (FORM, Answers(None, ({"accuracy": 0, "style": 0, "x": 0},) * 2), "This study does not ask for 'x'"),
    ],
)
def test_answers_that_the_form_does_not_ask_for_are_refused(database, runs, form, answers, message):
    study = draw(database, runs, form=form)
    joined(database, study, "ann")
    with pytest.raises(RococapError) as caught:
        rate(database, study, "ann", 1, answers)
    assert message in str(caught.value)
    with pytest.raises(RococapError, match=r"^Study 'one' has 6 pictures for each reader, no 7\."):
        rate(database, study, "ann", 7, answers)
    with pytest.raises(RococapError, match=r"^'bob' has not joined study 'one' yet"):
        rate(database, study, "bob", 1, answers)
    assert select(database, "SELECT id FROM ratings") == []


# --- The key ---------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_the_key_is_closed_until_everything_is_read_and_nobody_reads_after_that(database, runs):
    study = draw(database, runs)
    joined(database, study, *READERS)
    for reader in READERS:
        with pytest.raises(RococapError, match=r"^The key of study 'one' is closed: \d+ readings are missing"):
            results(database, study)
        read_all(database, study, reader, by("tuned"))
    found = results(database, study)
    assert (found["readings"], found["missing"], found["unblinding"]) == (18, 0, None)
    with pytest.raises(RococapError, match=r"^The key of study 'one' is open, so nobody can read in it any more\.$"):
        rate(database, study, "ann", 1, Answers(1))
    with pytest.raises(RococapError, match=r"^The key of study 'one' is open already\."):
        unblind(database, study)


@pytest.mark.every_database
def test_unblinding_opens_the_key_early_is_recorded_and_ends_the_study(database, runs):
    study = draw(database, runs)
    joined(database, study, "ann")
    read_all(database, study, "ann", by("plain"))
    opened = unblind(database, study)
    found = results(database, study)
    assert found["unblinding"] == {"reader": "dan", "n_missing": 12, "at": opened.at}
    assert (found["readings"], found["missing"], found["readers"]) == (6, 12, ["ann", None, None])
    assert found["preference"]["agreement"]["krippendorff"] is None
    with pytest.raises(RococapError, match="is open, so nobody can read in it any more"):
        joined(database, study, "bob")
    with db.transaction(database) as conn:
        assert review.next_item(conn, study, "ann") is None
    with pytest.raises(RococapError, match="is open already"):
        unblind(database, study)


def test_a_study_that_nobody_read_has_results_without_numbers(database, runs):
    for name, form in (("one", Form()), ("two", FORM)):
        study = draw(database, runs, name, form=form)
        unblind(database, study)
        assert results(database, study)["readings"] == 0
        assert "0 readings of 6 pictures" in said("study", "results", name)


def results(database: Engine, study: Study) -> dict:
    with db.transaction(database) as conn:
        return review.results_of(conn, study)


def unblind(database: Engine, study: Study) -> review.Unblinding:
    with writing(database) as conn:
        return review.unblind(conn, study, "dan")


# --- Results ---------------------------------------------------------------------------------------------------


def test_preferences_count_each_picture_once_and_are_told_by_modality(database, runs):
    study = draw(database, runs, with_original=True)
    joined(database, study, *READERS)
    read_all(database, study, "ann", by("tuned"), 5)
    read_all(database, study, "bob", by("tuned"), 10)
    read_all(database, study, "cy", lambda shown: None if shown.image_id < "test_00010" else by("Original")(shown), 20)
    found = results(database, study)
    assert found["texts"] == ["plain", "tuned", "(original)"]
    shares = found["preference"]["shares"]
    n_ct = found["preference"]["by_modality"]["CT"]["n"] // 3
    assert {name: (of["n"], of["share"]) for name, of in shares.items()} == {
        "plain": (0, 0.0),
        "tuned": (12, pytest.approx(2 / 3)),
        "(original)": (6 - n_ct, pytest.approx((6 - n_ct) / 18)),
        "(none)": (n_ct, pytest.approx(n_ct / 18)),
    }
    assert shares["tuned"]["interval"] == pytest.approx((0.30, 0.90), abs=0.01), "Wilson's for 4 of 6 pictures"
    by_modality = found["preference"]["by_modality"]
    assert sum(of["n"] for of in by_modality.values()) == 18
    assert by_modality["CT"]["shares"]["(none)"]["share"] == pytest.approx(1 / 3)
    agreed = found["preference"]["agreement"]
    assert agreed["readers"] == READERS
    assert agreed["cohen"]["ann, bob"] is None, "they always said the same"
    assert agreed["cohen"]["ann, cy"] == 0.0
    times = found["reading_sec"]["by_reader"]
    assert {name: of["median"] for name, of in times.items()} == {"ann": 5.0, "bob": 10.0, "cy": 20.0}


def test_ratings_have_means_intervals_and_agreement(database, runs):
    study = draw(database, runs, form=FORM, n_readers=2)
    joined(database, study, "ann", "bob")
    for reader, of_tuned in (("ann", 2), ("bob", 1)):
        for shown in pictures(database, study, reader):
            levels = [of_tuned if text.startswith("tuned") else 0 for text in shown.texts]
            rated = tuple({"accuracy": level, "style": level % 2} for level in levels)
            rate(database, study, reader, shown.position, Answers(None, rated))
    accuracy, style = results(database, study)["ratings"]
    assert accuracy["by_text"] == {
        "plain": {"n": [12, 0, 0], "mean": 1.0, "interval": (1.0, 1.0)},
        "tuned": {"n": [0, 6, 6], "mean": 2.5, "interval": (2.5, 2.5)},
    }
    assert style["by_text"] == {"plain": {"n": [12, 0]}, "tuned": {"n": [6, 6]}}
    assert accuracy["agreement"]["n_items"] == 12
    assert accuracy["agreement"]["cohen"]["ann, bob"] == pytest.approx(2 / 3)
    assert style["agreement"]["cohen"]["ann, bob"] == 0.0
    assert list(accuracy["by_modality"]) == ["CT", "MRI", "ultrasound"]


def test_a_report_shows_the_open_studies_of_its_runs(database, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))

    def page() -> str:
        return report(database, ["tuned"], "test", tmp_path / "report.html", pictures=0).path.read_text()

    study = draw(database, runs, "<b>blind")
    joined(database, study, "ann")
    read_all(database, study, "ann", by("plain"))
    assert "Reader studies" not in page(), "the key is closed"
    unblind(database, study)
    told = page()
    assert '<h3 id="study-1">&lt;b&gt;blind: 6 readings of 6 pictures of test; unblinded by dan at ' in told
    assert '<tr><th scope="row">all</th><td class="n">6</td><td class="n">100 [61, 100]</td>' in told
    other = draw(database, runs[:1], "other", form=FORM)
    joined(database, other, "ann")
    unblind(database, other)
    assert page().count('<h3 id="study-') == 1, "of other runs, and not read"


# --- Forms -----------------------------------------------------------------------------------------------------

RATING = '[[rating]]\nname = "accuracy"\nquestion = "How true is it?"\nlevels = ["wrong", "right"]\n'


def test_a_form_is_read_and_kept(tmp_path):
    path = tmp_path / "form.toml"
    path.write_text(f"preference = true\n{RATING}ordered = false\n{RATING.replace('accuracy', 'size')}")
    form = review.read_form(path)
    first = Scale("accuracy", "How true is it?", ("wrong", "right"), False)
    assert form == Form(True, (first, Scale("size", "How true is it?", ("wrong", "right"))))
    assert Form.from_json(form.to_json()) == form
    path.write_text(RATING)
    assert review.read_form(path).preference is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("preference = false", "it asks for nothing"),
        ("preference = 1", "preference must be true or false"),
        ("colour = 1", "'colour' is not one of preference, rating"),
        ("rating = 1", "not a form"),
        ("[[rating]]", "'levels' is missing"),
        (RATING + RATING, "two ratings have the same name"),
        (RATING + "size = 1", "'size' is not one of name, question, levels, ordered"),
        (RATING + "ordered = 1", "ordered must be true or false"),
        (RATING.replace('"wrong", ', ""), "levels must be a list of 2 to 20 different texts"),
        (RATING.replace('"wrong"', "1"), "not a form"),
        (RATING.replace('"How true is it?"', '""'), "question must have 1 to 500 characters"),
        ("= 1", "Invalid"),
    ],
)
def test_a_file_that_is_no_form_is_refused(tmp_path, content, message):
    path = tmp_path / "form.toml"
    path.write_text(content)
    with pytest.raises(RococapError) as caught:
        review.read_form(path)
    assert str(caught.value).startswith(f"{path} is not a form for a study (")
    assert message in str(caught.value)


# --- The commands ----------------------------------------------------------------------------------------------


def test_a_study_by_its_commands(database, runs):
    two = ("--run", "plain", "--run", "tuned")
    sized = ("--split", "test", "--pictures", "6", "--readers", "2")
    assert said("study", "status") == "There is no study here yet. Make one: rococap study new --help\n"
    assert said("study", "new", "one", *two, *sized, "--seed", "7") == "one: 6 pictures for each of 2 readers\n"
    assert "Name a run whose captions to read" in refused("study", "new", "two", *sized, code=2)
    with db.transaction(database) as conn:
        study = review.get_study(conn, "one")
    joined(database, study, "ann")
    read_all(database, study, "ann", by("tuned"))
    assert [line.split() for line in said("study", "status", "one").splitlines()] == [
        ["study", "reader", "read", "key"],
        ["one", "ann", "6/6", "closed"],
        ["one", "reader", "2", "0/6", "closed"],
    ]
    assert refused("study", "results", "one").startswith("The key of study 'one' is closed: 6 readings are missing")
    assert "There is no study 'x'. Studies: one." in refused("study", "status", "x")
    assert said("study", "unblind", "one", "--reader", "dan", "--yes").startswith(
        "one: unblinded, with 6 readings missing."
    )
    [status] = json.loads(said("study", "status", "--json"))
    assert (status["key"], status["missing"], status["unblinding"]["reader"]) == ("unblinded", 6, "dan")
    told = said("study", "results", "one")
    assert told.startswith("one: 6 readings of 6 pictures of test; unblinded by dan at 2")
    assert [line.split() for line in told.splitlines() if line.startswith(("best", "all"))] == [
        ["best,", "in", "%", "readings", "plain", "tuned", "(none)"],
        ["all", "6", "0", "[0,", "39]", "100", "[61,", "100]", "0", "[0,", "39]"],
    ]
    assert json.loads(said("study", "results", "one", "--json"))["preference"]["shares"]["tuned"]["n"] == 6


def test_the_key_stays_closed_unless_somebody_says_yes(database, runs):
    draw(database, runs)
    result = invoke("study", "unblind", "one", input="n\n")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("The key stays closed. To open it without being asked, add --yes.")
    assert select(database, "SELECT * FROM unblindings") == []
