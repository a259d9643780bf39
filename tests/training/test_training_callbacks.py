"""Callbacks of fit(): what they see, what they can ask for, and that they change nothing else."""

from __future__ import annotations

import pytest
import torch

from pyro_ebm import VAE, Checkpoint, EpochEnd, fit

X = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))


def trained(**options):
    torch.manual_seed(0)
    vae = VAE((4,), latent_dim=1, hidden=(4,))
    options = {"epochs": 3, "batch_size": 16, "seed": 0, "progress": False, "validation": 0.2, **options}
    return vae, lambda: fit(vae.model, vae.guide, X, **options)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_they_see_each_epoch():
    seen = []

    def look(state: EpochEnd) -> None:
        assert state.modules == [vae] and not vae.training
        seen.append((state.epoch, state.train_loss, state.validation_loss, state.best_epoch))

    vae, run = trained(callbacks=[look])
    result = run()
    assert [epoch for epoch, *_ in seen] == [1, 2, 3] and result.stopped == "epochs"
    assert seen[-1][1:] == (result.train_loss, result.validation_loss, result.best_epoch)
    assert [len(losses) for _, losses, *_ in seen] == [1, 2, 3]


def test_what_they_draw_and_the_mode_they_leave_change_nothing():
    plain, run = trained()
    expected = run()
    vae, run = trained(callbacks=[lambda state: torch.rand(7), lambda state: state.modules[0].eval()])
    assert run().train_loss == expected.train_loss and same(vae, plain)


def test_one_can_end_the_training(tmp_path):
    file = tmp_path / "run.pt"
    vae, run = trained(callbacks=[lambda state: state.stop() if state.epoch == 2 else None], checkpoint=file)
    result = run()
    assert (result.stopped, result.epochs) == ("callback", 2)
    whole, run = trained()
    expected = run()
    vae, run = trained(checkpoint=Checkpoint(file, resume=True))
    assert run().train_loss == expected.train_loss and same(vae, whole)


def test_an_error_in_one_keeps_the_epoch(tmp_path):
    file = tmp_path / "run.pt"

    def fail(state):
        if state.epoch == 2:
            raise RuntimeError("the writer is full")

    vae, run = trained(callbacks=[fail], checkpoint=Checkpoint(file, every=10))
    with pytest.raises(RuntimeError, match="the writer is full"):
        run()
    whole, run = trained()
    expected = run()
    vae, run = trained(checkpoint=Checkpoint(file, resume=True))
    assert run().train_loss == expected.train_loss and same(vae, whole)


@pytest.mark.parametrize("callbacks", [print, [3], None])
def test_what_is_no_sequence_of_functions(callbacks):
    _, run = trained(callbacks=callbacks)
    with pytest.raises(TypeError, match="callbacks must be a sequence"):
        run()
