"""Training the exported PyTorch model: losses and gradients are those of JAX, and the usual tools work on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_folder
from flax import nnx
from torch_folder import model_config

from gqe_jax.attention import GQAConfig, GQEConfig, RouterConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, S = 2, 13
LENGTHS = np.array([S, 8])
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 101, (B, S)).astype(np.int32)
REAL = np.arange(S) < LENGTHS[:, None]
CONFIG = model_config(
    GQEConfig(
        num_query_experts=8,
        num_kv_heads=2,
        top_k=2,
        head_dim=8,
        bias=True,
        qk_norm=True,
        router=RouterConfig(load_balance_weight=0.5, z_loss_weight=0.1, bias_update_rate=0.1),
    ),
    tie_embeddings=False,
)
SMALL = {"num_kv_heads": 2, "head_dim": 8, "implementation": "reference"}  # compiled in half the time


def inputs():
    """The rows with padding behind them; labels where the next token is real."""
    ids = torch.tensor(np.where(REAL, TOKENS, 0), dtype=torch.long)
    mask = torch.tensor(REAL, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def jax_loss_and_grads(config):
    """(LM loss, auxiliary loss), and the gradient of their sum under PyTorch's names, as in training here."""
    model = torch_folder.make_model(config)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    targets, mask = np.roll(TOKENS, -1, axis=1), np.roll(REAL, -1, axis=1) & (np.arange(S) < S - 1)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        x, report = model(TOKENS, segment_ids=REAL.astype(np.int32))
        lm = jnp.sum(model.losses(x, targets, 64) * mask) / mask.sum()
        aux = report.auxiliary_loss.sum()
        return lm + aux, (lm, aux)

    (_, losses), grads = tiny.jit(jax.value_and_grad(loss, has_aux=True))(params)
    nnx.update(model, grads)
    return losses, torch_folder.torch_state(model)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        model_config(GQEConfig(num_query_experts=4, window=5, **SMALL)),
        model_config(GQEConfig(num_query_experts=4, softcap=2.0, **SMALL)),
        model_config(GQEConfig(num_query_experts=4, variant="hard_concat", **SMALL)),
        model_config(GQEConfig(num_query_experts=4, variant="weighted_concat", **SMALL)),
        model_config(GQEConfig(num_query_experts=2, **SMALL)),
        model_config(GQEConfig(num_query_experts=4, router=RouterConfig(kind="fixed"), **SMALL)),
        model_config(GQAConfig(num_query_heads=4, **SMALL)),
    ],
    ids=["everything", "gqe, window", "softcap", "hard_concat", "weighted_concat", "M=1", "fixed", "dense"],
)
def test_loss_and_gradients(config):
    """Of LM plus auxiliary loss with respect to every parameter: 1e-4 of the parameter's gradient norm (of the whole
    model's where a gradient is zero but for rounding, as that of k_proj.bias is)."""
    (lm, aux), want = jax_loss_and_grads(config)
    model = torch_folder.load(config).train()
    out = model(**inputs())
    np.testing.assert_allclose(out.loss.item(), lm + aux, rtol=1e-5)
    if isinstance(config.attention, GQEConfig):
        np.testing.assert_allclose(out.aux_loss.item(), aux, rtol=1e-5)
    with torch.no_grad():  # outside training the loss is the LM's, whose exponential is the perplexity
        np.testing.assert_allclose(model.eval()(**inputs()).loss.item(), lm, rtol=1e-5)

    out.loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    learned = isinstance(config.attention, GQEConfig) and config.attention.router.kind == "learned"
    frozen = {name for name in want if name.endswith("bias_correction") or ("router" in name and not learned)}
    assert grads.keys() == want.keys() - frozen
    whole = np.sqrt(sum(np.square(want[name]).sum() for name in grads))
    errors = {
        name: np.linalg.norm(grad - want[name]) / max(np.linalg.norm(want[name]), 1e-3 * whole)
        for name, grad in grads.items()
    }
    assert max(errors.values()) <= 1e-4, {name: error for name, error in errors.items() if error > 1e-4}
    print(f"largest relative error {max(errors.values()):.1e}")


@pytest.fixture
def model():
    return torch_folder.load(CONFIG).train()


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    """Recomputing each layer in the backward pass changes no gradient, that of the auxiliary loss neither."""
    want = gradients(model, **inputs())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients(model, **inputs()).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-7)


def test_microbatches_add_up(model):
    """With `num_items_in_batch` (Trainer's gradient accumulation) the losses of the parts sum to LM loss per token of
    the whole batch, plus the auxiliary losses weighted by their parts' tokens: not once per part."""
    rows = inputs()
    parts = [{name: value[row : row + 1] for name, value in rows.items()} for row in range(B)]
    tokens = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    whole, aux = sum(tokens), 0.0
    for part, count in zip(parts, tokens, strict=True):
        aux += model(**part).aux_loss * count / whole
    total = sum(model(**part, num_items_in_batch=whole).loss for part in parts)
    torch.testing.assert_close(total, model.eval()(**rows).loss + aux)


def test_auxiliary_loss_is_of_real_tokens(model):
    """What stands in the padding does not change it."""
    rows = inputs()
    other = rows | {"input_ids": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, 7)}
    torch.testing.assert_close(model(**other).aux_loss, model(**rows).aux_loss)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_may_stand_before_or_behind(implementation):
    """Padding before the tokens sees nothing at all: its rows of scores are empty, and no NaN may come of them. Every
    gradient is that of the same rows with padding behind."""
    model = torch_folder.load(CONFIG, attn_implementation=implementation).train()
    rows = inputs()
    rows["labels"][:, 0] = -100  # which padding before it would otherwise predict
    want = gradients(model, **rows)

    def behind_padding(value):
        return torch.stack([row.roll(int(S - n)) for row, n in zip(value, LENGTHS, strict=True)])

    for name, gradient in gradients(model, **{name: behind_padding(value) for name, value in rows.items()}).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-5)


def test_uniform_routing_has_a_load_balance_loss_of_k():
    """M Σ_m f P with P = 1/M everywhere is Σ_m f = k per layer, whatever was selected: a random router's."""
    router = RouterConfig(kind="random", load_balance_weight=1.0)
    config = model_config(GQEConfig(num_query_experts=8, num_kv_heads=2, top_k=2, head_dim=8, router=router))
    aux = torch_folder.load(config).train()(**inputs()).aux_loss
    torch.testing.assert_close(aux, torch.tensor(2.0 * config.num_layers))


def test_router_outputs(model):
    """`output_router_logits` returns logits and choices per layer, agreeing with each other; else neither."""
    model.eval()
    out = model(**inputs(), output_router_logits=True)
    assert len(out.router_logits) == len(out.expert_index) == 2
    assert out.router_logits[0].shape == (B, S, 2, 4) and out.router_logits[0].dtype == torch.float32
    assert out.expert_index[0].shape == (B, S, 2, 2)
    chosen = out.router_logits[1].gather(-1, out.expert_index[1])
    assert (chosen[..., 0] >= chosen[..., 1]).all()
    quiet = model(**inputs())
    assert quiet.router_logits is None and quiet.expert_index is None and quiet.aux_loss is not None
    assert model(inputs()["input_ids"]).aux_loss is None


def test_autocast_leaves_the_router_in_float32(model):
    """Mixed precision, as Trainer's bf16=True has it, must not round what the experts are chosen by."""
    want = model(**inputs(), output_router_logits=True).router_logits[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**inputs(), output_router_logits=True).router_logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_hidden_states(model):
    """The embeddings, then each layer's result, the last of them behind the final norm."""
    model.eval()
    states = model(**inputs(), output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[0], model.get_input_embeddings()(inputs()["input_ids"]))
    torch.testing.assert_close(model.lm_head(states[-1]), model(**inputs()).logits)


def test_lora(model):
    """PEFT finds the projections by their names; one step moves the adapters and nothing else; merged, the model
    computes what it computed with them."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "q_shared", "router"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    adapted = {name.split(".")[-4] for name, p in lora.named_parameters() if p.requires_grad}
    assert adapted == set(targets)
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    first = lora(**inputs()).loss
    first.backward()
    optimizer.step()
    assert lora(**inputs()).loss < first
    with torch.no_grad():
        want = lora.eval()(**inputs()).logits
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(**inputs()).logits, want, rtol=1e-4, atol=1e-4)
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in moved} == set(targets)


def test_the_router_may_be_trained_in_full_beside_lora(model):
    """`modules_to_save` puts a copy in its place, with the selection's bias."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"], task_type="CAUSAL_LM")
    want = model(**inputs()).logits
    lora = peft.get_peft_model(model, config)
    out = lora(**inputs())
    torch.testing.assert_close(out.logits, want)
    out.loss.backward()
    trained = {name for name, p in lora.named_parameters() if p.grad is not None and "router" in name}
    assert len(trained) == CONFIG.num_layers and all("modules_to_save" in name for name in trained)


def test_trainer(tmp_path):
    """transformers' Trainer, with accumulation and checkpointing, lowers the loss on rows that repeat; it evaluates to
    the LM loss, and its predictions are the logits alone."""
    model = torch_folder.load(CONFIG)
    rows = [{name: value[0] for name, value in inputs().items()} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    evaluated = dict(rows[0], labels=rows[0]["labels"].clone())
    evaluated["labels"][0] = -100  # nothing predicts it, though transformers 4 counts it
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=[evaluated])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    with torch.no_grad():
        want = model.eval()(**{name: value[None] for name, value in evaluated.items()})
    np.testing.assert_allclose(trainer.evaluate()["eval_loss"], want.loss.item(), rtol=1e-5)
    predictions = trainer.predict([evaluated]).predictions
    np.testing.assert_allclose(predictions, want.logits.numpy(), atol=1e-5)
