"""The parts of the demo that need no cluster: images, the stream, the figures, what is printed."""

from __future__ import annotations

import io
import json
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from adapt.errors import ConfigError, DeadlineExceededError
from adapt.interfaces.demo import figures as fig
from adapt.interfaces.demo import images, links, reference, screen, stream

# --- images -----------------------------------------------------------------------------------------------------------


def test_the_bundled_crops_are_real_different_and_the_same_every_time():
    photographs = images.find_photographs(None)
    assert len(photographs) >= 8
    first, second = (images.load_images(photographs, 64, 64) for _ in range(2))
    assert first.pixels.shape == (64, 3, 64, 64)
    assert first.pixels.dtype == np.float32
    assert len({image.tobytes() for image in first.pixels}) == 64
    assert np.array_equal(first.pixels, second.pixels)
    assert first.names == second.names
    assert all(image.std() > 0.05 for image in first.pixels)  # no flat wall among them
    assert -2.2 < first.pixels.min() < -1 < 1 < first.pixels.max() < 2.7  # ImageNet's normalisation


def test_the_crops_do_not_depend_on_how_many_are_asked_for():
    photographs = images.find_photographs(None)
    few, many = (images.load_images(photographs, count, 32).pixels for count in (10, 20))
    assert np.array_equal(few, many[:10])


def write_picture(path, size, colour):
    from PIL import Image

    Image.new("RGB", size, colour).save(path)


def test_a_folder_is_read_in_order_and_only_its_pictures(tmp_path):
    write_picture(tmp_path / "b.png", (300, 200), (255, 0, 0))
    write_picture(tmp_path / "a.jpg", (100, 100), (0, 255, 0))
    (tmp_path / "notes.txt").write_text("no picture")
    found = images.find_photographs(tmp_path)
    assert [path.name for path in found] == ["a.jpg", "b.png"]
    assert images.load_images(found, 3, 224).names == ["a", "b", "a"]


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "a.txt").write_text("x"), lambda folder: folder.rmdir()])
def test_a_folder_without_pictures_is_refused(tmp_path, make):
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)
    with pytest.raises(ConfigError, match="images="):
        images.find_photographs(folder)


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"a\.png cannot be read as a picture"):
        images.load_images(images.find_photographs(tmp_path), 1, 224)
    write_picture(tmp_path / "a.png", (20, 300), (0, 0, 0))
    with pytest.raises(ConfigError, match=r"a\.png has 20x300 pixels; expected at least 64"):
        images.load_images(images.find_photographs(tmp_path), 1, 224)


def test_equal_reference_outputs_are_refused():
    outputs = np.arange(12, dtype=np.float32).reshape(4, 1, 3)
    reference.check_different(outputs)
    outputs[3] = outputs[1]
    with pytest.raises(ConfigError, match="images 1 and 3 have the same reference output"):
        reference.check_different(outputs)


# --- the stream -------------------------------------------------------------------------------------------------------


class Echo:
    """A model that answers when it is told to; counts what is in flight."""

    def __init__(self, *, silent_for=(), failing_for=()):
        self.futures, self.most_in_flight, self.log = [], 0, []
        self._silent, self._failing = set(silent_for), set(failing_for)

    def submit(self, image, *, deadline_s):
        future = Future()
        self.futures.append((image, future))
        waiting = [item for item in self.futures if not item[1].done()]
        self.most_in_flight = max(self.most_in_flight, len(waiting))
        if len(waiting) == 4:
            for value, waits in reversed(waiting):  # out of order
                if value not in self._silent:
                    self._answer(value, waits)
        return future

    def _answer(self, value, future):
        if value in self._failing:
            future.set_exception(DeadlineExceededError(1.0))
        else:
            future.set_result(np.full(3, value))


def test_answers_keep_the_order_of_the_images():
    model, told = Echo(), []
    answers = stream.stream(model, range(12), in_flight=4, deadline_s=1.0, answered=lambda number, answers: told.append(number))
    assert [int(answer.output[0]) for answer in answers] == list(range(12))
    assert model.most_in_flight == 4
    assert told == list(range(1, 13))
    assert all(answer.deliveries == 1 and answer.latency_s >= 0 for answer in answers)


def test_faults_happen_once_each_when_their_number_of_answers_has_come():
    seen, done = [], []
    faults = [stream.Fault(6, lambda: done.append(("late", len(seen)))), stream.Fault(3, lambda: done.append(("early", len(seen))))]
    stream.stream(Echo(), range(12), in_flight=4, deadline_s=1.0, faults=faults, answered=lambda number, answers: seen.append(number))
    assert done == [("early", 2), ("late", 5)]


def test_a_failed_request_is_an_answer_with_its_error():
    answers = stream.stream(Echo(failing_for={5}), range(8), in_flight=4, deadline_s=1.0)
    assert isinstance(answers[5].error, DeadlineExceededError)
    assert [answer.output is None for answer in answers] == [index == 5 for index in range(8)]


def test_a_request_that_never_ends_is_told_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(stream, "OVERDUE_S", 0.0)
    answers = stream.stream(Echo(silent_for={0}), range(4), in_flight=4, deadline_s=0.05)
    assert [answer.deliveries for answer in answers] == [0, 1, 1, 1]


# --- the figures ------------------------------------------------------------------------------------------------------


def made_answers(outputs):
    return [stream.Answer(float(index), index + 0.5, output, deliveries=1) for index, output in enumerate(outputs)]


OUTPUTS = np.random.default_rng(1).standard_normal((6, 1, 5)).astype(np.float32)


def test_right_answers_are_equal():
    verdict = fig.judge(made_answers(OUTPUTS), 6, OUTPUTS, OUTPUTS)
    assert (verdict.answered, verdict.equal, verdict.wrong, verdict.failed, verdict.duplicated, verdict.same_top1) == (6, 6, 0, 0, 0, 6)
    assert verdict.largest_difference == 0


def test_a_swap_a_flipped_bit_another_type_and_another_shape_are_wrong():
    for spoil in (
        lambda outputs: outputs.__setitem__(slice(0, 2), outputs[1::-1]),
        lambda outputs: outputs.__setitem__(0, np.nextafter(outputs[0], np.float32(9))),
        lambda outputs: outputs.__setitem__(0, outputs[0].astype(np.float64)),
        lambda outputs: outputs.__setitem__(0, outputs[0][0]),
    ):
        outputs = list(OUTPUTS)
        spoil(outputs)
        verdict = fig.judge(made_answers(outputs), 6, OUTPUTS, OUTPUTS)
        assert verdict.wrong in (1, 2)
        assert verdict.equal == 6 - verdict.wrong


def test_failures_and_silence_are_counted_apart_from_wrong_answers():
    answers = made_answers(OUTPUTS[:4])
    answers[1] = stream.Answer(0.0, 1.0, None, DeadlineExceededError(1.0), 1)
    answers[2] = stream.Answer(0.0)
    verdict = fig.judge(answers, 6, OUTPUTS, OUTPUTS)
    assert (verdict.answered, verdict.failed, verdict.wrong) == (2, 4, 0)
    assert verdict.errors == {"no answer within 1 s": 1, "no answer and no error by the deadline": 3}


def test_a_second_delivery_is_a_duplicate():
    answers = made_answers(OUTPUTS)
    answers[3].deliveries = 2
    assert fig.judge(answers, 6, OUTPUTS, OUTPUTS).duplicated == 1


def test_behind_a_lossy_codec_the_replay_is_what_answers_must_be():
    lossy = OUTPUTS + np.float32(0.01)
    verdict = fig.judge(made_answers(lossy), 6, OUTPUTS, lossy)
    assert (verdict.wrong, verdict.equal, verdict.same_top1) == (0, 0, 6)
    assert verdict.largest_difference == pytest.approx(0.01, rel=1e-3)


def test_rates_and_latencies():
    answers = made_answers(OUTPUTS)
    assert fig.rates(answers, 2) == (5.5, pytest.approx(6 / 5.5), pytest.approx(2 / 1.5))
    assert fig.rates([], None) == (0.0, 0.0, None)
    answers[5].answered_at = 15.0
    assert fig.latency_percentile_s(answers, 50) == 0.5
    assert fig.latency_percentile_s(answers, 99) == 10.0
    assert np.isnan(fig.latency_percentile_s([], 50))


def make_figures(**changes):
    verdict = fig.judge(made_answers(OUTPUTS), 6, OUTPUTS, OUTPUTS)
    figures = fig.Figures(
        model="torchvision/resnet50",
        weights="random weights (seed 0)",
        codec="raw",
        tolerance=None,
        stages=2,
        threads=1,
        in_flight=4,
        requested=6,
        verdict=verdict,
        workers_lost=1,
        workers_expected_lost=1,
        retries=3,
        evictions=1,
        late_answers=0,
        elapsed_s=5.5,
        images_per_s=1.09,
        images_per_s_before_faults=None,
        single_process_images_per_s=0.9,
        latency_p50_s=0.5,
        latency_p99_s=0.5,
        workers=[
            fig.WorkerFigures("w1", 11, [1, 2], 9, 1.5, "ready", ""),
            fig.WorkerFigures("w2", 12, [2], 3, 0.5, "lost", "killed (SIGKILL)"),
        ],
        codecs=[fig.CodecFigures("raw", 1000, 1000)],
        links=[],
    )
    return replace(figures, **changes)


def test_json_has_the_promised_names():
    plain = json.loads(json.dumps(make_figures().to_plain()))
    promised = {"requested", "answered", "failed", "equal", "wrong", "duplicated", "workers_lost", "retries"}
    promised |= {"images_per_s", "single_process_images_per_s", "latency_p50_s", "latency_p99_s"}
    assert promised <= plain.keys()
    assert plain["problems"] == []
    assert plain["codecs"] == [{"codec": "raw", "raw_bytes": 1000, "sent_bytes": 1000, "ratio": 1.0}]


def test_json_without_any_answer_is_still_json():
    plain = make_figures(latency_p50_s=float("nan")).to_plain()
    assert json.loads(json.dumps(plain, allow_nan=False))["latency_p50_s"] is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"verdict": fig.judge(made_answers(OUTPUTS[:5]), 6, OUTPUTS, OUTPUTS)}, "1 of 6 requests failed"),
        (
            {"verdict": fig.judge(made_answers(OUTPUTS[::-1]), 6, OUTPUTS, OUTPUTS)},
            "6 answers are wrong: not the eager model's, bit for bit",
        ),
        ({"workers_lost": 2}, "2 workers were given up, 1 had been killed or stopped"),
        ({"tolerance": 0.01, "links": [links.Link(1, worst_share=1.01)]}, "link from stage 1: error above its bound"),
    ],
)
def test_every_problem_is_named(changes, problem):
    figures = make_figures(**changes)
    assert problem in figures.problems
    assert problem in printed(figures)
    assert "All 6 answers" not in printed(figures)


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_link_keeps_its_largest_error_as_a_share_of_its_bound():
    link = links.Link(1)
    sent = np.array([0.0, 2.0], np.float32)
    link.note(sent, sent + np.float32(0.5), "zfp", 1.0, 4)
    link.note(sent, sent + np.float32(0.25), "zfp", 1.0, 4)
    assert (link.tensors, link.lossy_tensors, link.raw_bytes, link.sent_bytes) == (2, 2, 16, 8)
    assert (link.worst_share, link.worst_error, link.worst_std_share) == (0.5, 0.5, 0.5)


def test_a_lossless_tensor_that_changed_is_no_small_matter():
    link = links.Link(1)
    sent = np.array([1.0, np.nan], np.float32)
    link.note(sent, sent.copy(), "raw", 0.0, 8)
    assert link.worst_share == 0
    link.note(sent, sent + np.float32(1), "raw", 0.0, 8)
    assert link.worst_share == float("inf")


def test_a_value_that_became_nan_is_no_small_error():
    link = links.Link(1)
    sent = np.array([0.0, 2.0], np.float32)
    link.note(sent, np.array([0.0, np.nan], np.float32), "zfp", 1.0, 4)
    assert "link from stage 1: error above its bound" in make_figures(tolerance=0.01, links=[link]).problems


# --- what is printed --------------------------------------------------------------------------------------------------


def printed(figures):
    stream = io.StringIO()
    shown = screen.Screen(Console(file=stream))
    shown.report(figures)
    shown.verdict(figures)
    return stream.getvalue()


def test_the_report_says_what_was_found():
    text = printed(make_figures())
    assert "All 6 answers equal the eager model's, bit for bit, although 1 of 2 workers were lost on the way." in text
    assert "lost: killed (SIGKILL)" in text
    assert "retries 3, evictions 1, late answers dropped 0, workers lost 1 of 2" in text
    assert max(map(len, text.splitlines())) <= screen.PLAIN_WIDTH


def test_plain_steps_are_lines():
    stream = io.StringIO()
    shown = screen.Screen(Console(file=stream))
    with shown.step("stream") as step:
        step.update("loading", None)
        for number in range(1, 65):
            step.update(f"{number} of 64", number / 64)
        step.note("w1 killed [SIGKILL]")
        step.result = "done"
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[:4] == [
        ["stream", "loading", "..."],
        ["stream", "16", "of", "64"],
        ["stream", "32", "of", "64"],
        ["stream", "48", "of", "64"],
    ]
    assert lines[4] == ["w1", "killed", "[SIGKILL]"]
    assert lines[5][:2] == ["stream", "done"]


def test_labels_are_told_by_photograph():
    stream = io.StringIO()
    screen.Screen(Console(file=stream)).labels(["cat", "cat", "cup"], ["tabby", "tabby", "espresso"])
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["cat", "tabby", "2", "of", "2"] in lines
    assert ["cup", "espresso", "1", "of", "1"] in lines
