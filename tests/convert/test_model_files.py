"""Model directories: what is copied, what config.json says afterwards, and how a directory comes into its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sllm_vllm.convert.model_files import (
    adapt_config,
    copy_model_files,
    is_free,
    put_in_place,
    read_config,
    require_free,
    workplace,
)
from sllm_vllm.errors import ConfigError, WriteError, WriterBusy
from tests.support.cases import every_case


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def names_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_everything_but_weights_is_copied(tmp_path: Path) -> None:
    kept = {"config.json", "tokenizer.json", "modeling_x.py", "1_Pooling/config.json"}
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.pth", "model.tensors")
    ours = ("manifest.json", "partitions/rank-00000.safetensors", "partitions/notes.txt")
    source = fill(tmp_path / "source", *kept, *weights, *ours, ".git/config", ".hidden", "onnx/model.onnx")
    copy_model_files(source, tmp_path / "target")
    assert names_in(tmp_path / "target") == kept


def test_links_are_followed(tmp_path: Path) -> None:
    blob = fill(tmp_path / "blobs", "abc") / "abc"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").symlink_to(blob)
    copy_model_files(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").is_symlink()
    assert (tmp_path / "target" / "config.json").read_text() == "abc"


@every_case(
    "before, is_untied, after",
    [
        ({}, False, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, False, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, False, {"torch_dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "tie_word_embeddings": True}, False, {"dtype": "bfloat16", "tie_word_embeddings": True}),
        (
            {"dtype": "bfloat16", "text_config": {"tie_word_embeddings": True}},
            True,
            {"dtype": "bfloat16", "text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": False},
        ),
    ],
)
def test_config_says_what_the_weights_are(
    tmp_path: Path, before: dict[str, object], is_untied: bool, after: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(before))
    adapt_config(tmp_path, dtype="bfloat16", is_untied=is_untied)
    assert read_config(tmp_path) == after


def test_a_model_without_config_is_left_alone(tmp_path: Path) -> None:
    adapt_config(tmp_path, dtype="bfloat16", is_untied=True)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "can't be read"), ("{", "not JSON;"), ("[]", "not a JSON object")]
)
def test_a_config_that_is_none(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_config(tmp_path)


def test_only_nothing_and_an_empty_directory_are_free(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    fill(tmp_path / "full", "diary")
    assert [is_free(tmp_path / name) for name in ("nothing", "empty")] == [True, True]
    assert [is_free(tmp_path / name) for name in ("file", "link", "full")] == [False, False, False]
    with pytest.raises(WriteError, match="not empty"):
        require_free(tmp_path / "full")


def test_directory_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    put_in_place(fill(tmp_path / "made", "config.json"), tmp_path / "target")
    assert names_in(tmp_path / "target") == {"config.json"}


def test_directory_never_takes_the_place_of_a_full_one(tmp_path: Path) -> None:
    fill(tmp_path / "target", "diary")
    with pytest.raises(WriteError, match="not empty"):
        put_in_place(fill(tmp_path / "made", "config.json"), tmp_path / "target")
    assert names_in(tmp_path / "target") == {"diary"}


def test_one_works_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with workplace(target, "making") as root:
        fill(root, "half")
        with pytest.raises(WriterBusy), workplace(target, "making"):
            pass
        assert names_in(root) >= {"half"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("keep", "is_kept"), [(None, False), ("half", True), ("other", False)])
def test_failed_work_stays_if_one_can_go_on_with_it(tmp_path: Path, keep: str | None, is_kept: bool) -> None:
    def fail() -> None:
        with workplace(tmp_path / "target", "making", keep=keep) as root:
            fill(root, "parts/half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert bool(list(tmp_path.iterdir())) == is_kept
    with workplace(tmp_path / "target", "making") as root:
        assert (root / "parts" / "half").exists() == is_kept
