"""Several messages in one bundle: the same messages in the same order, and whatever else is a WireError."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt.errors import WireError
from adapt.protocol import messages as msg
from adapt.protocol import wire
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.wire import (
    BUNDLE,
    INLINE_BYTES,
    MAX_BODY_BYTES,
    MAX_BUNDLE_BYTES,
    MAX_BUNDLE_FRAMES,
    MAX_BUNDLE_MESSAGES,
    PREAMBLE_BYTES,
    Blob,
    Envelope,
    Letter,
    bundles,
    decode,
    decode_bundle,
    encode_header,
    is_bundle,
)
from tests.unit.protocol.anything import KINDS, messages

LIMIT_BYTES = 64 << 20
ALONE = (msg.WorkerHello, msg.ClientHello, msg.Welcome, msg.Refused, msg.SayHello, msg.Attach, msg.Piece)
SIZES = st.sampled_from([0, 1, 100, INLINE_BYTES, INLINE_BYTES + 1, 2 * INLINE_BYTES])
PAYLOADS = st.builds(lambda seed, size: (seed * 2 * INLINE_BYTES)[:size], st.binary(min_size=1, max_size=3), SIZES)
LONG = st.integers(0, 4096).map(lambda size: (msg.Progress(call=size, step="x" * size), ()))
ATTEMPT = AttemptId(RequestId(bytes(16), 7), 1, 0, 1)


def letter(message: msg.Message, *blobs: Blob, session: int = 3, term: int = 4) -> Letter:
    return Letter(message, encode_header(message, session=session, term=term, blobs=blobs), blobs)


def run_stage(*sizes: int) -> Letter:
    """A message whose tensors are of so many bytes, no two alike."""
    blobs = [Blob.of(bytes([number + 1]) * size) for number, size in enumerate(sizes)]
    leaves = [TensorHeader(dtype="uint8", shape=(size,), codec="raw", payload_bytes=size) for size in sizes]
    return letter(msg.RunStage(attempt=ATTEMPT, artifact="a", budget_s=1.5, codec="raw", tolerance=None, leaves=leaves), *blobs)


def sealed(body: bytes, *payloads: bytes) -> list[bytes]:
    """A bundle with a right checksum, whatever it says."""
    return [BUNDLE + xxhash.xxh3_64_digest(body) + body, *payloads]


def entry(one: Letter, *, kind: bytes | None = None, length: int | None = None) -> bytes:
    """A message as it stands in the body, without blobs."""
    return struct.pack(">2sI", kind or one.message.KIND, len(one.header) if length is None else length) + one.header


def judged(frames: Sequence[bytes]) -> list[Envelope]:
    """As an endpoint reads."""
    return decode_bundle(frames, limit_bytes=LIMIT_BYTES) if is_bundle(frames) else [decode(frames, limit_bytes=LIMIT_BYTES)]


def plain(frames: Sequence[wire.Buffer]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def contents(blobs: Sequence[Blob]) -> list[bytes]:
    return [bytes(blob.contiguous()) for blob in blobs]


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(messages(KINDS, PAYLOADS) | LONG, max_size=30), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_whatever_is_bundled_comes_back_as_it_was_and_in_its_order(sent, session, term):
    letters = [letter(message, *blobs, session=session, term=term) for message, blobs in sent]
    parcels = [(list(carried), plain(frames)) for carried, frames in bundles(letters)]
    assert [id(one) for carried, _ in parcels for one in carried] == [id(one) for one in letters], "each is named once, in order"
    for carried, frames in parcels:
        envelopes = judged(frames)
        assert [repr(envelope.message) for envelope in envelopes] == [repr(one.message) for one in carried]  # NaN is equal to itself there
        assert {(envelope.session, envelope.term) for envelope in envelopes} == {(session, term)}
        assert [contents(envelope.blobs) for envelope in envelopes] == [contents(one.blobs) for one in carried]
        for envelope in envelopes:
            for blob in envelope.blobs:
                blob.verify()
        large = [blob for one in carried for blob in one.blobs if blob.size > INLINE_BYTES]
        if is_bundle(frames):
            assert len(frames) == 1 + len(large), "a frame for each large blob, and no other"
        if len(carried) > 1:
            assert is_bundle(frames) and len(frames[0]) <= MAX_BODY_BYTES + PREAMBLE_BYTES and len(large) <= MAX_BUNDLE_FRAMES
            assert not any(isinstance(one.message, ALONE) for one in carried)


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_what_is_about_the_connection_travels_by_itself(kind):
    @settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
    @given(messages([kind]))
    def check(sent):
        query = letter(msg.StatusQuery(call=1))
        letters = [query, query, letter(*sent[:1], *sent[1]), query, query]
        parcels = [(list(carried), plain(frames)) for carried, frames in bundles(letters)]
        assert [len(carried) for carried, _ in parcels] == [2, 1, 2]
        assert not is_bundle(parcels[1][1]) and parcels[1][1][0][:2] == kind.KIND

    check()


def test_nothing_is_bundled_where_nothing_is():
    assert list(bundles([])) == []


def test_a_message_by_itself_is_a_bundle_only_for_the_blobs_that_travel_within():
    ((_, frames),) = bundles([letter(msg.StatusQuery(call=1))])
    assert not is_bundle(frames) and len(frames) == 2
    ((_, frames),) = bundles([run_stage(INLINE_BYTES + 1)])
    assert not is_bundle(frames) and len(frames) == 3
    ((_, frames),) = bundles([run_stage(INLINE_BYTES)])
    assert is_bundle(frames) and len(frames) == 1


def test_a_bundle_is_filled_before_the_next_is_begun():
    query = letter(msg.StatusQuery(call=1))
    most = MAX_BUNDLE_MESSAGES
    assert [len(carried) for carried, _ in bundles([query] * (2 * most + 1))] == [most, most, 1]
    long = letter(msg.Goodbye(reason="x" * 1000))
    fitting = MAX_BODY_BYTES // len(entry(long))
    assert [len(carried) for carried, _ in bundles([long] * (2 * fitting + 1))] == [fitting, fitting, 1]
    big = run_stage(*[INLINE_BYTES + 1] * 8)
    assert [len(carried) for carried, _ in bundles([big] * 17)] == [MAX_BUNDLE_FRAMES // 8, MAX_BUNDLE_FRAMES // 8, 1]


def test_a_message_beyond_the_bounds_goes_alone_and_whole():
    much, many = run_stage(*[INLINE_BYTES] * 40), run_stage(*[INLINE_BYTES + 1] * (MAX_BUNDLE_FRAMES + 1))
    query = letter(msg.StatusQuery(call=1))
    parcels = list(bundles([query, much, query, many, query]))
    assert [len(carried) for carried, _ in parcels] == [1] * 5
    assert contents(judged(plain(parcels[1][1]))[0].blobs) == contents(much.blobs)
    assert contents(judged(plain(parcels[3][1]))[0].blobs) == contents(many.blobs)


def test_the_sessions_of_a_bundle_are_those_of_its_messages():
    letters = [letter(msg.StatusQuery(call=1), session=number, term=9 - number) for number in range(3)]
    ((_, frames),) = bundles(letters)
    assert [(envelope.session, envelope.term) for envelope in judged(plain(frames))] == [(0, 9), (1, 8), (2, 7)]


def test_large_blobs_are_not_copied():
    size = 2 * INLINE_BYTES
    payload = bytearray(size)
    header = TensorHeader(dtype="uint8", shape=(size,), codec="raw", payload_bytes=size)
    run = msg.RunStage(attempt=ATTEMPT, artifact="a", budget_s=1.5, codec="raw", tolerance=None, leaves=[header])
    ((_, frames),) = bundles([letter(msg.StatusQuery(call=1)), letter(run, Blob.of(payload))])
    arrived = decode_bundle(frames, limit_bytes=LIMIT_BYTES)[1].blobs[0]
    payload[77] = 1
    assert arrived.contiguous()[77] == 1


# ── what is no bundle ────────────────────────────────────────────────────────────────────────────────────────────────

LETTERS = [
    run_stage(100, 2 * INLINE_BYTES, 0, 7),
    letter(msg.StatusQuery(call=1)),
    letter(msg.Begun(attempt=ATTEMPT)),
    run_stage(INLINE_BYTES + 1),
    run_stage(10),
]
((_, _GOOD),) = bundles(LETTERS)
GOOD = plain(_GOOD)
QUERY = entry(letter(msg.StatusQuery(call=1)))


def test_every_flipped_bit_is_an_error():
    for place, frame in enumerate(GOOD):
        for bit in range(0, 8 * len(frame), 37 if place else 1):
            spoilt = bytearray(frame)
            spoilt[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                judged([*GOOD[:place], bytes(spoilt), *GOOD[place + 1 :]])


@pytest.mark.parametrize(
    "frames",
    [
        GOOD[:1],
        GOOD[:-1],
        [*GOOD, b""],
        [*GOOD, b"x"],
        [GOOD[0], GOOD[2], GOOD[1]],
        [GOOD[0], GOOD[1][:-1], GOOD[2]],
        [GOOD[0], GOOD[1] + b"x", GOOD[2]],
        [GOOD[0], b"", GOOD[2]],
        [GOOD[0][:-1], *GOOD[1:]],
        [GOOD[0] + b"x", *GOOD[1:]],
        [GOOD[0][:PREAMBLE_BYTES], *GOOD[1:]],
        [GOOD[0][:PREAMBLE_BYTES], GOOD[0][PREAMBLE_BYTES:], *GOOD[1:]],
        [*GOOD, *[b""] * 257],
        [],
        [BUNDLE],
        [BUNDLE, b""],
        [BUNDLE + bytes(7)],
    ],
    ids=range(17),
)
def test_frames_that_are_lost_or_strange_are_an_error(frames):
    with pytest.raises(WireError):
        decode_bundle(frames, limit_bytes=LIMIT_BYTES)


def test_a_bundle_has_a_limit():
    total = sum(map(len, GOOD))
    assert len(decode_bundle(GOOD, limit_bytes=total)) == len(LETTERS)
    with pytest.raises(WireError, match=f"a bundle of {total} bytes; at most {total - 1}"):
        decode_bundle(GOOD, limit_bytes=total - 1)


@pytest.mark.parametrize(
    "body, told",
    [
        (b"", "a bundle of 0 messages"),
        (b"S", "ends within a message"),
        (QUERY[:5], "ends within a message"),
        (QUERY[:-1], "ends within a message"),
        (QUERY + QUERY[:3], "ends within a message"),
        (QUERY + b"\0", "ends within a message"),
        (entry(letter(msg.StatusQuery(call=1)), length=2**32 - 1), "ends within a message"),
        (entry(letter(msg.StatusQuery(call=1)), length=0), "StatusQuery|header"),
        (entry(letter(msg.StatusQuery(call=1)), length=3), "StatusQuery|header"),
        (entry(letter(msg.StatusQuery(call=1)), kind=b"??"), r"unknown kind of message b'\?\?'"),
        (entry(letter(msg.StatusQuery(call=1)), kind=msg.Begun.KIND), "Begun"),
        (entry(letter(msg.StatusQuery(call=1)), kind=BUNDLE), "unknown kind of message b'BU'"),
        (struct.pack(">2sI", BUNDLE, len(QUERY)) + QUERY, "unknown kind of message b'BU'"),
        (QUERY + entry(letter(msg.SayHello())), "SayHello does not travel in a bundle"),
        (entry(letter(msg.Attach())) + QUERY, "Attach does not travel in a bundle"),
        (entry(run_stage(5)), "does not match its size and checksum"),  # its inline blob is missing
        (entry(run_stage(5)) + b"\2" * 5, "does not match its size and checksum"),
        (entry(run_stage(INLINE_BYTES + 1)), "does not match its size and checksum"),  # its frame is missing
        (QUERY + bytes(7), "unknown kind"),
    ],
    ids=range(19),
)
def test_a_body_that_does_not_add_up_is_an_error(body, told):
    with pytest.raises(WireError, match=told):
        decode_bundle(sealed(body), limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_no_hello_and_nothing_like_it_is_taken_out_of_a_bundle(kind):
    @settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
    @given(messages([kind]))
    def check(sent):
        with pytest.raises(WireError, match=f"{kind.__name__} does not travel in a bundle"):
            decode_bundle(sealed(QUERY + entry(letter(sent[0], *sent[1]))), limit_bytes=LIMIT_BYTES)

    check()


def test_a_blob_on_the_wrong_side_of_the_bound_is_an_error():
    """Where a blob travels is not a matter of taste: else one message would have several forms."""
    small, large = run_stage(INLINE_BYTES), run_stage(INLINE_BYTES + 1)
    with pytest.raises(WireError):
        decode_bundle(sealed(entry(small), bytes(small.blobs[0].contiguous())), limit_bytes=LIMIT_BYTES)
    with pytest.raises(WireError):
        decode_bundle(sealed(entry(large) + bytes(large.blobs[0].contiguous())), limit_bytes=LIMIT_BYTES)


def test_all_or_nothing():
    """A sender that is told of an error says everything again: what came before the wrong message must not have counted."""
    with pytest.raises(WireError):
        decode_bundle(sealed(QUERY + QUERY + entry(letter(msg.StatusQuery(call=1)), length=1)), limit_bytes=LIMIT_BYTES)


def test_a_bundle_is_no_message_and_a_message_is_no_bundle():
    header = letter(msg.StatusQuery(call=1)).header
    for frames in (sealed(QUERY), sealed(QUERY, QUERY), [BUNDLE + xxhash.xxh3_64_digest(BUNDLE + header), header]):
        with pytest.raises(WireError):
            decode(frames, limit_bytes=LIMIT_BYTES)
    ((_, frames),) = bundles([letter(msg.StatusQuery(call=1))])
    assert not is_bundle(frames) and not is_bundle([]) and not is_bundle([b""]) and not is_bundle([b"B"])
    assert is_bundle([memoryview(GOOD[0])])


# ── whatever comes ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=300)
@given(st.binary(max_size=300), st.lists(st.binary(max_size=20), max_size=3))
def test_random_bytes_are_answered_with_a_wire_error(body, payloads):
    with pytest.raises(WireError):
        decode_bundle(sealed(body, *payloads), limit_bytes=LIMIT_BYTES)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from([*msg.BY_KIND, BUNDLE, b"??"]), st.binary(max_size=40)), min_size=1, max_size=5))
def test_random_headers_in_good_order_are_answered_with_a_wire_error(entries):
    body = b"".join(struct.pack(">2sI", kind, len(header)) + header for kind, header in entries)
    with pytest.raises(WireError):
        decode_bundle(sealed(body), limit_bytes=LIMIT_BYTES)


@settings(max_examples=300)
@given(st.data())
def test_a_changed_body_under_a_right_checksum_is_what_it_says_or_a_wire_error(data):
    """What a hostile peer can do: the checksum is no secret. Whatever is accepted means what its own form means."""
    body, payloads = bytearray(GOOD[0][PREAMBLE_BYTES:]), GOOD[1:]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    if data.draw(st.booleans()):
        payloads = data.draw(st.permutations(payloads))[: data.draw(st.integers(0, 2))]
    try:
        envelopes = decode_bundle(sealed(bytes(body), *payloads), limit_bytes=LIMIT_BYTES)
    except WireError:
        return
    again = [letter(one.message, *one.blobs, session=one.session, term=one.term) for one in envelopes]
    back = [envelope for _, frames in bundles(again) for envelope in judged(plain(frames))]
    assert [msgspec.msgpack.encode(one.message) for one in back] == [msgspec.msgpack.encode(one.message) for one in envelopes]
    assert [contents(one.blobs) for one in back] == [contents(one.blobs) for one in envelopes]


def test_a_bundle_of_more_messages_than_a_reader_takes_at_a_time_is_refused():
    entries = entry(letter(msg.StatusQuery(call=1)))
    assert len(judged(sealed(entries * MAX_BUNDLE_MESSAGES))) == MAX_BUNDLE_MESSAGES
    with pytest.raises(WireError, match="more than"):
        judged(sealed(entries * (MAX_BUNDLE_MESSAGES + 1)))


def test_no_bundle_is_larger_than_what_any_receiver_takes():
    letters = [run_stage(64 << 10) for _ in range(16)] + [run_stage(2 * MAX_BUNDLE_BYTES), run_stage(1)]
    sizes = [sum(blob.size for letter in carried for blob in letter.blobs) for carried, _ in bundles(letters)]
    assert sum(sizes) == 16 * (64 << 10) + 2 * MAX_BUNDLE_BYTES + 1
    assert [size > MAX_BUNDLE_BYTES for size in sizes].count(True) == 1, "what is larger by itself travels by itself"
