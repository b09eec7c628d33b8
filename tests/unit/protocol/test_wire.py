"""Messages round the wire and back; everything that is not one is a WireError, whoever made it and however big it is."""

from __future__ import annotations

import math
import struct
import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from adapt.errors import VersionError, WireError
from adapt.protocol import messages as msg
from adapt.protocol import wire
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.wire import Blob, decode, encode
from tests.unit.protocol.anything import KINDS, messages

LIMIT_BYTES = 64 << 20
ATTEMPT = AttemptId(RequestId(bytes(16), 7), 1, 0, 1)
HEADER = TensorHeader(dtype="float32", shape=(25,), codec="raw", payload_bytes=100)
RUN = msg.RunStage(attempt=ATTEMPT, artifact="a" * 64, budget_s=1.5, codec="raw", tolerance=None, leaves=[HEADER, 3, 0.5, None, True])
HELLO = msg.ClientHello(protocol_version=msg.PROTOCOL_VERSION, client_id=bytes(16), incarnation=1, highest_term=0, software="test")
PAYLOAD = bytes(range(100))


def frames_of(kind: bytes, header: bytes) -> list[bytes]:
    """Frames 0 and 1 with a right checksum, whatever they say."""
    return [kind + xxhash.xxh3_64_digest(kind + header), header]


def plain(message: Any, **changes: Any) -> dict[str, Any]:
    document = {"s": 1, "t": 2, "m": msgspec.to_builtins(message, builtin_types=(bytes,)), "b": []}
    if isinstance(message, msg.RunStage):
        document["b"] = [[100, xxhash.xxh3_64_intdigest(PAYLOAD)]]
    return document | changes


def judged(message: Any, document: Any) -> wire.Envelope:
    payloads = [PAYLOAD] if isinstance(message, msg.RunStage) else []
    return decode([*frames_of(message.KIND, msgpack.packb(document)), *payloads], limit_bytes=LIMIT_BYTES)


def same(one: Any, other: Any) -> bool:
    """Equal, NaN being equal to itself, and of the same types."""
    if isinstance(one, msgspec.Struct):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return type(one) is type(other) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and one == other


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind):
    @settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
    @given(messages([kind]), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
    def check(sent, session, term):
        message, blobs = sent
        frames = encode(message, session=session, term=term, blobs=blobs)
        envelope = decode(frames, limit_bytes=LIMIT_BYTES)
        assert same(envelope.message, message)
        assert (envelope.session, envelope.term) == (session, term)
        assert [bytes(blob.contiguous()) for blob in envelope.blobs] == [bytes(blob.contiguous()) for blob in blobs]
        slowly = wire._read_slowly(kind, frames[1], limit_bytes=LIMIT_BYTES)
        assert same(slowly.message, message)
        if kind in wire._DECODERS:  # what we write is understood the quick way
            assert wire._ENCODER.encode(wire._DECODERS[kind].decode(frames[1])) == frames[1]

    check()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_flipped_bit_is_an_error_whatever_it_hits(kind):
    @settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
    @given(messages([kind]))
    def check(sent):
        frames = [bytes(frame) for frame in encode(sent[0], session=3, term=4, blobs=sent[1])]
        for place, frame in enumerate(frames):
            for bit in range(8 * len(frame)):
                spoilt = bytearray(frame)
                spoilt[bit // 8] ^= 1 << bit % 8
                with pytest.raises(WireError):
                    decode([*frames[:place], bytes(spoilt), *frames[place + 1 :]], limit_bytes=LIMIT_BYTES)

    check()


def test_nothing_is_copied_on_the_way():
    payload = bytearray(200_000)
    blob = Blob.of(payload)
    frames = encode(msg.ArtifactPiece(artifact="a" * 64, offset=0, file_bytes=1), session=1, term=1, blobs=(blob,))
    arrived = decode(frames, limit_bytes=LIMIT_BYTES).blobs[0]
    payload[77] = 1
    assert bytes(frames[2])[77] == arrived.contiguous()[77] == 1


def test_a_blob_of_many_parts_travels_as_one():
    data = bytes(range(256)) * 10
    whole = Blob.of(data)
    blob = Blob(whole.size, whole.checksum, (data[:1], b"", memoryview(data)[1:2000], data[2000:]))
    blob.verify()
    frames = encode(msg.ArtifactPiece(artifact="a" * 64, offset=0, file_bytes=1), session=1, term=1, blobs=(blob,))
    assert bytes(decode(frames, limit_bytes=LIMIT_BYTES).blobs[0].contiguous()) == data


@pytest.mark.parametrize("size, checksum, parts", [(3, None, (b"ab",)), (2, 0, (b"ab",)), (2, None, (b"a", b"c")), (1, None, ())])
def test_a_blob_knows_when_its_bytes_are_not_its_own(size, checksum, parts):
    with pytest.raises(WireError, match="does not match"):
        Blob(size, xxhash.xxh3_64_intdigest(b"ab") if checksum is None else checksum, parts).verify()


def test_ints_stand_for_floats_and_become_them():
    """A budget of whole seconds is said by people, and by languages that write 2.0 as 2."""
    document = plain(RUN)
    document["m"]["budget_s"], document["m"]["tolerance"] = 2, 1
    understood = judged(RUN, document).message
    assert (understood.budget_s, understood.tolerance) == (2.0, 1.0)
    assert type(understood.budget_s) is type(understood.tolerance) is float


def test_a_text_with_half_a_character_is_told_all_the_same():
    """Names of files may hold bytes that are no text; Python shows them as lone surrogates."""
    failed = msg.StageFailed(attempt=ATTEMPT, code="model", message="no file 'a\udcffb'", fields={"path": "\udcff"})
    arrived = decode(encode(failed, session=1, term=1), limit_bytes=LIMIT_BYTES).message
    assert (arrived.message, arrived.fields) == ("no file 'a?b'", {"path": "?"})


# ── versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [0, 2, 99, 2**63, -1])
@pytest.mark.parametrize("rest", [{}, {"client_id": 7, "new": [1, 2]}])
def test_another_version_is_named_before_anything_else_of_a_hello_is_judged(version, rest):
    document = plain(HELLO)
    document["m"] |= {"protocol_version": version} | rest
    with pytest.raises(VersionError) as caught:
        judged(HELLO, document)
    assert (caught.value.theirs, caught.value.ours) == (version, msg.PROTOCOL_VERSION)


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_a_version_that_is_no_number_is_no_version(version):
    document = plain(HELLO)
    document["m"]["protocol_version"] = version
    with pytest.raises(WireError) as caught:
        judged(HELLO, document)
    assert not isinstance(caught.value, VersionError)


# ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = [bytes(frame) for frame in encode(RUN, session=1, term=2, blobs=(Blob.of(PAYLOAD),))]


@pytest.mark.parametrize(
    "frames, told",
    [
        ([], "2 to 258 frames, this one 0"),
        ([b""], "this one 1"),
        ([b"", *GOOD], "first frame has 0 bytes, expected 10"),
        (GOOD[:1], "this one 1"),
        (GOOD[:2], "names 1 payload frames, 0 came"),
        ([*GOOD, b""], "names 1 payload frames, 2 came"),
        ([*GOOD[:2], *[b""] * 200_001], "this one 200003"),
        ([GOOD[0][:9], *GOOD[1:]], "first frame has 9 bytes"),
        ([GOOD[0] + b"x", *GOOD[1:]], "first frame has 11 bytes"),
        ([bytes(1 << 20), *GOOD[1:]], "first frame has 1048576 bytes"),
        ([*GOOD[:2], PAYLOAD[:-1]], "does not match its size"),
        ([*GOOD[:2], PAYLOAD + b"x"], "does not match its size"),
        ([*GOOD[:2], b""], "does not match its size"),
        ([GOOD[0], GOOD[1][:-1], PAYLOAD], "do not match their checksum"),
        ([*frames_of(b"XX", GOOD[1]), PAYLOAD], "unknown kind of message b'XX'"),
        ([GOOD[0], bytes(wire.MAX_HEADER_BYTES + 1)], "header of 8388609 bytes"),
        ([*GOOD[:2], bytes(LIMIT_BYTES)], "at most 67108864 are accepted"),
        ([b"GET / HTTP/1.1\r\n", b""], "first frame has 16 bytes"),
    ],
)
def test_wrong_frames_are_named_with_their_numbers(frames, told):
    with pytest.raises(WireError, match=told):
        decode(frames, limit_bytes=LIMIT_BYTES)


def test_frames_of_another_message_do_not_fit():
    other = encode(RUN, session=2, term=2, blobs=(Blob.of(PAYLOAD),))
    with pytest.raises(WireError):
        decode([GOOD[0], other[1], PAYLOAD], limit_bytes=LIMIT_BYTES)
    changed = encode(RUN, session=1, term=2, blobs=(Blob.of(PAYLOAD[::-1]),))
    with pytest.raises(WireError):
        decode([*GOOD[:2], changed[2]], limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize("message", [msg.SayHello(), HELLO, msg.StageAck(attempts=[]), msg.Goodbye(reason="")])
def test_only_messages_that_have_payload_frames_may_bring_some(message):
    document = plain(message, b=[[100, xxhash.xxh3_64_intdigest(PAYLOAD)]])
    with pytest.raises(WireError, match="expected 0 payload frames"):
        decode([*frames_of(message.KIND, msgpack.packb(document)), PAYLOAD], limit_bytes=LIMIT_BYTES)


def test_payload_frames_belong_to_the_tensors_in_their_order():
    two = replace(RUN, leaves=[replace(HEADER, payload_bytes=size) for size in (1, 2)])
    with pytest.raises(WireError, match=r"tensors are of \[1, 2\] bytes, its payload frames of \[2, 1\]"):
        decode(encode(two, session=1, term=1, blobs=(Blob.of(b"bb"), Blob.of(b"a"))), limit_bytes=LIMIT_BYTES)
    with pytest.raises(WireError, match="payload frames"):
        decode(encode(two, session=1, term=1, blobs=(Blob.of(b"a"),)), limit_bytes=LIMIT_BYTES)


def test_a_header_that_could_not_arrive_is_not_sent():
    huge = msg.StatusReport(call=1, term=1, uptime_s=1.0, workers=[], deployments=[], counters={f"{i:0200}": 1.0 for i in range(50_000)})
    with pytest.raises(WireError, match="can travel"):
        encode(huge, session=1, term=1)


# ── headers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("message", [RUN, HELLO, msg.StageAck(attempts=[ATTEMPT])], ids=lambda message: type(message).__name__)
@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"hello",
        b"\x00",
        b"\x80",
        b"\xff" * 100,
        b"\x91" * 10_000,
        b"\x91" * 10_000 + b"\x00",
        b"\x81\xa1m" * 10_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x84\xa1s\x01\xa1t\x02\xa1b\x90\xa1m\x81\xdb\xff\xff\xff\xff",
        b"\x84\xa1s\x01\xa1t\x02\xa1b\x90\xa1m\xa1\xff",
        b"\x84\x01\x01\x02\x02\x03\x90\x04\x80",
        b"\x84\xc4\x01s\x01\xc4\x01t\x02\xc4\x01b\x90\xc4\x01m\x80",
    ],
    ids=lambda header: header[:12].hex() or "empty",
)
def test_what_is_no_header_is_an_error(message, header):
    for frames in (frames_of(message.KIND, header), [*frames_of(message.KIND, header), PAYLOAD]):
        with pytest.raises(WireError):
            decode(frames, limit_bytes=LIMIT_BYTES)


def test_a_cut_or_lengthened_header_is_an_error():
    for message in (RUN, HELLO):
        header = msgpack.packb(plain(message))
        for changed in (*(header[:end] for end in range(len(header))), header + b"\x00", header + header):
            with pytest.raises(WireError):
                decode([*frames_of(message.KIND, changed), *[PAYLOAD] * (message is RUN)], limit_bytes=LIMIT_BYTES)


WRONG_TOP = [
    {"s": -1},
    {"s": 2**63},
    {"s": True},
    {"s": 1.0},
    {"s": None},
    {"t": "1"},
    {"t": 2**64 - 1},
    {"m": []},
    {"m": None},
    {"b": {}},
    {"b": [[100]]},
    {"b": [[100, 1, 1]]},
    {"b": [[-1, 1]]},
    {"b": [[2**48 + 1, 1]]},
    {"b": [[100, -1]]},
    {"b": [[100, 1.5]]},
    {"b": [[0, 0]] * 257},
    {"x": 1},
]


@pytest.mark.parametrize("changes", WRONG_TOP, ids=str)
@pytest.mark.parametrize("message", [RUN, HELLO], ids=lambda message: type(message).__name__)
def test_the_frame_of_the_header_is_typed(message, changes):
    with pytest.raises(WireError, match=type(message).__name__):
        judged(message, plain(message, **changes))


@pytest.mark.parametrize("name", ["s", "t", "m", "b"])
def test_nothing_of_the_header_may_be_missing(name):
    document = plain(RUN)
    del document[name]
    with pytest.raises(WireError, match=rf"RunStage: .*{name}"):
        judged(RUN, document)


LEAF = msgspec.to_builtins(HEADER)
WRONG_FIELDS = [
    ({"budget_s": -0.5}, "budget_s"),
    ({"budget_s": math.nan}, "budget_s"),
    ({"budget_s": math.inf}, "budget_s"),
    ({"budget_s": 1e300}, "budget_s"),
    ({"budget_s": True}, "budget_s"),
    ({"budget_s": "1"}, "budget_s"),
    ({"budget_s": None}, "budget_s"),
    ({"artifact": "a" * 65}, "artifact"),
    ({"artifact": b"a" * 64}, "artifact"),
    ({"artifact": None}, "artifact"),
    ({"codec": "x" * 5000}, "codec"),
    ({"codec": 5}, "codec"),
    ({"tolerance": "big"}, "tolerance"),
    ({"tolerance": False}, "tolerance"),
    ({"attempt": [[bytes(16), 7], 1, 0]}, "attempt"),
    ({"attempt": [[bytes(15), 7], 1, 0, 1]}, "attempt"),
    ({"attempt": [["x" * 16, 7], 1, 0, 1]}, "attempt"),
    ({"attempt": [[bytes(16), -7], 1, 0, 1]}, "attempt"),
    ({"attempt": [[bytes(16), 2**63], 1, 0, 1]}, "attempt"),
    ({"attempt": [[bytes(16), True], 1, 0, 1]}, "attempt"),
    ({"attempt": {"request": [bytes(16), 7]}}, "attempt"),
    ({"leaves": [LEAF] * 257}, "leaves"),
    ({"leaves": ["1"]}, "leaves"),
    ({"leaves": [[LEAF]]}, "leaves"),
    ({"leaves": [LEAF | {"shape": [-1]}]}, "shape"),
    ({"leaves": [LEAF | {"shape": [1] * 9}]}, "shape"),
    ({"leaves": [LEAF | {"shape": [2**49]}]}, "shape"),
    ({"leaves": [LEAF | {"shape": 25}]}, "shape"),
    ({"leaves": [LEAF | {"dtype": "x" * 17}]}, "dtype"),
    ({"leaves": [LEAF | {"dtype": "float33"}]}, "dtype"),
    ({"leaves": [LEAF | {"codec": "zip"}]}, "codec"),
    ({"leaves": [LEAF | {"payload_bytes": -1}]}, "payload_bytes"),
    ({"leaves": [LEAF | {"payload_bytes": 100.0}]}, "payload_bytes"),
    ({"leaves": [LEAF | {"color": "red"}]}, "color"),
    ({"leaves": [{name: value for name, value in LEAF.items() if name != "bound"}]}, "bound"),
    ({"leaves": [{name: value for name, value in LEAF.items() if name != "dtype"}]}, "dtype"),
    ({"color": "red"}, "color"),
    ({"x" * 1_000_000: 1}, "unknown field 'xxx"),
]


@pytest.mark.parametrize("changes, told", WRONG_FIELDS, ids=lambda value: str(value)[:60])
def test_wrong_fields_are_named(changes, told):
    document = plain(RUN)
    document["m"] |= changes
    with pytest.raises(WireError, match=told) as caught:
        judged(RUN, document)
    assert len(str(caught.value)) < 500


LZ4 = msg.CodecMeasured(name="lz4", ratio=1.5, ratios=[1.0, 2.0], encode_bytes_per_s=1e9, decode_bytes_per_s=2e9)
PROFILED = msg.ProgramProfiled(program="a" * 64, costs_s=[0.1], codecs=[LZ4])
WRONG_CODECS = [
    ({"ratio": -1.0}, "ratio"),
    ({"ratio": math.nan}, "ratio"),
    ({"ratio": math.inf}, "ratio"),
    ({"ratios": [1.0, -1.0]}, "ratios"),
    ({"ratios": [math.nan]}, "ratios"),
    ({"ratios": [None]}, "ratios"),
    ({"ratios": [1.0] * (msg.MOST_BOUNDARIES + 1)}, "not read further"),
    ({"encode_bytes_per_s": 1e300}, "encode_bytes_per_s"),
    ({"decode_bytes_per_s": -1.0}, "decode_bytes_per_s"),
    ({"name": "x" * 65}, "name"),
]


@pytest.mark.parametrize("changes, told", WRONG_CODECS, ids=lambda value: str(value)[:60])
def test_what_codecs_make_of_a_program_has_bounds(changes, told):
    document = plain(PROFILED)
    document["m"]["codecs"][0] |= changes
    with pytest.raises(WireError, match=told):
        judged(PROFILED, document)


@pytest.mark.parametrize("workspace", [-1, 1 << 63, 0.5, "much"])
def test_what_kernels_take_besides_has_bounds(workspace):
    document = plain(PROFILED)
    document["m"]["workspace_bytes"] = [0, None, workspace]
    with pytest.raises(WireError, match="workspace_bytes"):
        judged(PROFILED, document)


def test_what_codecs_and_kernels_make_of_a_large_program_fits_into_a_header():
    codec = replace(LZ4, ratios=[1.25] * msg.MOST_BOUNDARIES)
    workspace = [1 << 40] * msg.MOST_BOUNDARIES
    message = replace(PROFILED, costs_s=[0.1] * msg.MOST_BOUNDARIES, codecs=[codec, codec], workspace_bytes=workspace)
    assert decode(encode(message, session=1, term=1), limit_bytes=LIMIT_BYTES).message == message
    with pytest.raises(WireError, match="codecs"):
        judged(PROFILED, plain(replace(PROFILED, codecs=[LZ4] * 9)))


DIGEST = "a" * 64


@pytest.mark.parametrize("digest", ["a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61, b"a" * 64])
@pytest.mark.parametrize(
    "message, payloads",
    [
        (msg.LoadStage(artifact=DIGEST, file_bytes=1), []),
        (msg.Fetch(artifact=DIGEST, offset=0, length=1), []),
        (msg.ArtifactPiece(artifact=DIGEST, offset=0, file_bytes=1), [PAYLOAD]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_become_the_name_of_a_file_is_a_digest_and_nothing_else(message, payloads, digest):
    document = plain(message, b=[[len(one), xxhash.xxh3_64_intdigest(one)] for one in payloads])
    document["m"] |= {"artifact": digest}
    with pytest.raises(WireError, match="artifact"):
        decode([*frames_of(message.KIND, msgpack.packb(document)), *payloads], limit_bytes=LIMIT_BYTES)


def test_every_field_of_every_message_has_to_be_there_and_no_other():
    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(messages(), st.data())
    def check(sent, data):
        message, blobs = sent
        document = msgpack.unpackb(encode(message, session=1, term=1, blobs=blobs)[1])
        maps = [found for found in maps_of(document) if found]
        victim = data.draw(st.sampled_from(maps))
        if data.draw(st.booleans()):
            victim["surplus"] = 1
        else:
            del victim[data.draw(st.sampled_from(sorted(victim)))]
        payloads = [bytes(blob.contiguous()) for blob in blobs]
        with pytest.raises(WireError):
            decode([*frames_of(message.KIND, msgpack.packb(document)), *payloads], limit_bytes=LIMIT_BYTES)

    check()


def maps_of(value: Any) -> list[dict[str, Any]]:
    """All maps whose keys are fields; the free-form ones hold what they like."""
    if isinstance(value, list):
        return [found for one in value for found in maps_of(one)]
    if not isinstance(value, dict):
        return []
    inner = {name: one for name, one in value.items() if name not in ("fields", "model_args", "counters")}
    return [value, *(found for one in inner.values() for found in maps_of(one))]


def packed_twice(key: str, value: bytes) -> bytes:
    """RUN's header with one more entry of a map that has this key already."""
    header = msgpack.packb(plain(RUN))
    entry = msgpack.packb(key) + value
    if key == "s":
        return b"\x85" + header[1:] + entry
    mark = msgpack.packb("m") + bytes([0x80 | len(fields(RUN))])
    begin, end = header.split(mark)
    return begin + msgpack.packb("m") + bytes([0x80 | len(fields(RUN)) + 1]) + entry + end


@pytest.mark.parametrize("header", [packed_twice("s", b"\x01"), packed_twice("codec", b"\xa3raw")], ids=["top", "field"])
def test_a_key_that_stands_twice_is_an_error_even_with_one_value(header):
    with pytest.raises(WireError, match="stands twice"):
        decode([*frames_of(b"RS", header), PAYLOAD], limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize("value", [msgpack.Timestamp(1), msgpack.ExtType(5, b"x")], ids=["timestamp", "extension"])
@pytest.mark.parametrize("nested", [False, True])
def test_extensions_of_msgpack_are_not_let_in_where_anything_goes(value, nested):
    refused = msg.Refused(code="x", message="", fields={})
    document = plain(refused)
    document["m"]["fields"] = {"a": [{"b": value}]} if nested else {"a": value}
    with pytest.raises(WireError, match="extension"):
        judged(refused, document)


@pytest.mark.parametrize("depth", [10, 100, 300, 400, 450, 480, 500, 505, 1000, 100_000])
def test_what_is_nested_deep_is_a_message_or_a_wire_error(depth):
    header = b"\x84\xa1s\x01\xa1t\x02\xa1b\x90\xa1m\x83\xa4code\xa1x\xa7message\xa0\xa6fields\x81\xa1a" + b"\x91" * depth + b"\x01"
    try:
        decode(frames_of(b"RF", header), limit_bytes=LIMIT_BYTES)
    except WireError:
        assert depth > 100


def test_numbers_may_be_written_longer_than_needed():
    header = msgpack.packb(plain(RUN))
    longer = header.replace(b"\xa1s\x01", b"\xa1s\xcd\x00\x01")
    assert longer != header
    assert decode([*frames_of(b"RS", longer), PAYLOAD], limit_bytes=LIMIT_BYTES).session == 1


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(KINDS))
def test_random_bytes_as_a_header_are_answered_with_a_wire_error(header, kind):
    with pytest.raises(WireError):
        decode(frames_of(kind.KIND, header), limit_bytes=LIMIT_BYTES)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(messages(), st.data())
def test_a_changed_header_with_a_right_checksum_is_a_message_or_a_wire_error(sent, data):
    """What a hostile peer can do: the checksum is no secret. Whatever is accepted means what its canonical form means."""
    message, blobs = sent
    header = bytearray(encode(message, session=1, term=1, blobs=blobs)[1])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(header) - 1))
        header[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    payloads = [bytes(blob.contiguous()) for blob in blobs]
    try:
        envelope = decode([*frames_of(message.KIND, bytes(header)), *payloads], limit_bytes=LIMIT_BYTES)
    except WireError:
        return
    again = encode(envelope.message, session=envelope.session, term=envelope.term, blobs=envelope.blobs)
    assert same(decode(again, limit_bytes=LIMIT_BYTES).message, envelope.message)


@pytest.mark.parametrize("kind", [msg.RunStage, msg.WorkerHello, msg.Refused, msg.StatusReport], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("filling", [b"\x80", b"\x90", b"\xc0", b"\x00"], ids=["maps", "lists", "nothing", "numbers"])
def test_a_header_full_of_small_things_does_not_fill_the_memory(kind, filling):
    count = wire.MAX_HEADER_BYTES - 64
    header = b"\x84\xa1s\x01\xa1t\x01\xa1b\x90\xa1m\xdd" + struct.pack(">I", count) + filling * count
    frames = frames_of(kind.KIND, header)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(frames, limit_bytes=LIMIT_BYTES)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(header)
    finally:
        tracemalloc.stop()
