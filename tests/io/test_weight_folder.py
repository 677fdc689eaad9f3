"""The hash of an adapter, which stores and answer files hold: its value must never move."""

from pathlib import Path

from fastsafe.io.weight_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_adapter,
    weights_sha256,
)


def test_the_hash_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_bytes(b'{"r": 8}')
    assert is_adapter(tmp_path)
    assert weights_sha256(tmp_path) is None, "its weights are missing"
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"weights")
    assert (
        weights_sha256(tmp_path)
        == "d9cc219697005258f4a895b0cee97d18e9a90ac2973c8e823a7edebe917a05a2"
    )
    (tmp_path / ADAPTER_CONFIG).write_bytes(b'{"r": 9}')
    assert (
        weights_sha256(tmp_path)
        != "d9cc219697005258f4a895b0cee97d18e9a90ac2973c8e823a7edebe917a05a2"
    )


def test_a_folder_without_weights_has_no_hash(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    assert weights_sha256(tmp_path) is None
