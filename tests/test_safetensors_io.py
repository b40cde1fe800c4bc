"""Safetensors files against the library of that name, and files that are damaged, forged, or pickles."""

import json
import os
import shlex

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch_folder  # noqa: F401 (keeps transformers off the network: before transformers)
from hypothesis import given, settings
from hypothesis import strategies as st

from gqe_jax.config import ConfigError
from gqe_jax.pytorch.safetensors_io import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Tensor,
    read_file,
    read_folder,
    refuse_pickle,
    write_files,
    write_weights,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "wide": RNG.standard_normal((300, 520)),
    "matrix": RNG.standard_normal((300, 520)).astype(np.float32),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "half": RNG.standard_normal(7).astype(np.float16),
    "brain": RNG.standard_normal((2, 3, 5)).astype(ml_dtypes.bfloat16),
}


def tensors(arrays):
    return [Tensor(n, a.shape, a.dtype, lambda a=a: a, source=n[::-1]) for n, a in arrays.items()]


def test_the_library_reads_what_is_written(tmp_path):
    """Values, dtypes, shapes; transposed views, too, are stored row-major; every tensor is aligned to its dtype."""
    arrays = ARRAYS | {"transposed": ARRAYS["matrix"].T, "view": ARRAYS["wide"][::2, 1:]}
    write_files({tmp_path / "x.safetensors": tensors(arrays)})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    for stored in read_file(tmp_path / "x.safetensors").values():
        assert stored.begin % {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[stored.dtype] == 0


def test_values_are_rounded_to_the_stored_dtype(tmp_path):
    """Float32 to bfloat16 by round to nearest, ties to even: half-way cases on both sides."""
    half_way = np.float32([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256])
    tensor = Tensor("x", (3,), np.dtype(ml_dtypes.bfloat16), lambda: half_way)
    write_files({tmp_path / "x.safetensors": [tensor]})
    stored = safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"]
    np.testing.assert_array_equal(stored.astype(np.float32), np.float32([1, 1 + 4 / 256, -1]))


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / WEIGHTS_FILE, metadata={"format": "np"})
    stored = read_folder(tmp_path)
    assert stored.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert stored[name].read().dtype == value.dtype
        np.testing.assert_array_equal(stored[name].read(), value)


@pytest.mark.parametrize("limit", [1, 4000, 10**9])
def test_shards(tmp_path, limit):
    """No shard above the limit but for a tensor that is larger alone; the index names each tensor's shard."""
    arrays = {f"t{i}": RNG.standard_normal((i + 1, 50)).astype(np.float32) for i in range(9)}
    names = write_weights(tmp_path, tensors(arrays), limit)
    assert sorted(names) == sorted(os.listdir(tmp_path))
    assert names == [WEIGHTS_FILE] if limit == 10**9 else names[0] == f"model-00001-of-{len(names) - 1:05}.safetensors"
    if limit < 10**9:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
        for shard in names[:-1]:
            content = safetensors.numpy.load_file(tmp_path / shard)
            assert len(content) == 1 or sum(a.nbytes for a in content.values()) <= limit
            assert {name for name, place in index["weight_map"].items() if place == shard} == content.keys()
    for name, stored in read_folder(tmp_path).items():
        np.testing.assert_array_equal(stored.read(), arrays[name])


def test_tensors_of_one_source_are_made_together(tmp_path):
    """Whatever shard they are in: their source is read once, and can be forgotten."""
    made = []

    def tensor(name, source):
        return Tensor(name, (2,), np.dtype(np.float32), lambda: made.append(source) or np.zeros(2), source)

    write_weights(tmp_path, [tensor("a", "x"), tensor("b", "y"), tensor("c", "x"), tensor("d", "y")], 8)
    assert made == ["x", "x", "y", "y"]


# ---------------------------------------------------------------------------- damage


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_that_names_the_file(tmp_path_factory, data):
    """A file cut anywhere is refused; one with altered bytes is refused, or says nothing false about its size."""
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    write_files({path: tensors({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)})})
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:cut])
    with pytest.raises(ConfigError, match=r"x\.safetensors cannot be read as a safetensors file"):
        read_file(path)
    at, byte = data.draw(st.integers(0, 150)), data.draw(st.integers(0, 255))
    path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
    try:
        for stored in read_file(path).values():
            assert stored.begin <= len(content)
    except ConfigError as error:
        assert "x.safetensors" in str(error)


def test_truncated_file_says_how_much_is_missing(tmp_path):
    path = tmp_path / "x.safetensors"
    write_files({path: tensors(ARRAYS)})
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(ConfigError, match=f"it is truncated: {size - 10} bytes, {size} expected.*copy or download it"):
        read_file(path)


def index(folder, weight_map):
    folder.mkdir(exist_ok=True)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "weights.bin"])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    """Nothing outside the folder is opened, wherever a stranger's index points."""
    write_files({tmp_path / "x.safetensors": tensors(ARRAYS)})
    with pytest.raises(ConfigError, match=r"but a shard is a \.safetensors file in the same folder") as error:
        read_folder(index(tmp_path / "folder", {"a": name}))
    assert repr(name) in str(error.value)


def test_index_and_shards_that_differ(tmp_path):
    write_files({tmp_path / "x.safetensors": tensors({"a": np.zeros(3, np.float32)})})
    with pytest.raises(ConfigError, match=r"lacks the shards y\.safetensors that model\.safetensors"):
        read_folder(index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}))
    with pytest.raises(ConfigError, match=r"does not fit its shards \(b is not in x.safetensors\)"):
        read_folder(index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"}))
    (tmp_path / INDEX_FILE).write_text("[1")
    with pytest.raises(ConfigError, match=r"index\.json is no JSON"):
        read_folder(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor model\.saf"):
        read_folder(tmp_path)


# ---------------------------------------------------------------------------- pickles


def run_suggestion(message):
    """What the message says to type, run here."""
    python, option, code = shlex.split(message.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    exec(code, {})


def test_pickled_file_and_its_conversion(tmp_path):
    """The line in the message turns the pickle, tied tensors too, into a file that is read."""
    torch = pytest.importorskip("torch")
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "tied": weight, "turned": weight.T}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="is a pickle, and unpickling runs whatever code is in it") as error:
        refuse_pickle(tmp_path / "weights.pt")
    run_suggestion(str(error.value))
    stored = read_file(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(stored["turned"].read(), weight.T)


def test_pickled_folder_and_its_conversion(tmp_path):
    """Also for folders, through transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, **sizes)
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has its weights as a pickle \(pytorch_model.bin\)") as error:
        read_folder(tmp_path / "old")
    run_suggestion(str(error.value))
    stored = read_folder(tmp_path / "old-safetensors")
    np.testing.assert_array_equal(stored["model.norm.weight"].read(), model.model.norm.weight.detach())
