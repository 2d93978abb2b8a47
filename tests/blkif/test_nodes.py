# SPDX-License-Identifier: Apache-2.0
"""What xenstore nodes mean, written by honest peers of every kind and by those who lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif import nodes
from xvd.blkif.abi import Abi, InfoFlag, XenbusState
from xvd.blkif.features import (
    BackendFeatures,
    format_backend,
    format_offer,
    format_size,
    parse_backend,
    parse_offer,
)
from xvd.blkif.nodes import FrontendConfig, NodeChanges, QueueConfig, Side
from xvd.errors import PeerProtocolError
from xvd.types import Gref, Port

SIMPLE = {"ring-ref": "8", "event-channel": "5"}
GEOMETRY = {"sectors": "2048", "info": "0", "sector-size": "512"}
GARBAGE = ["x", "-1", "+1", "1.0", "0x8", "1 2", " 1", "1_0", "٣", "4294967296", "9" * 21, "1\0x"]


def frontend(**changed: str) -> FrontendConfig:
    found = SIMPLE | {name.replace("_", "-"): value for name, value in changed.items()}
    return nodes.parse_frontend(found, host_abi=Abi.X86_64, max_ring_page_order=4, max_queues=4)


def parse(found: dict[str, str], host: Abi = Abi.X86_64) -> FrontendConfig:
    return nodes.parse_frontend(found, host_abi=host, max_ring_page_order=4, max_queues=4)


def apply(directory: dict[str, str], changes: NodeChanges) -> dict[str, str]:
    """The directory after the changes, as a transaction would leave it."""
    kept = {
        name: value
        for name, value in directory.items()
        if name not in changes.remove and name.split("/")[0] not in changes.remove
    }
    return kept | dict(changes.write)


# The frontend's directory, read by a backend.


@pytest.mark.parametrize(
    ("order", "refs", "expected"),
    [
        (None, {"ring-ref": "8"}, (8,)),
        (None, {"ring-ref0": "9"}, (9,)),
        (None, {"ring-ref": "8", "ring-ref0": "9"}, (8,)),
        ("0", {"ring-ref0": "9"}, (9,)),
        ("0", {"ring-ref": "8"}, (8,)),
        ("0", {"ring-ref": "8", "ring-ref0": "9"}, (9,)),
        ("1", {"ring-ref0": "9", "ring-ref1": "10"}, (9, 10)),
        ("1", {"ring-ref": "8", "ring-ref0": "9", "ring-ref1": "10"}, (9, 10)),
        ("4", {f"ring-ref{page}": str(page + 20) for page in range(16)}, tuple(range(20, 36))),
    ],
)
def test_ring_order_decision_table(
    order: str | None, refs: dict[str, str], expected: tuple[int, ...]
) -> None:
    found = refs | {"event-channel": "5"} | ({} if order is None else {"ring-page-order": order})

    config = parse(found)

    assert config.queues == (QueueConfig(tuple(Gref(ref) for ref in expected), Port(5)),)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"event-channel": "5"}, "frontend node ring-ref is missing"),
        ({"ring-ref": "8"}, "frontend node event-channel is missing"),
        (SIMPLE | {"ring-page-order": "1"}, "frontend node ring-ref0 is missing"),
        (SIMPLE | {"ring-page-order": "5"}, "ring-page-order holds 5: at most 4 was offered"),
        (SIMPLE | {"ring-page-order": "4000000000"}, "ring-page-order holds 4000000000"),
        (SIMPLE | {"multi-queue-num-queues": "0"}, "multi-queue-num-queues holds '0'"),
        (SIMPLE | {"multi-queue-num-queues": "5"}, "multi-queue-num-queues holds 5: 4 were"),
        (SIMPLE | {"multi-queue-num-queues": "2"}, "frontend node queue-0/ring-ref is missing"),
        (SIMPLE | {"event-channel": "0"}, "event-channel holds '0'"),
        (SIMPLE | {"protocol": "ia64-abi"}, "protocol: 'ia64-abi'"),
    ],
)
def test_a_frontend_that_makes_no_sense_is_refused_by_name(
    found: dict[str, str], match: str
) -> None:
    with pytest.raises(PeerProtocolError, match=match):
        parse(found)


@pytest.mark.parametrize(
    "name",
    [
        "ring-ref",
        "event-channel",
        "ring-page-order",
        "multi-queue-num-queues",
        "feature-persistent",
        "feature-large-sector-size",
    ],
)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_a_frontend_number_names_the_node(name: str, garbage: str) -> None:
    with pytest.raises(PeerProtocolError, match=f"frontend node {name} holds"):
        parse(SIMPLE | {name: garbage})


def test_a_value_is_not_shown_at_full_length() -> None:
    with pytest.raises(PeerProtocolError) as caught:
        parse(SIMPLE | {"ring-ref": "A" * 2000})

    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["8", "8\0", "8\n", "8 \0", "0000000008"])
def test_white_space_and_nul_may_end_a_number(text: str) -> None:
    assert parse(SIMPLE | {"ring-ref": text}).queues[0].ring_refs == (8,)


@pytest.mark.parametrize(
    ("host", "protocol", "abi"),
    [
        (Abi.X86_64, None, Abi.X86_32),
        (Abi.X86_32, None, Abi.X86_32),
        (Abi.ARM, None, Abi.ARM),
        (Abi.X86_64, "", Abi.X86_32),
        (Abi.X86_64, "x86_64-abi", Abi.X86_64),
        (Abi.X86_64, "x86_32-abi\0", Abi.X86_32),
        (Abi.X86_64, "arm-abi", Abi.ARM),
    ],
)
def test_protocol_defaults(host: Abi, protocol: str | None, abi: Abi) -> None:
    found = SIMPLE if protocol is None else SIMPLE | {"protocol": protocol}

    assert parse(found, host).abi is abi


def test_one_queue_lies_at_the_top_even_when_counted() -> None:
    """Windows writes the number 1; leftovers of another driver must not be read."""
    config = parse(SIMPLE | {"multi-queue-num-queues": "1", "queue-0/ring-ref": "99"})

    assert config.queues[0].ring_refs == (8,)


def test_several_queues_share_one_order() -> None:
    found = {"multi-queue-num-queues": "2", "ring-page-order": "1"}
    for queue in range(2):
        found |= {f"queue-{queue}/ring-ref{page}": str(10 + 2 * queue + page) for page in range(2)}
        found[f"queue-{queue}/event-channel"] = str(queue + 1)

    config = parse(found)

    assert config.queues == (
        QueueConfig((Gref(10), Gref(11)), Port(1)),
        QueueConfig((Gref(12), Gref(13)), Port(2)),
    )


@pytest.mark.parametrize(("text", "persistent"), [("1", True), ("0", False), ("", False)])
def test_persistent_grants_are_off_unless_asked_for(text: str, persistent: bool) -> None:
    assert frontend(feature_persistent=text).persistent is persistent


@pytest.mark.slow
@given(
    found=st.dictionaries(
        st.sampled_from([*SIMPLE, "ring-page-order", "multi-queue-num-queues", "protocol"]),
        st.text(max_size=30),
    )
)
def test_no_frontend_directory_raises_anything_else(found: dict[str, str]) -> None:
    try:
        config = parse(found)
    except PeerProtocolError:
        return
    assert config.ring_pages in (1, 2, 4, 8, 16)


# The frontend's directory, written by a frontend.


def queues(count: int, pages: int) -> tuple[QueueConfig, ...]:
    return tuple(
        QueueConfig(tuple(Gref(100 * queue + page) for page in range(pages)), Port(queue + 1))
        for queue in range(count)
    )


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("pages", [1, 16])
@pytest.mark.parametrize("abi", list(Abi))
def test_what_a_frontend_writes_is_read_back(count: int, pages: int, abi: Abi) -> None:
    config = FrontendConfig(abi, queues(count, pages), persistent=True)

    written = apply({}, nodes.format_frontend(config))

    assert parse(written) == config


def test_a_simple_frontend_after_a_rich_one_leaves_nothing_that_misleads() -> None:
    """Firmware with one page once inherited the order and the queues of the system before it."""
    rich = FrontendConfig(Abi.X86_32, queues(4, 16), persistent=True)
    simple = FrontendConfig(Abi.X86_64, queues(1, 1))
    toolstack = {"backend": "/x", "state": "1", "virtual-device": "51712"}
    before = apply(toolstack, nodes.format_frontend(rich)) | {"num-ring-pages": "16"}
    children = {path.split("/")[0] for path in before}

    after = apply(before, nodes.format_frontend(simple, children))

    assert after == toolstack | {
        "protocol": "x86_64-abi",
        "feature-persistent": "0",
        "ring-ref": "0",
        "event-channel": "1",
    }


# The backend's directory, read by a frontend.


def test_a_bare_backend_has_no_feature() -> None:
    features = parse_backend(GEOMETRY)

    assert features == BackendFeatures(2048, flush=False)


@pytest.mark.parametrize("name", list(GEOMETRY))
def test_geometry_is_mandatory(name: str) -> None:
    found = {key: value for key, value in GEOMETRY.items() if key != name}

    with pytest.raises(PeerProtocolError, match=f"backend node {name} is missing"):
        parse_backend(found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sectors", str(2**54 + 1)),
        ("sectors", "-1"),
        ("sector-size", "0"),
        ("sector-size", "256"),
        ("sector-size", "1000"),
        ("sector-size", "131072"),
        ("info", "readonly"),
        ("feature-max-indirect-segments", "many"),
        ("max-ring-page-order", "-1"),
    ],
)
def test_a_backend_that_makes_no_sense_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(PeerProtocolError, match=f"backend node {name} holds"):
        parse_backend(GEOMETRY | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("sectors", str(2**54), "sectors", 2**54),
        ("sectors", "0", "sectors", 0),
        ("info", "5", "info", InfoFlag.CDROM | InfoFlag.READONLY),
        ("info", "4294967295", "info", InfoFlag(7)),
        ("physical-sector-size", "4096", "physical_sector_size", 4096),
        ("physical-sector-size", "256", "physical_sector_size", 512),
        ("physical-sector-size", "3000", "physical_sector_size", 512),
        ("feature-max-indirect-segments", "256", "max_indirect_segments", 256),
        ("feature-max-indirect-segments", "4000000", "max_indirect_segments", 4096),
        ("feature-max-indirect-segments", "11", "max_indirect_segments", 0),
        ("feature-flush-cache", "1", "flush", True),
        ("feature-barrier", "1", "barrier", True),
        ("feature-persistent", "1", "persistent", True),
        ("discard-secure", "1", "discard_secure", False),
    ],
)
def test_backend_value(name: str, value: str, attribute: str, expected: object) -> None:
    features = parse_backend(GEOMETRY | {name: value})

    assert getattr(features, attribute) == expected


def test_discard_without_a_granularity_has_that_of_a_sector() -> None:
    features = parse_backend(GEOMETRY | {"feature-discard": "1", "discard-secure": "1"})

    assert (features.discard_granularity, features.discard_secure) == (512, True)


@pytest.mark.parametrize(
    ("found", "offer"),
    [
        ({}, (0, 1)),
        ({"max-ring-page-order": "2", "multi-queue-max-queues": "2"}, (2, 2)),
        ({"max-ring-page-order": "9", "multi-queue-max-queues": "64"}, (4, 8)),
        ({"max-ring-pages": "4"}, (2, 1)),
        ({"max-ring-page-order": "1", "max-ring-pages": "16"}, (1, 1)),
        ({"multi-queue-max-queues": "0"}, (0, 1)),
    ],
)
def test_an_offer_is_cut_down_to_our_own_limits(
    found: dict[str, str], offer: tuple[int, int]
) -> None:
    assert parse_offer(found, max_ring_page_order=4, max_queues=8) == offer


@given(
    found=st.dictionaries(
        st.sampled_from(
            ["sectors", "info", "sector-size", "physical-sector-size", "max-ring-pages"]
        ),
        st.one_of(st.integers(-1, 2**65).map(str), st.text(max_size=12)),
    )
)
def test_no_backend_directory_raises_anything_else(found: dict[str, str]) -> None:
    try:
        features = parse_backend(GEOMETRY | found)
    except PeerProtocolError:
        return
    assert features.physical_sector_size >= features.sector_size >= 512


# The backend's directory, written by a backend.

RICH = BackendFeatures(
    2**40,
    InfoFlag.REMOVABLE,
    physical_sector_size=4096,
    barrier=True,
    discard=True,
    discard_granularity=4096,
    discard_alignment=512,
    discard_secure=True,
    persistent=True,
    max_indirect_segments=256,
    max_ring_page_order=4,
    max_queues=4,
)


@pytest.mark.parametrize("features", [RICH, BackendFeatures(8), BackendFeatures(0, flush=False)])
def test_what_a_backend_writes_is_read_back(features: BackendFeatures) -> None:
    written = apply({}, format_backend(features))

    assert parse_backend(written) == features


def test_a_poor_backend_after_a_rich_one_leaves_nothing_that_misleads() -> None:
    before = apply({"online": "1", "max-ring-pages": "16"}, format_backend(RICH))

    after = apply(before, format_backend(BackendFeatures(8)))

    assert "max-ring-pages" not in after
    assert parse_backend(after) == BackendFeatures(8)


def test_an_offer_takes_back_what_the_backend_before_published() -> None:
    before = apply({"online": "1"}, format_backend(RICH))

    after = apply(before, format_offer(BackendFeatures(8)))

    assert after == {
        "online": "1",
        "max-ring-page-order": "0",
        "multi-queue-max-queues": "1",
        "feature-max-indirect-segments": "0",
    }


def test_a_resize_repeats_the_state_so_that_the_watch_fires() -> None:
    assert format_size(4096).write == {"sectors": "4096", "state": "4"}


@pytest.mark.parametrize(("text", "state"), [(None, 0), ("", 0), ("4", 4), ("6\0", 6)])
def test_state(text: str | None, state: int) -> None:
    assert nodes.parse_state(Side.FRONTEND, text) is XenbusState(state)


@pytest.mark.parametrize("text", ["9", "-1", "four"])
def test_a_state_that_is_none_names_the_side(text: str) -> None:
    with pytest.raises(PeerProtocolError, match="frontend node state holds"):
        nodes.parse_state(Side.FRONTEND, text)


def test_no_node_is_listed_twice() -> None:
    assert len(nodes.NODES) == len(nodes._B) + len(nodes._F)
