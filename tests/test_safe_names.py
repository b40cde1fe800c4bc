"""Names from outside lead to no file outside: by what they say, and through a manifest that somebody altered."""

import json
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import prepare_tiny

from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import Manifest
from gqe_jax.safe_names import checked_name

PARTS = st.sampled_from(["a", "shard-00001.bin", "é", "..", ".", "", "/", "~", "a\\b", "C:", "\0", "x\n", "..."])


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join))
def test_a_checked_name_stays_below_its_folder(name):
    """Joined to a folder and resolved by the rules of POSIX it is still below that folder, and needed no resolving."""
    try:
        checked_name(name, "manifest.json")
    except ConfigError as error:
        assert repr(name) in str(error)
    else:
        joined = posixpath.join("/root/set", name)
        assert posixpath.normpath(joined) == joined and joined.startswith("/root/set/")


@pytest.mark.parametrize("name", ["../../victim/authorized_keys", "/etc/passwd", "a/../../b", "..", "", None, 7, ["a"]])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ConfigError, match="must name one in its own folder"):
        checked_name(name, "manifest.json")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_tiny(directory, documents=20)
    return directory


def altered(prepared, change):
    content = json.loads((prepared / "manifest.json").read_text())
    change(content)
    target = prepared.with_name("altered")
    target.mkdir(exist_ok=True)
    (target / "manifest.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["train"]["shards"][0].update(name="../../victim/keys"), "names the file '../../victim/keys'"),
        (lambda m: m["files"][0].update(name="/etc/passwd"), "names the file '/etc/passwd'"),
        (lambda m: m["train"].update(rows="many"), "has rows='many', which must be a whole number"),
        (lambda m: m["train"]["shards"][0].update(bytes=-1), "has bytes=-1, which must be a whole number from 0"),
        (lambda m: m["train"].update(shards=5), "has shards=5, which must be a list of objects"),
        (lambda m: m["train"].update(unknown=1), "has the unknown 'unknown'"),
    ],
)
def test_an_altered_manifest_ends_in_a_sentence(prepared, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        Manifest.load(altered(prepared, change))
    assert "manifest.json" in str(error.value)


def test_a_manifest_nested_deeply_ends_in_a_sentence(prepared):
    target = altered(prepared, lambda content: None)
    (target / "manifest.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match=r"manifest.json is no JSON"):
        Manifest.load(target)
