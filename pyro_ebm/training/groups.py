"""Which modules learn, in which groups, by which objectives; all others stand still meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.training.objective import Objective
from pyro_ebm.training.run import Group
from pyro_ebm.training.store import StoreParameters, stored_parameters

__all__ = ["modules_to_train", "objectives_of", "only_training", "with_losses"]


def _takes_turns(train: Any) -> bool:
    """Whether the modules to train are in groups."""
    nested = isinstance(train, Sequence) and not isinstance(train, str)
    return nested and any(isinstance(item, Sequence) and not isinstance(item, str) for item in train)


def objectives_of(
    objective: Any, train: Any, model: Callable[..., Any], guide: Callable[..., Any]
) -> list[Objective]:
    """One objective, or one for each group of modules to train."""
    if not isinstance(objective, Sequence) or isinstance(objective, str):
        return [Objective(objective, model, guide)]
    num_groups = len(train) if _takes_turns(train) else 1
    if len(objective) != num_groups:
        raise ValueError(
            f"objective must be one objective or one for each group of train=, got {len(objective)} for "
            f"{num_groups} group(s); groups are written train=[[vae], [energy]]"
        )
    made: dict[int, Objective] = {}
    for index, item in enumerate(objective):
        made.setdefault(id(item), Objective(item, model, guide, f"objective[{index}]"))
    return [made[id(item)] for item in objective]


def modules_to_train(train: Any, found: list[nn.Module], params: list[str]) -> list[list[nn.Module]]:
    """The modules that learn, in groups that take turns; one group unless ``train`` is nested."""
    if train is None:
        trained = [m for m in found if any(p.requires_grad for p in m.parameters())]
        stored = stored_parameters(params, [p for m in found for p in m.parameters()])
        trained += [] if stored is None else [stored]
        if not trained:
            raise ValueError(
                "nothing to learn was found behind model and guide, neither a module with parameters nor a "
                "pyro.param; name what shall learn with train=, for instance train=vae"
            )
        return [trained]
    groups = list(train) if _takes_turns(train) else [[train] if isinstance(train, nn.Module | str) else train]
    for group in groups:
        listed = isinstance(group, Sequence) and not isinstance(group, str)
        if not listed or not group or not all(isinstance(m, nn.Module | str) for m in group):
            raise TypeError(
                "train must be a torch.nn.Module, the name of a pyro.param, a sequence of them, or a sequence of such "
                f"sequences that take turns, got {train!r}"
            )
    named: list[list[nn.Module]] = [
        [_named_param(m, params) if isinstance(m, str) else m for m in group] for group in groups
    ]
    for name, group in zip(_group_names(named), named, strict=True):
        for index, module in enumerate(group):
            if not any(p.requires_grad for p in module.parameters()):
                raise ValueError(
                    f"{name}[{index}] ({type(module).__name__}) has no parameters that can learn; "
                    "leave it out, or set requires_grad on its parameters"
                )
    _tell_of_others([m for group in named for m in group], found, params)
    return named


def _named_param(name: str, params: list[str]) -> StoreParameters:
    if name not in params:
        raise ValueError(f"train names the pyro.param {name!r}, but model and guide have {params}")
    return StoreParameters([name])


def _tell_of_others(trained: list[nn.Module], found: list[nn.Module], params: list[str]) -> None:
    """Warn of params that stand still where all modules learn: whoever froze nothing means nothing to stand still."""
    learning = {id(p) for m in trained for p in m.parameters()}
    known = [p for m in found for p in m.parameters()]
    others = stored_parameters(params, [*known, *(p for m in trained for p in m.parameters())])
    tilted = any(isinstance(getattr(m, "energies", None), dict) for m in found)
    if others is not None and not tilted and all(id(p) in learning for p in known if p.requires_grad):
        warn_user(
            f"pyro.param that are not in train= stand still: {others.names} (train=[..., {others.names[0]!r}] lets one "
            "learn, train=None all)",
            TrainingWarning,
        )


def _group_names(groups: Sequence[Any]) -> list[str]:
    return ["train"] if len(groups) == 1 else [f"train[{index}]" for index in range(len(groups))]


def with_losses(
    groups: list[list[nn.Module]], losses: list[Objective], parameters: list[nn.Parameter]
) -> list[Group]:
    """The groups with what each of them minimizes."""
    losses = losses * len(groups) if len(losses) == 1 else losses
    made = []
    for name, modules, loss in zip(_group_names(groups), groups, losses, strict=True):
        inside = {id(p) for module in modules for p in module.parameters()}
        made.append(Group(modules, [p for p in parameters if id(p) in inside], loss, name))
    return made


@contextlib.contextmanager
def only_training(trained: list[nn.Module], found: list[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Freeze all but the trained modules, and undo that afterwards; yield the parameters that learn."""
    trained = list({id(m): m for m in trained}.values())
    parameters = list({id(p): p for m in trained for p in m.parameters() if p.requires_grad}.values())
    learning = {id(p) for p in parameters}
    modes = [(sub, sub.training) for m in [*found, *trained] for sub in m.modules()]
    flags = [(p, p.requires_grad) for m in found for p in m.parameters()]
    try:
        for sub, _ in modes:
            sub.training = False
        for p, _ in flags:
            p.requires_grad_(id(p) in learning)
        yield parameters
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for p in parameters:
            p.grad = None
        for sub, mode in modes:
            sub.training = mode
    for module in trained:
        module.eval()
