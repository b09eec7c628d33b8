"""Messages in pieces: whole again however they were cut, and an error, told once, whenever a piece is missing, strange or spoilt."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from adapt.errors import WireError
from adapt.protocol import messages as msg
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.pieces import _NEVER_IN_PIECES, Assembler, decode_piece, is_piece, split
from adapt.protocol.wire import Blob, Envelope, encode_head
from tests.unit.protocol.anything import KINDS, messages

LIMIT_BYTES = 1 << 20
SMALL = 4096  # the smallest piece there is
SESSION, TERM = 5, 3
ATTEMPT = AttemptId(RequestId(bytes(16), 7), 1, 0, 1)
PIECES = [kind for kind in KINDS if kind not in _NEVER_IN_PIECES]
PAYLOADS = st.builds(
    lambda seed, size: (seed * 8192)[:size], st.binary(min_size=1, max_size=3), st.sampled_from([0, 1, 4095, 4096, 4097, 8192, 20000])
)


def assembler(limit_bytes: int = LIMIT_BYTES) -> Assembler:
    return Assembler(session=SESSION, term=TERM, limit_bytes=limit_bytes)


def message_of(*sizes: int) -> tuple[msg.StageDone, tuple[Blob, ...]]:
    """A message whose tensors are of so many bytes, no two alike."""
    blobs = tuple(Blob.of(bytes([number + 1]) * size) for number, size in enumerate(sizes))
    leaves = [TensorHeader(dtype="uint8", shape=(size,), codec="raw", payload_bytes=size) for size in sizes]
    times = msg.StageTimes(wait_s=0, decode_s=0, compute_s=0, encode_s=0)
    return msg.StageDone(attempt=ATTEMPT, leaves=leaves, times=times, input_digest=b"", output_digest=b""), blobs


def pieces_of(message, blobs, *, transfer=1, piece_bytes=SMALL, session=SESSION, term=TERM) -> list[list[bytes]]:
    parcels = split(message, session=session, term=term, blobs=blobs, transfer=transfer, piece_bytes=piece_bytes)
    return [[bytes(frame) for frame in parcel] for parcel in parcels]


def put_together(pieces, into: Assembler | None = None) -> Envelope:
    """The message of these pieces, of which only the last may complete it."""
    into = into or assembler()
    *firsts, last = [decode_piece(piece, into) for piece in pieces]
    assert firsts == [None] * len(firsts)
    assert last is not None
    return last


def contents(blobs) -> list[bytes]:
    return [bytes(blob.contiguous()) for blob in blobs]


BIG, BIG_BLOBS = message_of(10_000, 0, SMALL, 5)
SPLIT = pieces_of(BIG, BIG_BLOBS)


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(messages(PIECES, PAYLOADS), st.sampled_from([4096, 4097, 10_000, 1 << 20]))
def test_whatever_is_cut_is_whole_again(sent, piece_bytes):
    message, blobs = sent
    pieces = pieces_of(message, blobs, piece_bytes=piece_bytes)
    assert all(is_piece(piece) for piece in pieces)
    assert all(len(frame) <= piece_bytes for piece in pieces for frame in piece[4 if piece is pieces[0] else 2 :])
    assert len(pieces) == max(sum(-(-blob.size // piece_bytes) for blob in blobs), 1), "the first piece brings a slice already"
    envelope = put_together(pieces)
    assert repr(envelope.message) == repr(message)  # NaN is equal to itself there
    assert (envelope.session, envelope.term) == (SESSION, TERM)
    assert contents(envelope.blobs) == contents(blobs)
    for blob in envelope.blobs:
        blob.verify()


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    messages([msg.RunStage, msg.ArtifactPiece], PAYLOADS), st.lists(st.sampled_from([4096, 5000, 8192, 1 << 20]), min_size=1, max_size=4)
)
def test_what_arrived_in_pieces_may_go_on_in_others(sent, hops):
    message, blobs = sent
    forwarded = blobs
    for piece_bytes in hops:
        forwarded = put_together(pieces_of(message, forwarded, piece_bytes=piece_bytes)).blobs
    assert contents(forwarded) == contents(blobs)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 20_000), max_size=6), st.integers(4096, 9000))
def test_pieces_depend_on_the_bytes_alone_and_not_on_how_they_lie(cuts, piece_bytes):
    data = bytes(range(250)) * 80
    whole = Blob.of(data)
    edges = sorted([0, *cuts, len(data)])
    scattered = Blob(whole.size, whole.checksum, tuple(data[begin:end] for begin, end in itertools.pairwise(edges)))
    message = msg.ArtifactPiece(artifact="a" * 64, offset=0, file_bytes=1)
    assert pieces_of(message, (scattered,), piece_bytes=piece_bytes) == pieces_of(message, (whole,), piece_bytes=piece_bytes)


def test_forwarding_copies_nothing():
    message, blobs = message_of(3 * SMALL + 10)
    arrived = put_together(pieces_of(message, blobs))
    parcels = list(split(arrived.message, session=1, term=1, blobs=arrived.blobs, transfer=1, piece_bytes=SMALL))
    slices = [parcel[-1].obj if isinstance(parcel[-1], memoryview) else parcel[-1] for parcel in parcels]
    assert slices == list(arrived.blobs[0].parts)
    assert all(cut is part for cut, part in zip(slices, arrived.blobs[0].parts, strict=True))


def test_a_message_without_payload_is_one_piece():
    pieces = pieces_of(msg.Progress(call=1, step="x" * 4000), ())
    assert len(pieces) == 1
    assert put_together(pieces).message == msg.Progress(call=1, step="x" * 4000)
    empty = message_of(0, 0)
    assert contents(put_together(pieces_of(*empty)).blobs) == [b"", b""]


def test_transfers_follow_each_other():
    into = assembler()
    for transfer in (1, 2, 7):
        message, blobs = message_of(transfer * 3000, 5000)
        assert contents(put_together(pieces_of(message, blobs, transfer=transfer), into).blobs) == contents(blobs)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def outcome(pieces, into: Assembler) -> tuple[list[Envelope], int]:
    """What came out, and how often an error did."""
    done, errors = [], 0
    for piece in pieces:
        try:
            envelope = decode_piece(piece, into)
        except WireError:
            errors += 1
        else:
            done += [envelope] if envelope is not None else []
    return done, errors


@settings(max_examples=300)
@given(st.lists(st.integers(0, len(SPLIT) - 1), max_size=2 * len(SPLIT)))
def test_no_other_order_of_pieces_makes_a_message(order):
    """Whatever is lost, repeated or swapped: the message comes out only where its pieces stood in a row, and then it is right."""
    done, _ = outcome([SPLIT[index] for index in order], assembler())
    whole = list(range(len(SPLIT)))
    rows = sum(order[begin : begin + len(whole)] == whole for begin in range(len(order)))
    assert len(done) == rows
    assert all(contents(envelope.blobs) == contents(BIG_BLOBS) for envelope in done)


@settings(max_examples=200)
@given(st.data())
def test_interleaved_transfers_never_mix(data):
    """One connection carries one transfer after the other; a sender that mixes two loses at least one, and no byte changes sides."""
    other, other_blobs = message_of(9000, 9000)
    queues = [list(SPLIT), pieces_of(other, other_blobs, transfer=2)]
    mixed = []
    while any(queues):
        mixed.append(data.draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    done, _ = outcome(mixed, assembler())
    for envelope in done:
        assert contents(envelope.blobs) in (contents(BIG_BLOBS), contents(other_blobs))
        assert [leaf.payload_bytes for leaf in envelope.message.leaves] == [blob.size for blob in envelope.blobs]
    assert len(done) <= 2


@pytest.mark.parametrize("lost", range(len(SPLIT)))
def test_a_lost_piece_is_told_once_and_the_next_transfer_is_fine(lost):
    into = assembler()
    done, errors = outcome([piece for index, piece in enumerate(SPLIT) if index != lost], into)
    assert (done, errors) == ([], int(lost < len(SPLIT) - 1))  # without the last nobody can know yet
    assert contents(put_together(pieces_of(BIG, BIG_BLOBS, transfer=2), into).blobs) == contents(BIG_BLOBS)


def test_a_torn_transfer_is_dropped_by_the_next():
    into = assembler()
    assert outcome(SPLIT[:2], into) == ([], 0)
    assert contents(put_together(pieces_of(BIG, BIG_BLOBS, transfer=2), into).blobs) == contents(BIG_BLOBS)


def test_a_flipped_bit_in_any_frame_of_any_piece_is_told():
    for place, piece in enumerate(SPLIT):
        for number, frame in enumerate(piece):
            for bit in {*range(0, 8 * len(frame), max(1, len(frame) // 40)), 8 * len(frame) - 1}:
                spoilt = bytearray(frame)
                spoilt[bit // 8] ^= 1 << bit % 8
                changed = [*piece[:number], bytes(spoilt), *piece[number + 1 :]]
                done, errors = outcome([*SPLIT[:place], changed, *SPLIT[place + 1 :]], assembler())
                assert done == []
                assert errors >= 1


def piece_with(payload, **changes) -> list[bytes]:
    facts = {"transfer": 1, "index": 0, "count": 1, "piece_bytes": SMALL} | changes
    return [*encode_head(msg.Piece(**facts), session=SESSION, term=TERM), *payload]


INNER = SPLIT[0][2:]


@pytest.mark.parametrize(
    "pieces, told",
    [
        ([piece_with(INNER, count=2)], r"are 5 pieces, not 2"),
        ([piece_with(INNER, count=0)], r"are 5 pieces, not 0"),
        ([piece_with(INNER, count=2**63 - 1)], "are 5 pieces, not"),
        ([piece_with(INNER, count=5, piece_bytes=1 << 20)], "are 3 pieces, not 5"),
        ([piece_with([], count=5)], "carries 2 or 3 frames, this one 0"),
        ([piece_with(INNER[:1], count=5)], "carries 2 or 3 frames, this one 1"),
        ([piece_with(INNER[:2], count=5)], "expected one frame of 4096 bytes"),
        ([piece_with([*INNER, b""], count=5)], "carries 2 or 3 frames, this one 4"),
        ([piece_with([*INNER[:2], INNER[2][:-1]], count=5)], "expected one frame of 4096 bytes"),
        ([piece_with([*INNER[:2], INNER[2] + b"x"], count=5)], "expected one frame of 4096 bytes"),
        ([piece_with([*INNER[:2], b"\xff" * SMALL], count=5), *SPLIT[1:3]], "10000 bytes does not match its checksum"),
        ([piece_with([INNER[0], INNER[1][:-1], INNER[2]], count=5)], "checksum"),
        ([piece_with([*pieces_of(*message_of(0, 0))[0][2:], b""], count=1)], "a slice of blobs that have no bytes"),
        ([piece_with([*pieces_of(msg.Progress(call=1, step=""), ())[0][2:], b"x"], count=1)], "a slice of blobs that have no bytes"),
        ([piece_with([b"x"], index=3, count=5)], "its first piece never came"),
        ([SPLIT[0], piece_with([SPLIT[1][2][:-1]], index=1, count=5)], "expected one frame of 4096 bytes"),
        ([SPLIT[0], piece_with([SPLIT[1][2] + b"x"], index=1, count=5)], "expected one frame of 4096 bytes"),
        ([SPLIT[0], piece_with([], index=1, count=5)], "expected one frame"),
        ([SPLIT[0], piece_with([SPLIT[1][2]] * 2, index=1, count=5)], "expected one frame"),
        ([SPLIT[0], piece_with([SPLIT[1][2]], index=1, count=6)], "expected piece 1 of 5, got 1 of 6"),
        ([SPLIT[0], piece_with([SPLIT[1][2]], index=2, count=5)], "expected piece 1 of 5, got 2 of 5"),
        ([SPLIT[0], piece_with([SPLIT[1][2]], index=1, count=5, piece_bytes=5000)], "expected piece 1"),
        ([SPLIT[0], piece_with([b"\xff" * SMALL], index=1, count=5), SPLIT[2]], "10000 bytes does not match its checksum"),
        ([SPLIT[0], piece_with([SPLIT[1][2]], index=1, count=5, transfer=2)], "its first piece never came"),
    ],
)
def test_a_piece_that_does_not_fit_is_named(pieces, told):
    into = assembler()
    with pytest.raises(WireError, match=told):
        for piece in pieces:
            assert decode_piece(piece, into) is None
    assert contents(put_together(pieces_of(BIG, BIG_BLOBS, transfer=9), into).blobs) == contents(BIG_BLOBS)


@pytest.mark.parametrize(
    "facts", [{"piece_bytes": 4095}, {"piece_bytes": 0}, {"piece_bytes": (1 << 20) + 1}, {"index": -1}, {"transfer": -1}]
)
def test_a_piece_has_bounds(facts):
    with pytest.raises(WireError, match=next(iter(facts))):
        decode_piece(piece_with([b"x"], **facts), assembler())


def test_a_message_beyond_the_limit_is_refused_at_its_first_piece():
    message, blobs = message_of(LIMIT_BYTES, 1)
    pieces = pieces_of(message, blobs)
    into = assembler()
    with pytest.raises(WireError, match=f"a message of {LIMIT_BYTES + 1} bytes; at most {LIMIT_BYTES}"):
        decode_piece(pieces[0], into)
    assert outcome(pieces[1:], into) == ([], 0)  # told once
    assert put_together(pieces_of(*message_of(LIMIT_BYTES), transfer=2), into).blobs[0].size == LIMIT_BYTES


@pytest.mark.parametrize("kind", _NEVER_IN_PIECES, ids=lambda kind: kind.__name__)
def test_what_is_about_the_connection_does_not_travel_in_pieces(kind):
    @settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
    @given(messages([kind]))
    def check(sent):
        with pytest.raises(WireError, match="does not travel in pieces"):
            decode_piece(pieces_of(*sent)[0], assembler())

    check()


def test_no_piece_is_an_error():
    for frames in ([], [b""], [b"PI"], SPLIT[0][:1], SPLIT[0][2:]):
        with pytest.raises(WireError):
            decode_piece(frames, assembler())


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("into", [None, assembler()], ids=["no session", "another session"])
@pytest.mark.parametrize("stamp", [{"session": SESSION - 1}, {"term": TERM - 1}])
def test_pieces_of_another_session_come_to_one_message_that_can_be_answered(into, stamp):
    """They are no error of the session that stands; their sender has to learn that its own does not."""
    arrived = [decode_piece(piece, into) for piece in pieces_of(BIG, BIG_BLOBS, **stamp)]
    *firsts, last = arrived
    assert firsts == [None] * len(firsts)
    assert isinstance(last.message, msg.Piece)
    assert {"session": SESSION, "term": TERM} | stamp == {"session": last.session, "term": last.term}


def test_pieces_of_another_session_do_not_disturb():
    into = assembler()
    stale = pieces_of(BIG, BIG_BLOBS, session=SESSION - 1)
    mixed = [piece for pair in zip(stale, SPLIT, strict=True) for piece in pair]
    done, errors = outcome(mixed[1:], into)  # the first stale piece went to the session before
    assert errors == 0
    assert [type(envelope.message) for envelope in done] == [msg.Piece, msg.StageDone]
    assert contents(done[1].blobs) == contents(BIG_BLOBS)


def test_a_message_and_its_pieces_are_of_one_session():
    inner = encode_head(BIG, session=SESSION - 1, term=TERM, blobs=BIG_BLOBS)
    with pytest.raises(WireError, match="different sessions"):
        decode_piece(piece_with([*inner, INNER[2]], count=5), assembler())


def test_parts_of_a_finished_message_are_those_that_arrived():
    """The dispatcher keeps inputs: a copy of each would double its memory."""
    frames = [piece[-1] for piece in SPLIT]
    arrived = put_together(SPLIT)
    assert [part for blob in arrived.blobs for part in blob.parts if part] == frames
    assert all(part is frame for part, frame in zip((part for blob in arrived.blobs for part in blob.parts if part), frames, strict=True))


def test_the_leaves_of_a_message_bound_its_pieces():
    """A header that promises other blobs than its tensors need is refused before any of them comes."""
    lying = replace(BIG, leaves=BIG.leaves[:1])
    with pytest.raises(WireError, match="payload frames"):
        decode_piece(pieces_of(lying, BIG_BLOBS)[0], assembler())
