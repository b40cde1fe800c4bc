"""`gqe import` of folders from strangers: what they say is data, never code; it is checked before it is used, survives
where a user would miss it, and no altered byte ends in a traceback."""

import copy
import json
import shutil
import struct
import time

import numpy as np
import pytest
import tokenizers
import torch_folder  # keeps transformers off the network
from converted import read_run, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gqe_jax.attention import GQAConfig
from gqe_jax.checked_json import read_object
from gqe_jax.cli import main as cli
from gqe_jax.config import ConfigError
from gqe_jax.config_files import load_config
from gqe_jax.pytorch.exporting import export_hf
from gqe_jax.pytorch.hf_config import from_hf
from gqe_jax.pytorch.hf_tokenizer import read_tokenizer
from gqe_jax.pytorch.importing import import_folder, left_behind
from gqe_jax.pytorch.safetensors_io import INDEX_FILE, read_folder
from gqe_jax.runs.saved_model import open_model

assert torch_folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder that can be imported, of a small Llama."""
    directory = tmp_path_factory.mktemp("good")
    write_run(directory / "run", GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8), tie_embeddings=False)
    export_hf(open_model(directory / "run"), directory / "out")
    return directory / "out"


@pytest.fixture
def folder(tmp_path, good):
    return shutil.copytree(good, tmp_path / "from")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(tmp_path, capsys, *options):
    """The one line on standard error with which the import ends, exit code 2; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["import", "--from", f"{tmp_path}/from", "--run", f"{tmp_path}/run", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


# ---------------------------------------------------------------------------- data, not code


@pytest.mark.parametrize(
    "name", ['a"""\nraise SystemExit(7)\n"""', "back\\slash\\N{", "quote'\"", "new\nline", "{x}%s"]
)
def test_a_name_is_no_code(tmp_path, folder, name):
    """The folder's and the run's name end up in RUN/config.py, which `gqe train` runs: as values, whatever they are."""
    source = folder.rename(tmp_path / name)
    run = tmp_path / f"run {name}"
    config = import_folder(source, run)
    assert load_config(str(run / "config.py")) == config
    assert config.name == run.name


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "..", "x\0.safetensors", "a/b.safetensors", 5]
)
def test_a_shard_is_a_file_of_the_folder(tmp_path, folder, capsys, name):
    (folder / "model.safetensors").unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    err = refused(tmp_path, capsys)
    assert "a shard is a .safetensors file in the same folder" in err or "must be an object of texts" in err


def test_a_folder_may_be_a_link(tmp_path, folder):
    """`--run` as a link to an empty folder, and files that are links, as in the Hub's cache."""
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    weights = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(weights)
    import_folder(folder, tmp_path / "run")
    assert (tmp_path / "run").is_symlink() and read_run(tmp_path / "real")


# ---------------------------------------------------------------------------- never silently another model


def test_a_head_that_is_not_tied(tmp_path, folder, capsys):
    """transformers' versions do not agree on which of the two counts; equal ones are one."""
    change(folder / "config.json", tie_word_embeddings=True)
    err = refused(tmp_path, capsys)
    assert "tie_word_embeddings=true, but lm_head.weight in model.safetensors differs from model.embed_tokens" in err
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert import_folder(folder, tmp_path / "run").model.tie_embeddings


def test_weights_that_are_no_numbers(tmp_path, folder, capsys):
    """How many and where; taken as they are only when asked."""
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][:3] = np.nan
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = -np.inf
    save_file(state, folder / "model.safetensors")
    err = refused(tmp_path, capsys)
    assert (
        "4 weights in 2 tensors are NaN, infinite or beyond float32: model.norm.weight (3), model.layers.1.mlp" in err
    )
    import_folder(folder, tmp_path / "run", allow_nonfinite=True)
    assert np.isnan(read_run(tmp_path / "run")["final_norm.scale"]).sum() == 3


BAD = [
    ({"rms_norm_eps": -1}, "rms_norm_eps=-1 must be a finite number of at least 0"),
    ({"rope_parameters": 5}, "rope_parameters=5 must be an object"),
    ({"rope_parameters": [1, 2]}, "rope_parameters=[1, 2] must be an object"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    ({"rope_scaling": [1]}, "rope_scaling=[1] must be an object"),
    ({"model_type": ["gqe"]}, "model_type=['gqe'] must be a text"),
    ({"layer_types": 5}, "layer_types=5 must be a list of texts"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, and num_hidden_layers is 2"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "64"}},
     "rope_scaling: original_max_position_embeddings='64' must be a whole number from 1"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
     "original_max_position_embeddings=0 must be a whole number from 1"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling: factor='2' must be a finite number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0},
      "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
     "has both rope_scaling={'rope_type': 'linear', 'factor': 2.0} and rope_parameters={"),
    ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 100.0}}, "rope_theta=500.0 contradicts rope_param"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, but the weights of"),
    ({"vocab_size": 2**31 - 1}, "vocab_size=2147483647, but the weights of"),
    ({"hidden_size": 10**4000}, "hidden_size=a huge number must be a whole number"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token's id, or a list of them"),
    ({"sliding_window": 7}, "LlamaForCausalLM has no window"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD, ids=[str(changes)[:50] for changes, _ in BAD])
def test_fields_keep_their_rules(tmp_path, folder, capsys, changes, message):
    """File, field, value and rule in one sentence, within a second: no size is believed."""
    change(folder / "config.json", **changes)
    begin = time.process_time()
    assert message in refused(tmp_path, capsys)
    assert time.process_time() - begin < 5


def test_an_adapter_is_not_left_out(tmp_path, folder, capsys):
    """transformers adds it to the model as it loads it."""
    (folder / "adapter_config.json").write_text("{}")
    assert "a LoRA that transformers adds to the model as it loads it: merge it first" in refused(tmp_path, capsys)


DEEP = b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"


def test_nesting_is_bounded(tmp_path, folder, capsys):
    """Everywhere that JSON is read."""
    for name, content in {
        "config.json": DEEP,
        "generation_config.json": DEEP,
        INDEX_FILE: DEEP,
        "model.safetensors": struct.pack("<Q", len(DEEP)) + DEEP,
    }.items():
        kept = {path: path.read_bytes() for path in folder.iterdir()}
        if name == INDEX_FILE:
            (folder / "model.safetensors").unlink()
        if name == "generation_config.json":
            words(folder)
        (folder / name).write_bytes(content)
        assert "recursion" in refused(tmp_path, capsys)
        (folder / name).unlink()
        for path, before in kept.items():
            path.write_bytes(before)


# ---------------------------------------------------------------------------- what a user would miss


def words(folder, **config):
    """Replaces the folder's tokenizer with a tokenizer.json of three words and three special tokens."""
    (folder / "bytes.json").unlink(missing_ok=True)
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    library.add_special_tokens(["<|end_of_text|>", "<|eom|>", "<|eot|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_the_ends_of_a_turn_survive(tmp_path, folder, place):
    """As Llama 3 Instruct has them: a list, of which tokenizer_config.json names one. They end a generation here, and
    stand in what is exported again; likewise the chat template."""
    words(folder, eos_token="<|eot|>", chat_template="{{ messages }}!")
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    if place == "generation_config.json":
        (folder / place).write_text(json.dumps({"eos_token_id": [3, 4, 5], "temperature": 0.6}))
    else:
        (folder / place).write_text(json.dumps(content | {"eos_token_id": [3, 4, 5]}))
    import_folder(folder, tmp_path / "run")
    saved = open_model(tmp_path / "run")
    assert saved.tokenizer.eos_id == 5 and set(saved.tokenizer.stop_ids) == {3, 4, 5}
    export_hf(saved, tmp_path / "back")
    assert set(json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]) == {3, 4, 5}
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}!"
    assert read_tokenizer(tmp_path / "back").digest == saved.tokenizer.digest


def test_the_end_may_be_named_by_its_id_alone(folder):
    words(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 4}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    tokenizer = read_tokenizer(folder)
    assert tokenizer.eos_id == 4 and tokenizer.stop_ids == (4,)
    assert json.loads(tokenizer.files()["tokenizer_config.json"])["chat_template"] == "{{ x }}"


def test_what_is_left_behind_is_said(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 4, "temperature": 0.6, "top_p": 0.9}')
    (folder / "modeling_other.py").write_text("")
    assert [line.partition(" (")[0] for line in left_behind(folder)] == [
        "generation_config.json's temperature=0.6, top_p=0.9", "code",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["[1]", '{"eos_token": [1]}', '{"chat_template": 5}', '"x"', "{"])
def test_tokenizer_settings_of_the_wrong_kind(tmp_path, folder, capsys, content):
    words(folder)
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    (folder / "tokenizer_config.json").write_text(content)
    if content != '{"eos_token": [1]}':
        assert "tokenizer_config.json" in refused(tmp_path, capsys)
    else:
        assert read_tokenizer(folder).eos_id == 3  # no name: the usual ones


# ---------------------------------------------------------------------------- any alteration

JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1.5,
        2**31,
        10**400,
        1e308,
        "",
        "x",
        "2",
        [],
        [1],
        ["x"],
        {},
        {"a": 1},
        [[[[]]]],
        "\ud800",
        "../x",
    ]
)


def mutate(value, data):
    """The JSON value with one place replaced, removed or doubled."""
    value = copy.deepcopy(value)
    place, parent, key = value, None, None
    while isinstance(place, dict | list) and place and (parent is None or data.draw(st.booleans())):
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        parent, key = place, data.draw(st.sampled_from(keys))
        place = parent[key]
    if parent is None or data.draw(st.integers(0, 4)) == 0:
        return data.draw(JUNK)
    if data.draw(st.integers(0, 3)) == 0:
        del parent[key]
    else:
        parent[key] = data.draw(JUNK)
    return value


def fuzz(good, tmp_path_factory, count):
    """Each reader over mutations of what real folders hold: it works, or ends in ConfigError, in bounded time."""
    folder = shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "from")
    words(folder, eos_token="<|eot|>", chat_template="x")
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 3.0}
    config |= {"rope_scaling": yarn, "layer_types": ["full_attention"] * 2, "sliding_window": None}
    weights = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header, body = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(list(header)[1:], "x.safetensors")}
    generation = {"eos_token_id": [3, 4], "temperature": 0.6}
    settings_file = json.loads((folder / "tokenizer_config.json").read_text())
    before = sorted(folder.parent.rglob("*"))

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data):
        what = data.draw(st.sampled_from(["config", "index", "header", "tokenizer", "generation", "bytes"]))
        begin = time.process_time()
        try:
            if what == "config":
                content = json.dumps(mutate(mutate(config, data), data)).encode()
                (folder / "config.json").write_bytes(content)
                from_hf(read_object(folder / "config.json"), folder / "config.json")
            elif what in ("tokenizer", "generation"):
                content = {"tokenizer": settings_file, "generation": generation}
                content[what] = mutate(content[what], data)
                (folder / "config.json").write_text(json.dumps(config))
                (folder / "tokenizer_config.json").write_text(json.dumps(content["tokenizer"]))
                (folder / "generation_config.json").write_text(json.dumps(content["generation"]))
                read_tokenizer(folder)
                left_behind(folder)
            elif what == "index":
                (folder / "model.safetensors").unlink(missing_ok=True)
                (folder / INDEX_FILE).write_text(json.dumps(mutate(index, data)))
                read_folder(folder)
            else:
                text = json.dumps(mutate(header, data) if what == "header" else header).encode()
                content = bytearray(struct.pack("<Q", len(text)) + text + body)
                if what == "bytes":
                    for _ in range(3):
                        content[data.draw(st.integers(0, 8 + len(text)))] = data.draw(st.integers(0, 255))
                (folder / "model.safetensors").write_bytes(content)
                read_folder(folder)
        except ConfigError as error:
            assert len(str(error)) < 10_000
        assert time.process_time() - begin < 5

    one()
    (folder / INDEX_FILE).unlink(missing_ok=True)
    (folder / "model.safetensors").touch()
    (folder / "generation_config.json").touch()
    assert sorted(folder.parent.rglob("*")) == before


def test_alterations(good, tmp_path_factory):
    fuzz(good, tmp_path_factory, 300)


@pytest.mark.slow
def test_many_alterations(good, tmp_path_factory):
    fuzz(good, tmp_path_factory, 12_000)  # 2,000 for each of six readers
