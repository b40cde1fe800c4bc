"""`gqe eval --tasks`: data files found by name, lm-eval's JSON and table, what is said of input that cannot be used."""

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from converted import write_run
from tiny_run import quick_compiles

from gqe_jax.cli import main as cli
from gqe_jax.config import ConfigError
from gqe_jax.evaluate import tasks
from gqe_jax.pytorch.exporting import export_hf
from gqe_jax.runs.load import load_model
from gqe_jax.runs.saved_model import open_model

pytest.importorskip("lm_eval")
import lm_eval.tasks

WORDS = "put the oven pan into a hot or cold box and wait until it is done".split()
PAIR = {
    "group": "pair",
    "task": ["piqa", "arc_easy"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


def piqa_items(count, seed=0):
    """Items with the fields of PIQA; some are longer than the model's context."""
    rng = random.Random(seed)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [
        {"goal": words(20), "sol1": words(12), "sol2": words(12), "label": rng.randint(0, 1)} for _ in range(count)
    ]


def arc_items(count):
    return [
        {"question": f"What is {i}?", "choices": {"text": [str(i), "no"], "label": ["A", "B"]}, "answerKey": "A"}
        for i in range(count)
    ]


def write_jsonl(path, items):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture(scope="module", autouse=True)
def few_tasks(tmp_path_factory):
    """lm-eval's own manager, but of a few of its folders: to look through all takes seconds each time; no network."""
    whole = lm_eval.tasks.TaskManager
    own = tmp_path_factory.mktemp("own")
    (own / "pair.yaml").write_text(json.dumps(PAIR))
    shipped = Path(lm_eval.tasks.__file__).parent
    few = [own, *(shipped / name for name in ("piqa", "arc", "wikitext", "humaneval"))]

    def manager(include_path=None, include_defaults=True):
        return whole(include_path=few if include_defaults else include_path, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", manager)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run: random weights, a context of 160; data: twenty items like PIQA's, five like ARC's, a text."""
    directory = tmp_path_factory.mktemp("place")
    write_jsonl(directory / "data" / "piqa_val.jsonl", piqa_items(20))
    write_jsonl(directory / "data" / "arc_easy" / "test.json", arc_items(5))
    write_jsonl(directory / "data" / "wikitext-test.jsonl", [{"page": " ".join(WORDS * 6)}])
    with quick_compiles(directory / "compiled"):
        write_run(directory / "run", context=160)
        yield directory


@pytest.fixture
def gqe(capsys, place):
    """gqe("eval ...") → (exit code, standard output, standard error), in this process; {place} is replaced."""

    def call(line):
        code = cli.main(shlex.split(line.replace("{place}", str(place))))
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def lm(place):
    from gqe_jax.evaluate.lm_eval_model import JaxLM

    return JaxLM(load_model(place / "run"), batch_size=4)


def test_results_in_the_run_and_as_a_table(gqe, place):
    """lm-eval's JSON, by default inside the run, and its table; a group beside its tasks."""
    code, out, err = gqe("eval --run {place}/run --tasks pair,wikitext --data-dir {place}/data --batch-size 4")
    assert code == 0, err
    (written,) = (place / "run" / "lm_eval").iterdir()
    results = json.loads(written.read_text())
    assert set(results["results"]) == {"pair", "piqa", "arc_easy", "wikitext"}
    assert {"configs", "versions", "n-shot", "higher_is_better", "n-samples", "lm_eval_version", "date"} <= set(results)
    assert results["n-samples"]["piqa"] == {"original": 20, "effective": 20}
    assert (results["config"]["step"], results["config"]["limit"]) == (0, None)
    piqa, arc = (results["results"][name]["acc,none"] for name in ("piqa", "arc_easy"))
    assert results["groups"]["pair"]["acc,none"] == pytest.approx((20 * piqa + 5 * arc) / 25)
    assert 4 < results["results"]["wikitext"]["bits_per_byte,none"] < 12  # random weights
    row = next(line for line in out.splitlines() if line.replace(" ", "").startswith("|-piqa|1|none|0|acc|"))
    assert float(row.split("|")[7]) == pytest.approx(piqa, abs=1e-4)
    assert "|Groups|" in out and str(written) in out


def test_scores_are_the_models(lm, place):
    """Each item's scores are the log-likelihoods of lm-eval's prompt and solution; the larger one is the answer."""
    results = tasks.score(lm, ["piqa"], data_dir=place / "data", limit=3)
    items = piqa_items(20)[:3]
    assert [sample["doc"] for sample in results["samples"]["piqa"]] == items
    for item, sample in zip(items, results["samples"]["piqa"], strict=True):
        pairs = [(f"Question: {item['goal']}\nAnswer:", " " + item[solution]) for solution in ("sol1", "sol2")]
        assert [tuple(arguments) for arguments in sample["arguments"]] == pairs
        scores = [score for score, _ in lm.loglikelihood(requests(pairs), disable_tqdm=True)]
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-4)
        assert sample["acc"] == (scores[item["label"]] == max(scores))


def requests(pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]


def test_solved_examples_come_first(lm, place, tmp_path):
    """From the training split where there is one; each prompt ends in the item itself."""
    write_jsonl(tmp_path / "piqa_validation.jsonl", piqa_items(4))
    write_jsonl(tmp_path / "piqa.training.json", piqa_items(3, seed=1))
    results = tasks.score(lm, ["piqa"], data_dir=tmp_path, num_fewshot=2)
    assert results["n-shot"]["piqa"] == 2
    solved = {f"Question: {i['goal']}\nAnswer: {i[('sol1', 'sol2')[i['label']]]}" for i in piqa_items(3, seed=1)}
    for item, sample in zip(piqa_items(4), results["samples"]["piqa"], strict=True):
        *before, last = sample["arguments"][0][0].split("\n\n")
        assert len(before) == 2 and set(before) <= solved and last == f"Question: {item['goal']}\nAnswer:"


@pytest.mark.parametrize("name", ["piqa_validation.jsonl", "piqa-val.json", "piqa.dev.jsonl", "piqa/valid.jsonl"])
def test_files_are_found_by_name(tmp_path, name):
    """Task, sign, split or another name of it, suffix; other tasks' files are not taken."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "global_piqa_validation.jsonl").touch()
    (tmp_path / "piqa_validation.txt").touch()
    assert tasks.local_splits("piqa", ["train", "validation"], tmp_path) == {"validation": tmp_path / name}


def test_a_splits_own_name_is_no_other_splits(tmp_path):
    """Where a task has both `validation` and `dev`, `dev` is not taken for `validation`."""
    (tmp_path / "mmlu_dev.jsonl").touch()
    found = tasks.local_splits("mmlu", ["validation", "test", "dev"], tmp_path)
    assert found == {"dev": tmp_path / "mmlu_dev.jsonl"}
    (tmp_path / "mmlu-dev.jsonl").touch()
    with pytest.raises(ConfigError, match=r"several files for split dev of task mmlu \(mmlu_dev\.jsonl, mmlu-"):
        tasks.local_splits("mmlu", ["dev"], tmp_path)


BAD = {
    "--tasks piqa --data-dir {place}/data --limit 0": "--limit=0 must be at least 1",
    "--tasks piqa --data-dir {place}/data --num-fewshot -1": "--num-fewshot=-1 must be at least 0",
    "--tasks piqa --data-dir {place}/data --num-fewshot 2": "data' has no file for split train of task piqa, "
    "from which the 2 solved examples before each item come: add piqa_train.jsonl, or leave them out with "
    "--num-fewshot 0",
    "--limit 3 --num-fewshot 2": "--limit, --num-fewshot only say how to score tasks",
    "--tasks piqa --data-dir {place}/none": "none' is no folder: name one that holds the tasks' JSON files",
    "--tasks pika --data-dir {place}/data": "no task, group or tag 'pika' (did you mean 'piqa'?)",
    "--tasks arc --data-dir {place}/data": "no task, group or tag 'arc' (there is arc_challenge, arc_challenge_chat, ",
    "--tasks pair,piqa --data-dir {place}/data": "piqa is named twice, the second time by piqa: leave",
    "--tasks , --data-dir {place}/data": "--tasks=',' names no task",
    "--tasks arc_challenge --data-dir {place}/data": "has no file for task arc_challenge: looked for "
    "arc_challenge_validation.jsonl or arc_challenge_test.jsonl (also with '-' or '.' for '_', as "
    "arc_challenge/validation.jsonl, ending in .json, and with valid, val or dev for validation); there is "
    "arc_easy, piqa_val.jsonl, wikitext-test.jsonl",
    "--tasks piqa": "the data of piqa could not be read from the Hub (",
    "--tasks piqa --data-dir {place}/bad": "with the fields that lm-eval's task reads; piqa_val.jsonl has the fields "
    "goal, label",
    "--tasks arc_easy --data-dir {place}/bad": "arc_easy_test.jsonl does not begin with a JSON object on a line",
    "--tasks humaneval --data-dir {place}/bad": "humaneval runs code that the model writes, which gqe eval does not",
    "--limit 3": "--limit only says how to score tasks: add --tasks",
    "--tasks piqa --data x": "--data is text to measure the loss on, and not for --tasks",
    "--tasks piqa --out {place}": "is a folder: name the file to write",
    "--tasks piqa --batch-size 0": "--batch-size=0 is no positive multiple",
}


@pytest.mark.parametrize("options", BAD)
def test_what_cannot_be_scored(gqe, place, options):
    """One paragraph that names option, value and remedy; exit code 2, and nothing written."""
    write_jsonl(place / "bad" / "piqa_val.jsonl", [{"goal": "x", "label": 0}])
    (place / "bad" / "arc_easy_test.jsonl").write_text("no JSON\n")
    write_jsonl(place / "bad" / "humaneval_test.jsonl", [{"prompt": "def f():", "test": "f()", "entry_point": "f"}])
    before = set(place.rglob("results*"))
    code, out, err = gqe(f"eval --run {{place}}/run {options}")
    assert BAD[options] in err, err
    assert (code, out) == (2, "") and "Traceback" not in err and set(place.rglob("results*")) == before


def test_lm_eval_is_an_extra(gqe, monkeypatch):
    """Without it the message names the extra."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = gqe("eval --run {place}/run --tasks piqa")
    assert code == 2 and "pip install 'gqe_jax[eval]'" in err


@pytest.mark.slow
def test_no_torch_is_needed(place, tmp_path):
    """The command as users call it, with all of lm-eval's tasks known, imports neither torch nor transformers."""
    script = (
        "import sys; from gqe_jax.cli import main as cli; "
        f"code = cli.main(['eval', '--run', {str(place / 'run')!r}, '--tasks', 'ai2_arc', '--limit', '2', "
        f"'--data-dir', {str(tmp_path)!r}, '--out', {str(tmp_path / 'deep' / 'out.json')!r}]); "
        "assert not {'torch', 'transformers'} & sys.modules.keys(); sys.exit(code)"
    )
    write_jsonl(tmp_path / "arc_easy_validation.jsonl", arc_items(3))
    write_jsonl(tmp_path / "arc_challenge_test.jsonl", arc_items(3))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert results["n-samples"]["arc_easy"] == {"original": 3, "effective": 2}
    assert set(results["results"]) == {"arc_easy", "arc_challenge"} and "the first 2 items of each task" in done.stdout


def test_exported_model_in_pytorch_gives_the_same(lm, place, tmp_path):
    """The same files through lm-eval's own backend: equal accuracies, scores of each of 20 items within 1e-3."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    export_hf(open_model(place / "run"), tmp_path / "out")
    theirs = HFLM(
        pretrained=str(tmp_path / "out"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4
    )
    ours, other = (tasks.score(model, ["piqa"], data_dir=place / "data") for model in (lm, theirs))
    assert ours["results"] == other["results"]
    assert len(ours["samples"]["piqa"]) == 20
    for a, b in zip(ours["samples"]["piqa"], other["samples"]["piqa"], strict=True):
        assert a["doc"] == b["doc"] and a["arguments"] == b["arguments"]
        for (score, is_greedy), (same, same_greedy) in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            assert abs(score - same) < 1e-3 and is_greedy == same_greedy
