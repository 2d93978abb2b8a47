# SPDX-License-Identifier: Apache-2.0
"""What a user writes for storage, and what it becomes; mistakes are told with their remedy."""

import errno
import os
import re
from pathlib import Path

import pytest
from rig_engines import image

from xvd.engines.checked import Checked
from xvd.engines.formats import FORMATS
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine, EngineInfo, Scheme
from xvd.engines.layers.base import LayerKind
from xvd.engines.layers.stats import Stats
from xvd.engines.memory import MemoryEngine
from xvd.engines.rbd import library
from xvd.engines.uri import LAYERS, PATH_SCHEMES, SCHEMES, open_engine
from xvd.errors import ConfigError, EngineError


def test_a_disk_of_the_largest_size() -> None:
    assert open_engine("null:18014398509481983s").info.size == 2**63 - 512


def test_memory_that_cannot_be_had_is_told() -> None:
    with pytest.raises(EngineError, match="no address space for a disk of") as caught:
        open_engine("memory:4096P")
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("form", ["{}", "file:{}"])
def test_a_bare_path_is_a_file(form: str, tmp_path: Path) -> None:
    engine = open_engine(form.format(image(tmp_path)))
    assert isinstance(engine, Checked)
    assert isinstance(engine.lower, FileEngine)
    engine.close()


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (
            "gopher:x",
            "unknown storage 'gopher:x'; there are bochs:, cloop:, dmg:, file:, https:",
        ),
        ("memory:", "'memory:' names no storage; write a path or a size after memory:"),
        ("file:", "names no storage"),
        ("memory:0", "'0' is no size of a disk: a multiple of 512, above 0"),
        ("null:1000", "no size of a disk"),
        ("null:1M,zeroes", "null: takes read-zeroes=on or read-zeroes=off after its size, not"),
        ("memory:lots", "'lots' is no size"),
    ],
)
def test_storage_that_cannot_be_understood(uri: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        open_engine(uri)


def test_the_first_layer_is_nearest_to_the_guest() -> None:
    engine = open_engine("memory:1M", layers=["error:one_in=1", "stats"])
    assert isinstance(engine, Checked)
    with pytest.raises(EngineError, match="on request of the error layer"):
        engine.flush()
    assert isinstance(engine.lower.lower, Stats)
    assert engine.lower.lower.counts == {}


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            "sheep",
            "there is no layer 'sheep'; there are cow, delay, detect-zeroes, error, log, rate, "
            "readonly, stats",
        ),
        ("delay:read", "layer options are key=value, separated by commas, not 'read'"),
        ("delay:read=1h", "'1h' is no time"),
        ("delay:reed=1s", "layer delay has no option reed"),
        ("stats:x=1", "layer stats has no option x"),
        ("error:errno=EWHAT", "there is no errno 'EWHAT'; write a name like EIO or ENOSPC"),
        ("error:errno=errorcode", "there is no errno 'errorcode'"),
        ("error:on=sleep", "on= takes read, write, flush, discard, joined by +, not sleep"),
        ("error:one_in=0", "one_in= takes a positive number, not '0'"),
        ("error:one_in=²", "one_in= takes a positive number"),
        ("error:seed=-1", "seed= takes a positive number, not '-1'"),
    ],
)
def test_layers_that_cannot_be_understood(layer: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        open_engine("memory:1M", layers=[layer])


def test_a_bad_layer_closes_what_was_opened(tmp_path: Path) -> None:
    path = str(image(tmp_path))
    with pytest.raises(ConfigError):
        open_engine(path, layers=["nonsense"])
    open_engine(path).close()


def test_layers_do_what_their_options_say() -> None:
    engine = open_engine("memory:1M", layers=["error:on=write+flush,one_in=1,errno=ENOSPC"])
    engine.read(memoryview(bytearray(512)), 0)
    with pytest.raises(EngineError) as caught:
        engine.write(memoryview(bytes(512)), 0)
    assert caught.value.errno == errno.ENOSPC


def test_which_schemes_name_a_path() -> None:
    assert {"file", "raw", "vpc", *FORMATS} - {"luks"} == PATH_SCHEMES


def test_read_only_is_asked_for_by_whoever_opens(tmp_path: Path) -> None:
    for uri in ("memory:1M", str(image(tmp_path))):
        engine = open_engine(uri, read_only=True)
        assert engine.info.read_only
        engine.close()


ENGINES_PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_is_described(scheme: Scheme) -> None:
    assert scheme.form.startswith(f"{scheme.name}:")
    assert re.search(rf"^\|.*`{re.escape(scheme.form)}`", ENGINES_PAGE, re.MULTILINE)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_layer_is_described_and_its_example_can_be_used(layer: LayerKind) -> None:
    row = re.search(rf"^\| `{layer.name}` \|(.*?)\|", ENGINES_PAGE, re.MULTILINE)

    assert row
    assert re.findall(r"(\w+)=", row[1]) == list(layer.options)
    open_engine("memory:1M", layers=[layer.example]).close()


class Blocks(MemoryEngine):
    """4096-byte blocks, and a size that they do not divide."""

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(size=4608, logical_block_size=4096)


def test_a_size_that_is_no_multiple_of_the_block() -> None:
    engine: Engine = Blocks(8192)
    with pytest.raises(EngineError, match="no multiple of its 4096-byte blocks; extend it: trunc"):
        Checked(engine)


@pytest.mark.parametrize(
    "uri", ["rbd:image", "rbd:pool/", "rbd:a/b/c/d", "rbd:pool/image,size=1", "rbd:p/i,conf=/none"]
)
def test_what_names_no_image_is_said(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"names no image|there is no file /none"):
        open_engine(uri)


def test_a_host_without_librbd(monkeypatch: pytest.MonkeyPatch) -> None:
    library._load.cache_clear()
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: os.stat(f"/nowhere/{name}"))

    with pytest.raises(EngineError, match="apt-get install librbd1"):
        open_engine("rbd:pool/image")
    library._load.cache_clear()
