from __future__ import annotations

import contextlib
import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyro_ebm import VAE, Checkpoint, CheckpointError, MLPEnergy, TrainingWarning, fit
from pyro_ebm.training.data import batches
from pyro_ebm.training.objective import Objective

SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Line(nn.Module):
    """y = w x + b with noise of scale one, as a model without latent sites: its loss is exact."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.dropout = nn.Dropout(dropout)

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.linear(self.dropout(x)).squeeze(-1), 1.0), obs=y)

    def guide(self, x, y):
        pass


def line_data(num=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, 1, generator=generator)
    return x, 2 * x.squeeze(-1) - 1 + 0.1 * torch.randn(num, generator=generator)


def line(**options):
    torch.manual_seed(5)
    return Line(**options)


def run(module, data=None, **options):
    settings = {"epochs": 4, "batch_size": 16, "seed": 0, "progress": False, "optimizer": SGD}
    return fit(module.model, module.guide, line_data() if data is None else data, **{**settings, **options})


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_at_call(number, error=KeyboardInterrupt):
    """An objective that goes wrong at its n-th call."""
    calls = []

    def objective(model, guide, *batch):
        calls.extend([1] if torch.is_grad_enabled() else [])
        if len(calls) == number:
            raise error
        return Trace_ELBO().differentiable_loss(model, guide, *batch)

    return objective


@contextlib.contextmanager
def interrupted_at_step(monkeypatch, number):
    """Ctrl-C in the middle of a step, the objective being the same."""
    gradients, calls = Objective.gradients, []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return gradients(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "gradients", stopping)
        yield


def test_full_batch_gradient_steps_by_hand():
    x, y = line_data()
    module, by_hand = line(), line().linear
    result = run(module, batch_size=1000, validation=None, epochs=3, patience=None)
    losses = []
    for _ in range(3):
        loss = ((y - by_hand(x).squeeze(-1)) ** 2).mean() / 2 + math.log(2 * math.pi) / 2
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradients, strict=True):
                p -= 0.1 * g
    torch.testing.assert_close(module.linear.state_dict(), by_hand.state_dict())
    assert result.train_loss == pytest.approx(losses, rel=1e-5)
    assert (result.stopped, result.epochs, result.best_epoch) == ("epochs", 3, 3)


def test_a_regression_finds_its_line():
    module = line()
    result = run(module, epochs=40)
    assert module.linear.weight.item() == pytest.approx(2, abs=0.1)
    assert module.linear.bias.item() == pytest.approx(-1, abs=0.1)
    assert len(result.train_loss) == len(result.validation_loss) == result.epochs
    assert result.seconds > 0
    assert result.validation_loss[result.best_epoch - 1] == min(result.validation_loss)


def test_batches_cover_the_data_once():
    x, y = torch.arange(10.0), torch.arange(10)
    cut = list(batches((x, y), 4, torch.device("cpu"), torch.randperm(10)))
    assert [len(a) for a, _ in cut] == [4, 4, 2]
    assert all(torch.equal(a, b.float()) for a, b in cut)
    assert sorted(torch.cat([b for _, b in cut]).tolist()) == list(range(10))


def test_the_validation_loss_is_that_of_the_kept_weights():
    module, (x, y) = line(dropout=0.5), line_data(20)
    result = run(module, validation=(x, y), epochs=5)
    loss = Trace_ELBO().loss(module.model, module.guide, x, y) / 20
    assert not module.training
    assert loss == pytest.approx(result.validation_loss[result.kept_epoch - 1], rel=1e-5)


def test_validation_noise_is_the_same_at_each_epoch():
    vae = VAE((4,), 2, hidden=(5,))
    still = functools.partial(torch.optim.SGD, lr=0.0)
    result = run(vae, torch.rand(40, 4), optimizer=still, epochs=3)
    assert len(set(result.validation_loss)) == 1
    assert len(set(result.train_loss)) == 3


def test_early_stopping_restores_the_best_weights():
    module = line()
    # Diverges: the first epoch's weights stay the best.
    result = run(module, optimizer=functools.partial(torch.optim.SGD, lr=2.5), epochs=50, patience=3)
    assert result.stopped == "early stopping"
    assert result.epochs == result.best_epoch + 3
    first = line()
    run(first, optimizer=functools.partial(torch.optim.SGD, lr=2.5), epochs=result.best_epoch)
    assert same(weights(module), weights(first))


def test_without_validation_the_train_loss_decides():
    result = run(line(), validation=0, epochs=3)
    assert result.validation_loss == []
    assert result.train_loss[result.best_epoch - 1] == min(result.train_loss)


def test_a_vae_learns_and_the_seed_decides_everything():
    torch.manual_seed(1)
    x = (torch.rand(128, 4) < torch.tensor([0.1, 0.9, 0.1, 0.9])).float()
    first = VAE((4,), 2, hidden=(8,))
    others = [copy.deepcopy(first) for _ in range(2)]
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    result = run(first, x, optimizer=adam, epochs=8)
    assert result.train_loss[-1] < 0.9 * result.train_loss[0]
    run(others[0], x, optimizer=adam, epochs=8)
    run(others[1], x, optimizer=adam, epochs=8, seed=1)
    assert same(weights(first), weights(others[0]))
    assert not same(weights(first), weights(others[1]))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    run(VAE((4,), 2, hidden=(5,)).double(), torch.rand(20, 4).double())
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    VAE((4,), 2, hidden=(5,)), torch.rand(20, 4)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(7)
    drawn = int(torch.randint(2**62, ()))
    after_one_draw = torch.get_rng_state()
    torch.manual_seed(7)
    assert run(line_without_draw(), seed=None).seed == drawn
    assert torch.equal(torch.get_rng_state(), after_one_draw)


def line_without_draw():
    with torch.random.fork_rng():
        return line()


def test_what_is_not_trained_stays_bit_identical():
    from pyro_ebm import tilt

    class Normed(VAE):
        def __init__(self):
            super().__init__((4,), 2, hidden=(5,))
            self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    vae, energy = Normed(), MLPEnergy(2, hidden=(4,))
    vae.decoder[0].bias.requires_grad_(False)
    tilted = tilt(vae.model, {"z": energy})
    before, before_energy, flags = weights(vae), weights(energy), [p.requires_grad for p in vae.parameters()]
    seen = set()

    def objective(model, guide, x):
        seen.add((vae.training, vae.decoder[1].training, energy.training))
        return Trace_ELBO().differentiable_loss(model, guide, x)

    options = {"epochs": 2, "batch_size": 16, "seed": 0, "progress": False, "objective": objective}
    result = fit(tilted, vae.guide, torch.rand(40, 4), train=energy, **options)
    assert result.epochs == 2
    assert seen == {(False, False, True), (False, False, False)}
    assert same(before, weights(vae))
    assert not same(before_energy, weights(energy))
    assert vae.training and vae.decoder[1].training and not energy.training
    assert [p.requires_grad for p in vae.parameters()] == flags
    assert all(p.grad is None for p in [*vae.parameters(), *energy.parameters()])
    # A base model its owner froze stays frozen inside a tilted model that learns.
    vae.requires_grad_(False)
    fit(tilted, vae.guide, torch.rand(40, 4), **options)
    assert same(before, weights(vae))
    # train=None means all of it.
    vae.requires_grad_(True)
    fit(tilted, vae.guide, torch.rand(40, 4), **options)
    assert not same(before, weights(vae))


def test_part_of_a_module_can_learn():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

        def forward(self, x):
            loc = self.layers(x)
            return loc, torch.ones_like(loc)

    vae = VAE((4,), 2, hidden=(5,), encoder=Encoder())
    encoder, decoder = weights(vae.encoder), weights(vae.decoder)
    run(vae, torch.rand(40, 4), train=[vae.decoder])
    # The running mean of the batch norm too.
    assert same(encoder, weights(vae.encoder))
    assert not same(decoder, weights(vae.decoder))


def test_modules_hidden_in_a_function_get_no_gradients():
    vae = VAE((4,), 2, hidden=(5,))
    options = {"epochs": 1, "seed": 0, "progress": False}
    encoder, grads = weights(vae.encoder), []

    def hidden(x):
        grads.extend(p.grad for p in vae.encoder.parameters())
        return vae.model(x)

    fit(hidden, lambda x: vae.guide(x), torch.rand(40, 4), train=vae.decoder, batch_size=8, **options)
    grads.extend(p.grad for p in vae.encoder.parameters())
    assert grads and all(g is None for g in grads)
    assert same(encoder, weights(vae.encoder))


@pytest.mark.parametrize("number", [3, 7])
def test_an_interruption_keeps_the_best_so_far(number):
    module, reference = line(), line()
    # Four steps an epoch: call 7 lies in the second one.
    with pytest.warns(TrainingWarning, match=r"interrupted in epoch \d; kept the .*weights"):
        result = run(module, objective=stop_at_call(number))
    assert result.stopped == "interrupted"
    assert result.epochs == result.best_epoch == (0 if number == 3 else 1)
    if result.epochs:
        run(reference, epochs=1)
    assert same(weights(module), weights(reference))
    assert not module.training


@pytest.mark.parametrize("where", ["loss", "norm of the gradient", "validation loss", "norm of the weights"])
def test_what_is_not_finite_never_reaches_the_weights(where):
    module, reference, bad = line(), line(), []

    def objective(model, guide, x, y):
        loss = Trace_ELBO().differentiable_loss(model, guide, x, y)
        bad.extend([1] if module.training else [])
        if len(bad) < 4 + 1 or (where == "validation loss") == module.training:
            return loss
        if where in ("loss", "validation loss"):
            return loss * math.nan if len(bad) > 4 else loss
        # sqrt has an infinite slope at zero
        return loss + (module.linear.weight * 0).sqrt().sum() if where == "norm of the gradient" else loss

    optimizer = SGD
    if where == "norm of the weights":

        class Breaking(torch.optim.SGD):
            def step(self, closure=None):
                super().step()
                if len(bad) == 8:
                    module.linear.weight.data.fill_(math.inf)

        optimizer = functools.partial(Breaking, lr=0.1)
    with pytest.warns(TrainingWarning, match=f"the {where} became (nan|inf) in epoch 2 .*lower the learning"):
        result = run(module, objective=objective, optimizer=optimizer)
    assert (result.stopped, result.epochs) == ("non-finite loss", 1)
    run(reference, epochs=1)
    assert same(weights(module), weights(reference))


def test_clipped_gradients_have_the_norm_asked_for():
    module = line()
    before = weights(module)
    run(module, clip_grad_norm=1e-3, batch_size=1000, epochs=1)
    moved = [weights(module)[name] - before[name] for name in ("linear.weight", "linear.bias")]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_an_error_in_the_model_leaves_modules_as_they_were():
    module = line()
    before = weights(module)
    with pytest.raises(RuntimeError, match="mine"):
        run(module, objective=stop_at_call(2, RuntimeError("mine")))
    assert same(before, weights(module))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("objective", [RenyiELBO(alpha=0, num_particles=1), TraceGraph_ELBO()])
def test_objectives_that_do_their_own_backward_pass(objective):
    first = VAE((4,), 2, hidden=(5,))
    second, x = copy.deepcopy(first), torch.rand(40, 4)
    results = run(first, x, objective=objective), run(second, x)
    # With one particle both are the plain ELBO.
    torch.testing.assert_close(weights(first), weights(second))
    assert results[0].validation_loss == pytest.approx(results[1].validation_loss, rel=1e-5)


@pytest.mark.uses_param_store
def test_an_autoguide_makes_its_parameters_at_the_first_call():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(model)
    x = torch.randn(64) + 3
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    options = {"epochs": 150, "batch_size": 64, "validation": None, "patience": None}
    result = fit(model, guide, x, optimizer=adam, seed=0, progress=False, **options)
    assert result.train_loss[-1] < result.train_loss[0]
    assert guide.median()["loc"].item() == pytest.approx(x.mean().item(), abs=0.3)


# ---------------------------------------------------------------------------- checkpoints and resuming


@pytest.mark.parametrize(
    "optimizer", [SGD, torch.optim.Adam, functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)]
)
def test_a_resumed_run_is_the_same_run(tmp_path, optimizer):
    path = tmp_path / "sub" / "run.pt"
    whole, parts, fresh = (line(dropout=0.3) for _ in range(3))
    options = {"optimizer": optimizer, "patience": None}
    expected = run(whole, epochs=7, **options)
    run(parts, epochs=3, checkpoint=path, **options)
    # In another process the module would be a new one.
    result = run(fresh, epochs=7, checkpoint=Checkpoint(path, resume=True), **options)
    assert same(weights(fresh), weights(whole))
    assert result.train_loss == expected.train_loss
    assert result.validation_loss == expected.validation_loss
    assert result.best_epoch == expected.best_epoch


@pytest.mark.parametrize("number", [2, 10])
def test_a_run_resumed_after_an_interruption_is_the_same_run(tmp_path, monkeypatch, number):
    x = torch.rand(64, 4)
    whole = VAE((4,), 2, hidden=(5,))
    parts, fresh = copy.deepcopy(whole), copy.deepcopy(whole)
    run(whole, x)
    path = tmp_path / "run.pt"
    said = rf"checkpoint=Checkpoint\('{path}', resume=True\) continues after epoch"
    with interrupted_at_step(monkeypatch, number), pytest.warns(TrainingWarning, match=said):
        run(parts, x, checkpoint=Checkpoint(path, every=1, resume="auto"))
    assert run(fresh, x, checkpoint=Checkpoint(path, resume="auto"), seed=None).seed == 0
    assert same(weights(fresh), weights(whole))
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_finished_run_resumes_to_itself(tmp_path):
    module = line()
    expected = run(module, checkpoint=tmp_path / "run.pt")
    before = weights(module)
    result = run(line(), checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert result.train_loss == expected.train_loss
    again = line()
    run(again, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert same(weights(again), before)


def test_the_checkpoint_is_written_every_k_epochs(tmp_path, monkeypatch):
    from pyro_ebm.training import run as training_run

    written = []
    monkeypatch.setattr(training_run, "write", lambda payload, path, kind: written.append(payload["epoch"]))
    run(line(), epochs=5, checkpoint=Checkpoint(tmp_path / "run.pt", every=2), patience=None)
    assert written == [2, 4, 5]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "its seed is 0, here it is 1; call fit with the arguments"),
        ({"batch_size": 8}, "its batch_size is 16, here it is 8"),
        ({"optimizer": torch.optim.Adam}, "its optimizer_class is 'SGD', here it is 'Adam'"),
        ({"data": tuple(t + 1 for t in line_data())}, "its data is"),
        ({"validation": 0.2}, "its data is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, match):
    run(line(), epochs=1, checkpoint=tmp_path / "run.pt")
    module = line()
    before = weights(module)
    with pytest.raises(CheckpointError, match=match):
        run(module, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True), **change)
    assert same(before, weights(module))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(VAE((4,), 2, hidden=(5,)), torch.rand(40, 4), epochs=1, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"holds the weights of \['VAE'\], not of \['Line'\]"):
        run(line(), checkpoint=Checkpoint(path, resume=True))
    with pytest.raises(
        CheckpointError, match=r"fit this VAE: .* is float32\[5, 4\] in the file and .*\[6, 4\]"
    ):
        run(VAE((4,), 2, hidden=(6,)), torch.rand(40, 4), checkpoint=Checkpoint(path, resume=True))


def test_a_checkpoint_with_parts_missing_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(line(), epochs=1, checkpoint=path)
    whole = torch.load(path, weights_only=True)
    for key in ("optimizer", "rng", "order", "best", "epoch", "seed", "weights"):
        torch.save({name: value for name, value in whole.items() if name != key}, path)
        module = line()
        before = weights(module)
        with pytest.raises(CheckpointError, match="run.pt"):
            run(module, checkpoint=Checkpoint(path, resume=True), seed=None if key == "seed" else 0)
        assert same(before, weights(module)), key


def at(payload, *keys):
    """The nest in which the last of the keys lies."""
    for key in keys[:-1]:
        payload = payload[key]
    return payload


NAN, INF = math.nan, math.inf
TAMPERED = {
    "epoch NaN": (("epoch",), NAN, "its epoch is nan"),
    "epoch negative": (("epoch",), -1, "its epoch is -1"),
    "epoch a fraction": (("epoch",), 1.5, "its epoch is 1.5"),
    "epoch true": (("epoch",), True, "its epoch is True"),
    "epoch too large": (("epoch",), 7, "its train_loss has not one number for each of 7 epochs"),
    "best epoch": (("best_epoch",), 9, "its best_epoch is 9"),
    "best loss": (("best_loss",), NAN, "its best_loss is nan"),
    "best loss text": (("best_loss",), "low", "its best_loss is 'low'"),
    "seconds": (("seconds",), -1.0, "its seconds are -1.0"),
    "seed": (("seed",), NAN, "it has no seed|its seed is"),
    "a loss": (("train_loss", 0), NAN, "its train_loss is not finite"),
    "losses": (("train_loss",), "none", "its train_loss has not one number"),
    "a weight": (("weights", 0, "linear.bias"), torch.tensor([NAN]), "'linear.bias' of its weights is not finite"),
    "a best weight": (("best", 0, "linear.bias"), torch.tensor([INF]), "'linear.bias' of its best is not finite"),
    "weights' shape": (("weights", 0, "linear.bias"), torch.zeros(2), "does not fit this Line"),
    "weights' dtype": (("best", 0, "linear.bias"), torch.zeros(1, dtype=torch.float64), "does not fit this Line"),
    "learning rate": (("optimizer", "param_groups", 0, "lr"), NAN, "'lr' of its optimizer is nan"),
    "moments' shape": (("optimizer", "state", 0, "exp_avg"), torch.zeros(3), "'exp_avg' of its optimizer is"),
    "moments' dtype": (("optimizer", "state", 0, "exp_avg_sq"), torch.zeros(3).double(), "'exp_avg_sq' of"),
    "a moment": (("optimizer", "state", 0, "exp_avg"), NAN, "'exp_avg' of its optimizer is not finite"),
    "a step": (("optimizer", "state", 0, "step"), torch.tensor(-1.0), "the step of its optimizer is -1.0"),
    "no state": (("optimizer", "state"), [], "its optimizer has no state"),
    "parameters": (("optimizer", "param_groups", 0, "params"), [0], "the parameters of its optimizer"),
    "random state": (("rng",), torch.zeros(3), "is damaged"),
    "order": (("order",), torch.zeros(3, dtype=torch.uint8), "is damaged"),
}


@pytest.mark.parametrize("keys, value, match", TAMPERED.values(), ids=TAMPERED)
def test_tampered_numbers_are_refused_before_any_is_used(tmp_path, keys, value, match):
    path = tmp_path / "run.pt"
    run(line(), epochs=2, checkpoint=path, optimizer=torch.optim.Adam)
    payload = torch.load(path, weights_only=True)
    place = at(payload, *keys)
    if isinstance(value, float) and isinstance(place[keys[-1]], torch.Tensor):
        value = torch.full_like(place[keys[-1]], value)
    place[keys[-1]] = value
    torch.save(payload, path)
    module = line()
    before = weights(module)
    with pytest.raises(CheckpointError, match=f"run.pt.*({match})"):
        seed = None if keys == ("seed",) else 0
        run(module, checkpoint=Checkpoint(path, resume=True), optimizer=torch.optim.Adam, seed=seed)
    assert same(before, weights(module))


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
        torch.optim.Rprop, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
        torch.optim.ASGD, lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.Adafactor(p),
    ],
)  # fmt: skip
def test_what_optimizers_keep_is_no_damage(tmp_path, optimizer):
    path = tmp_path / "run.pt"
    run(line(), epochs=1, checkpoint=path, optimizer=optimizer)
    found = run(line(), epochs=2, checkpoint=Checkpoint(path, resume=True), optimizer=optimizer)
    assert len(found.train_loss) == 2


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint file at .*absent.pt"):
        run(line(), checkpoint=Checkpoint(tmp_path / "absent.pt", resume=True))
    with pytest.raises(CheckpointError, match="cannot write .*it is a folder; choose a file"):
        run(line(), checkpoint=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write .*choose a file in a folder"):
        run(line(), checkpoint=tmp_path / "file" / "run.pt")
    with pytest.raises(TypeError, match=r"checkpoint must be a Checkpoint or text or a path or None, got True"):
        run(line(), checkpoint=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every": 0}, ValueError, "every must be a whole number of at least 1, got 0"),
        ({"resume": "always"}, ValueError, "resume must be True, False or \"auto\", got 'always'"),
        ({"path": None}, TypeError, "path must be text or a path, got None"),
    ],
)
def test_impossible_checkpoints(options, error, match):
    with pytest.raises(error, match=match):
        Checkpoint(**{"path": "run.pt"} | options)


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"data": [[1.0]]}, TypeError, "data must be a tensor, an array or a table, or a tuple of these, got list"),
        ({"data": ()}, TypeError, "data must be .*got an empty tuple"),
        ({"data": (torch.ones(3, 1), torch.ones(4))}, ValueError, "data must hold .* same first dimension"),
        ({"data": torch.ones(())}, ValueError, "data must hold tensors with the same first dimension"),
        (
            {"data": (torch.ones(3, 1), torch.full((3,), math.nan))},
            ValueError,
            r"data\[1\] must be finite",
        ),
        ({"data": torch.full((3, 1), math.inf)}, ValueError, "data must be finite, got 3 NaN or inf"),
        ({"validation": 1.0}, ValueError, r"validation must be a share of the data in \[0, 1\)"),
        ({"validation": True}, ValueError, r"validation must be a share"),
        ({"validation": "half"}, TypeError, "validation must be a tensor"),
        ({"validation": torch.ones(3, 2)}, ValueError, "validation must have the form of data"),
        ({"data": torch.ones(1, 1)}, ValueError, "validation=0.1 leaves none of 1 data to train on"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, got 0"),
        ({"epochs": 2.5}, ValueError, "epochs must be a whole number"),
        ({"patience": 0}, ValueError, "patience must be a whole number"),
        ({"clip_grad_norm": -1.0}, ValueError, "clip_grad_norm must be a finite number above zero"),
        ({"seed": -1}, ValueError, "seed must be None or a whole number"),
        ({"train": []}, TypeError, "train must be a torch.nn.Module, the name of a pyro.param, a sequence"),
        ({"train": 3}, TypeError, "train must be a torch.nn.Module, the name of a pyro.param, a sequence"),
        ({"train": "vae"}, ValueError, r"train names the pyro.param .vae., but model and guide have \[\]"),
        ({"train": nn.Dropout()}, ValueError, r"train\[0\] \(Dropout\) has no parameters that can learn"),
        ({"train": nn.Linear(1, 1)}, ValueError, "the loss does not depend on any parameter"),
        ({"objective": Trace_ELBO}, TypeError, r"objective must be .*got Trace_ELBO; pass an instance"),
        ({"objective": 3}, TypeError, "objective must be a Pyro ELBO or a function"),
        ({"objective": lambda *args: torch.ones(3)}, ValueError, r"must return one number.*got shape \(3,\)"),
        ({"objective": lambda *args: None}, ValueError, "must return one number.*got NoneType"),
        ({"objective": lambda *args: 3.0}, ValueError, "the loss does not depend on any parameter"),
        ({"optimizer": 0.1}, TypeError, "optimizer must make a torch optimizer, got float"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, TypeError, "optimizer must make a torch optimizer"),
        ({"optimizer": lambda parameters: None}, TypeError, "optimizer must return a torch optimizer"),
    ],
)
def test_bad_input_is_named(change, error, match):
    module = line()
    before, mode = weights(module), module.training
    with pytest.raises(error, match=match):
        run(module, **change)
    assert same(before, weights(module))
    assert all(p.requires_grad for p in module.parameters())
    assert module.training == mode


def test_a_named_module_that_does_not_matter_is_named():
    module, other = line(), MLPEnergy(2, hidden=(3,))
    with pytest.raises(ValueError, match=r"does not depend on train\[1\] \(MLPEnergy\)"):
        run(module, train=(module, other))


def test_a_model_without_modules_says_what_to_do():
    with pytest.raises(ValueError, match="nothing to learn was found.*pyro.param.*train="):
        fit(lambda x: None, lambda x: None, torch.ones(8), progress=False)
    with pytest.raises(TypeError, match="guide must be callable, got NoneType"):
        fit(lambda x: None, None, torch.ones(8), progress=False)
