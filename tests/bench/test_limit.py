# SPDX-License-Identifier: Apache-2.0
"""What the measurements of the limit leave to each other."""

from pathlib import Path

import pytest

from xvd.bench import limit


def test_two_measurements_at_once_have_an_image_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "IMAGE_SIZE", 1 << 20)

    one, other = limit._image(tmp_path), limit._image(tmp_path)

    assert one != other
    assert one.read_bytes() == other.read_bytes() == bytes(range(256)) * 4096
